"""A call of SpectralAdamW's step: the parameters that it serves, their s, u, v, and how it is given again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from spectral_ops.layers import Entry
from spectral_ops.ops.adamw import adamw_step, adamw_step_again, choose_backend
from spectral_ops.ops.adamw_lists import all_plain, by_address
from spectral_ops.ops.adamw_ref import penalty_gradients_ref
from spectral_ops.ops.adamw_state import Hyper, Options, Spectrum, Tensors, check_tensors, same_places
from spectral_ops.ops.layout import as_matrices, pack, sizes, starts
from spectral_ops.ops.snapshot import PLAIN, Addresses, Snapshot, has_memory, step_lookup, versions_of
from spectral_ops.vectors import Group, Vectors, make_group

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
    # Which gradients were missing, how the others looked, and whether all tensors had memory.
    checked: tuple[tuple[bool, ...], Snapshot, bool] | None = None
    addressed: bool = False  # of the last step's tensors, whether kernels can be handed their addresses
    steps: Sequence[Tensor] = ()  # the last step's counts
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

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds a launch of it."""
        return self.group.captured

    def has_moved(self) -> bool:
        """Whether parameters look otherwise than when the part was made."""
        return self.looks.addresses(self.locals_of(self.parameters)) is None

    def prepared(self, tensors: Tensors) -> Tensors:
        """As the step takes them. Raises, naming the parameter, for what it cannot take."""
        return tensors

    def check(self, tensors: Tensors) -> None:
        """Raises for a gradient that does not fit; those that look as at the last step are not asked again."""
        given = [g for g in tensors.gradients if g is not None]
        # Of another parameter it may look alike: which ones are given counts.
        missing = tuple(g is None for g in tensors.gradients)
        checked = self.checked
        if checked is None or checked[0] != missing or checked[1].addresses(given) is None:
            check_tensors([entry.name for entry in self.group.entries], tensors)
            self.checked = checked = missing, Snapshot(given), by_address(tensors)
        self.addressed = checked[2] and (all_plain(tensors[2:]) or by_address(tensors[2:]))

    def step(
        self, tensors: Tensors, hyper: Sequence[Hyper], grad_scale: float | Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        """One step; strength * R of the new weights."""
        spectrum = Spectrum(self.group.v, self.u, self.group.exponents, self.group.sigma)
        return adamw_step(
            tensors, spectrum, self.group.table, self.group_of, hyper, self.options, grad_scale, found_inf,
            self._backend(),
        )  # fmt: skip

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
        return choose_backend(self.u, self.addressed)

    def marks(self) -> Marks:
        """What tells whether a weight was changed, of all matrices, as they are now."""
        addresses = self._weight_looks.addresses(self.weights)
        if addresses is None:  # they look otherwise
            addresses = [address_of(w) for w in self.weights]
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


def address_of(w: Tensor) -> int:
    """0 of one that lies elsewhere, or nowhere."""
    return w.data_ptr() if type(w) in PLAIN or has_memory(w) else 0


def checksum(w: Tensor) -> Tensor:
    """The sum of a weight's bits as integers, 0-d int64: the same on every device, whatever the order."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()]
    return w.detach().resolve_neg().contiguous().view(kind).sum(dtype=torch.int64)
