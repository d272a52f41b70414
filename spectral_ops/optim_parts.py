"""What SpectralAdamW keeps beside torch's state: s, u, v of every matrix; the calls its parameters are cut into."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from spectral_ops import backends
from spectral_ops.layers import Entry
from spectral_ops.ops.adamw import adamw_step, adamw_step_again
from spectral_ops.ops.adamw_ref import penalty_gradients_ref
from spectral_ops.ops.adamw_state import NAME, Hyper, Options, Spectrum, Tensors, same_places
from spectral_ops.ops.layout import Kind, Layout, Sizes, as_matrices, pack, sizes, starts
from spectral_ops.ops.snapshot import Addresses, Snapshot, step_lookup, versions_of
from spectral_ops.vectors import STATE_KEYS, Group, Vectors, from_state, make_group, to_state

MORE_KEYS = ("u", "checksum")
# Of a parameter, in the order of a step's lists; those with masters are not repeated, and theirs is absent.
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "", "step")
REPEATABLE = ("native", "triton")  # backends that take a step's tensors by address

Marks: TypeAlias = tuple[Addresses, list[int]]  # addresses and versions


@dataclass(eq=False)
class Part:
    """Parameters that one call serves: same device, vector dtype and options. `u` is flat over the group's matrices."""

    group: Group
    u: Tensor
    parameters: list[nn.Parameter]
    group_of: list[int]
    options: Options
    looks: Snapshot = field(init=False)
    matrices: list[tuple[str, nn.Parameter]] = field(init=False)
    checked: tuple[tuple[bool, ...], Snapshot] | None = None  # which gradients were missing, and how the others looked
    seen: Marks | None = None  # of the weights that s, u, v are of
    lookup: Any = None  # csrc's StepLookup of the last step's tensors, where that step can be repeated
    backend: str = ""  # that took it

    @classmethod
    def build(
        cls,
        entries: Sequence[Entry],
        parameters: list[nn.Parameter],
        group_of: list[int],
        options: Options,
        known: Mapping[str, Vectors],
    ) -> tuple[Part, dict[str, Vectors]]:
        """With the known vectors, and converged ones for what is new; and views of them by name."""
        group, views = make_group(entries, list(range(len(entries))), known, None)
        return cls(group, group.v.new_zeros(group.rows), parameters, group_of, options), views

    def __post_init__(self) -> None:
        self.looks = Snapshot(self.locals_of(self.parameters))
        pairs = zip(self.group.entries, self.parameters, strict=True)
        self.matrices = [(e.name, p) for e, p in pairs if self.has_vectors(e)]
        self.weights = self.locals_of([p for _, p in self.matrices])
        self._weight_looks = Snapshot(self.weights)

    @staticmethod
    def locals_of(parameters: Sequence[Any]) -> Sequence[Tensor]:
        """What of the parameters lies here."""
        return parameters

    @staticmethod
    def has_vectors(entry: Entry) -> bool:
        return entry.layout is not None and entry.layout.is_matrix

    def has_moved(self) -> bool:
        """Whether parameters look otherwise than when the part was made."""
        return self.looks.addresses(self.locals_of(self.parameters)) is None

    def prepared(self, tensors: Tensors) -> Tensors:
        """As the step takes them. Raises, naming the parameter, for what it cannot take."""
        return tensors

    def step(
        self, tensors: Tensors, hyper: Sequence[Hyper], grad_scale: float | Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """One step; strength * R of the new weights."""
        spectrum = Spectrum(self.group.v, self.u, self.group.exponents, self.group.sigma)
        return adamw_step(
            tensors, spectrum, self.group.table, self.group_of, hyper, self.options, grad_scale, found_inf
        )

    def remember(self, state: Mapping[Any, Any], tensors: Tensors) -> None:
        """Lets the next step find all tensors by one look-up, where they are plain and gradients lie as weights do."""
        self.lookup, self.backend = None, self._backend()
        pairs = zip(tensors.weights, tensors.gradients, strict=True)
        if self.backend in REPEATABLE and all(g is None or same_places(g, w) for w, g in pairs):
            absent = () if self.options.amsgrad else ("max_exp_avg_sq",)  # whatever a state still holds
            self.lookup = step_lookup(self.parameters, state, ["" if key in absent else key for key in STATES])

    def addresses(self, state: Mapping[Any, Any]) -> bytes | None:
        """Of the tensors of this step, for `step_again`; None where any of them looks otherwise than at the last."""
        if self.lookup is None or self.backend != self._backend():
            return None
        return cast(bytes | None, self.lookup.addresses(state))

    def step_again(
        self, addresses: bytes, hyper: Sequence[Hyper], grad_scale: float | Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """`step` on the tensors at these addresses."""
        spectrum = Spectrum(self.group.v, self.u, self.group.exponents, self.group.sigma)
        weights: list[Any] = self.parameters
        table, options = self.group.table, self.options
        return adamw_step_again(
            self.backend, addresses, weights, spectrum, table, self.group_of, hyper, options, grad_scale, found_inf
        )

    def penalty_gradients(self, hyper: Sequence[Hyper]) -> dict[str, Tensor]:
        """strength * dR/dp of the penalised parameters, by name; new tensors."""
        spectrum = Spectrum(self.group.v, self.u, self.group.exponents, self.group.sigma)
        table, out = self.group.table, {}
        found = penalty_gradients_ref(self.parameters, spectrum, table, self.group_of, hyper, self.options)
        for i, (entry, p, gradient) in enumerate(zip(self.group.entries, self.parameters, found, strict=True)):
            if gradient is not None:
                out[entry.name] = whole = torch.empty_like(p)
                as_matrices(whole, table.layouts[i]).copy_(gradient)
        return out

    def _backend(self) -> str:
        return backends.choose(self.u.device, "adamw_step", self.u.dtype)

    def marks(self) -> Marks:
        """What tells whether a weight was changed, of all matrices, as they are now."""
        addresses = self._weight_looks.addresses(self.weights)
        if addresses is None:  # they look otherwise
            addresses = [w.data_ptr() for w in self.weights]
        return addresses, self.versions()

    def versions(self) -> list[int]:
        return versions_of(list(self.weights))

    @staticmethod
    def version(p: Tensor) -> int:
        """Larger than before, once a parameter was changed."""
        return p._version

    def prime(self, names: Collection[str]) -> None:
        """The priming read of these matrices: s, u, v of the weights as they are."""
        group, places = self.group, starts([e.shape for e in self.group.entries], self.group.layouts)
        chosen = [i for i, entry in enumerate(group.entries) if entry.name in names]
        ends = [places[i + 1] for i in chosen]
        at = [places[i] for i in chosen]

        def cut(x: Tensor, what: str) -> list[Tensor]:
            return [x[getattr(a, what) : getattr(b, what)] for a, b in zip(at, ends, strict=True)]

        v, exponents = cut(group.v, "v"), cut(group.exponents, "number")
        weights, layouts = [self.parameters[i].detach() for i in chosen], [group.layouts[i] for i in chosen]
        sigma, u, v_new, exponents_new = torch.ops.spectral_ops.power_iteration(
            weights, torch.cat(v), torch.cat(exponents), pack(layouts), 1
        )
        for stores, read in (
            (cut(group.sigma, "number"), sigma), (cut(self.u, "u"), u), (v, v_new), (exponents, exponents_new)
        ):  # fmt: skip
            for store, piece in zip(stores, read.split([x.numel() for x in stores]), strict=True):
                store.copy_(piece)

    def checksums(self) -> dict[str, Tensor]:
        """Of the weights of its matrices, by name."""
        return {name: checksum(p) for name, p in self.matrices}

    def whole_u(self) -> dict[str, Tensor]:
        """u of every matrix, (parts, m), by name; views."""
        out, places = {}, starts([e.shape for e in self.group.entries], self.group.layouts)
        for i, entry in enumerate(self.group.entries):
            if self.has_vectors(entry):
                parts, m, _ = sizes(entry.shape, self.group.layouts[i])
                out[entry.name] = self.u[places[i].u : places[i + 1].u].view(parts, m)
        return out

    def take_u(self, known: Mapping[str, Tensor]) -> None:
        """Takes over what is known, (parts, m) by name."""
        for name, u in self.whole_u().items():
            if name in known:
                u.copy_(known[name])


class Spectra:
    """s, u, v by parameter name, views into the parts' buffers, and which weights they are of."""

    def __init__(self) -> None:
        self.vectors: dict[str, Vectors] = {}
        self.u: dict[str, Tensor] = {}  # (parts, m)
        self._recorded: list[Part] = []  # whose `seen` is not in _seen yet
        self._seen: dict[str, tuple[int, int]] = {}  # address and version of the weight that they are of
        self._loaded: dict[str, int] = {}  # checksum of the weight that they are of, where only that is known

    def part(
        self,
        kind: type[Part],
        entries: Sequence[Entry],
        parameters: list[nn.Parameter],
        group_of: list[int],
        options: Options,
    ) -> Part:
        """A part whose buffers hold what is known of its matrices; what is new starts converged."""
        self._settle()
        part, views = kind.build(entries, parameters, group_of, options, self.vectors)
        part.take_u(self.u)
        self.vectors |= views
        return part

    def keep(self, parts: Sequence[Part]) -> None:
        """Takes over u of parts, before they are cut anew or saved."""
        for part in parts:
            self.u |= part.whole_u()

    def refresh(self, part: Part) -> None:
        """The priming read of those weights that are not the ones last seen."""
        if part.seen is not None and part.seen == part.marks():
            return
        self._settle()
        sums = part.checksums() if self._loaded else {}
        stale = []
        for (name, _), w, version in zip(part.matrices, part.weights, part.versions(), strict=True):
            if self._seen.get(name) == (w.data_ptr(), version):
                continue
            if name not in self._loaded or self._loaded[name] != int(sums[name]):
                stale.append(name)
        if stale:
            part.prime(set(stale))
        self.record(part)

    def record(self, part: Part) -> None:
        """From now on, what is known of the part's matrices is known of their weights as they are.

        After a step, they are where they were when it began.
        """
        if part.seen is None:
            self._recorded.append(part)
            part.seen = part.marks()
        else:
            part.seen = part.seen[0], part.versions()
        if self._loaded:
            for name, _ in part.matrices:
                self._loaded.pop(name, None)

    def _settle(self) -> None:
        """Moves to _seen, by name, what the parts have seen: from now on they may be cut otherwise."""
        for part in self._recorded:
            assert part.seen is not None
            addresses, versions = part.seen
            numbers = np.frombuffer(addresses, np.int64).tolist() if isinstance(addresses, bytes) else addresses
            names = [name for name, _ in part.matrices]
            self._seen |= dict(zip(names, zip(numbers, versions, strict=True), strict=True))
            part.seen = None
        self._recorded = []

    def forget(self) -> None:
        """Every weight is read again before the next step."""
        self._settle()
        self._seen.clear()
        self._loaded.clear()

    # ---- saving and loading ----

    def state_dict(self, parts: Sequence[Part]) -> dict[str, dict[str, Tensor]]:
        """Vectors, u and a checksum of the weights that they are of, by name."""
        self.keep(parts)
        state = to_state(self.vectors)
        state["u"] = {name: u.clone() for name, u in self.u.items()}
        state["checksum"] = {name: x for part in parts for name, x in part.checksums().items()}
        return state

    def load(self, state: Mapping[str, Any], layouts: Mapping[str, tuple[tuple[int, ...], Layout]]) -> Spectra:
        """A new one that holds a state. Raises for what does not fit, naming it."""
        shapes = {name: sizes(shape, layout) for name, (shape, layout) in layouts.items() if layout.is_matrix}
        # Of sharded biases the vectors are kept, too.
        biases = {name: layout.parts for name, (_, layout) in layouts.items() if layout.kind == Kind.BIAS}
        shapes |= {name: Sizes(parts, layouts[name][0][0] // parts, 1) for name, parts in biases.items()}
        remedy = "Pass what state_dict() returned"
        missing = [key for key in (*STATE_KEYS, *MORE_KEYS) if key not in state]
        if missing:
            raise ValueError(
                f"{NAME}: expected state['spectral'] with the keys {[*STATE_KEYS, *MORE_KEYS]}, got none of {missing}. "
                f"{remedy}."
            )
        # A matrix may be missing: a frozen one has no vectors. Its own are then kept, and its weight is read.
        names = set(state["v"]) & set(shapes)
        known = {key: {n: x for n, x in state[key].items() if n in names} for key in STATE_KEYS}
        new = Spectra()
        new.vectors = from_state(known, {n: (s.parts, s.n) for n, s in shapes.items() if n in names})
        for name in new.vectors:
            u, parts, m = state["u"].get(name), shapes[name].parts, shapes[name].m
            if not isinstance(u, Tensor) or tuple(u.shape) != (parts, m):
                got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
                raise ValueError(
                    f"{NAME}: expected state['spectral']['u'][{name!r}] of shape {(parts, m)}, got {got}. {remedy}."
                )
            new.u[name] = u.detach().clone()
            if name in state["checksum"]:
                new._loaded[name] = int(state["checksum"][name])
        new.vectors |= {name: x for name, x in self.vectors.items() if name not in new.vectors}
        new.u |= {name: u for name, u in self.u.items() if name not in new.u}
        return new


def checksum(w: Tensor) -> Tensor:
    """The sum of a weight's bits as integers, 0-d int64: the same on every device, whatever the order."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()]
    return w.detach().contiguous().view(kind).sum(dtype=torch.int64)
