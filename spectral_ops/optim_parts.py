"""What SpectralAdamW keeps beside torch's state: s, u, v of every matrix; the calls its parameters are cut into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from spectral_ops.layers import Entry
from spectral_ops.ops.adamw_state import NAME, Options, Spectrum
from spectral_ops.ops.layout import Layout, pack, sizes
from spectral_ops.ops.snapshot import Addresses, Snapshot
from spectral_ops.vectors import STATE_KEYS, Group, Vectors, from_state, make_group, to_state

MORE_KEYS = ("u", "checksum")

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

    def __post_init__(self) -> None:
        self.looks = Snapshot(self.parameters)
        pairs = zip(self.group.entries, self.parameters, strict=True)
        self.matrices = [(e.name, p) for e, p in pairs if e.layout is not None and e.layout.is_matrix]
        self._weights = [p for _, p in self.matrices]
        self._weight_looks = Snapshot(self._weights)

    def marks(self) -> Marks:
        """What tells whether a weight was changed, of all matrices, as they are now."""
        addresses = self._weight_looks.addresses(self._weights)
        if addresses is None:  # they look otherwise
            addresses = [p.data_ptr() for p in self._weights]
        return addresses, self.versions()

    def versions(self) -> list[int]:
        return [p._version for p in self._weights]

    @property
    def spectrum(self) -> Spectrum:
        return Spectrum(self.group.v, self.u, self.group.exponents, self.group.sigma)


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
        entries: Sequence[Entry],
        parameters: list[nn.Parameter],
        group_of: list[int],
        options: Options,
    ) -> Part:
        """A part whose buffers hold what is known of its matrices; what is new starts converged."""
        self._settle()
        group, views = make_group(entries, list(range(len(entries))), self.vectors, None)
        u = group.v.new_zeros(group.rows)
        at = 0
        for entry in entries:
            assert entry.layout is not None
            if entry.layout.is_matrix:
                parts, m, _ = sizes(entry.shape, entry.layout)
                view = u[at : at + parts * m].view(parts, m)
                at += parts * m
                if entry.name in self.u:
                    view.copy_(self.u[entry.name])
                self.u[entry.name] = view
        self.vectors |= views
        return Part(group, u, parameters, group_of, options)

    def refresh(self, part: Part) -> None:
        """The priming read of those weights that are not the ones last seen."""
        if part.seen is not None and part.seen == part.marks():
            return
        self._settle()
        stale = []
        for name, p in part.matrices:
            if self._seen.get(name) == (p.data_ptr(), p._version):
                continue
            if name not in self._loaded or self._loaded[name] != int(checksum(p)):
                stale.append(name)
        if stale:
            self._prime(part, set(stale))
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

    def _prime(self, part: Part, names: set[str]) -> None:
        chosen = [(e, p) for e, p in zip(part.group.entries, part.parameters, strict=True) if e.name in names]
        layouts = [e.layout for e, _ in chosen if e.layout is not None]
        known = [self.vectors[e.name] for e, _ in chosen]
        sigma, u, v, exponents = torch.ops.spectral_ops.power_iteration(
            [p.detach() for _, p in chosen],
            torch.cat([x.v.flatten() for x in known]),
            torch.cat([x.exponent for x in known]),
            pack(layouts),
            1,
        )
        for stores, read in (
            ([x.sigma for x in known], sigma),
            ([self.u[e.name] for e, _ in chosen], u),
            ([x.v for x in known], v),
            ([x.exponent for x in known], exponents),
        ):
            for store, piece in zip(stores, read.split([x.numel() for x in stores]), strict=True):
                store.copy_(piece.view(store.shape))

    # ---- saving and loading ----

    def state_dict(self, parts: Sequence[Part]) -> dict[str, dict[str, Tensor]]:
        """Vectors, u and a checksum of the weights that they are of, by name."""
        state = to_state(self.vectors)
        state["u"] = {name: u.clone() for name, u in self.u.items()}
        state["checksum"] = {name: checksum(p) for part in parts for name, p in part.matrices}
        return state

    def load(self, state: Mapping[str, Any], layouts: Mapping[str, tuple[tuple[int, ...], Layout]]) -> Spectra:
        """A new one that holds a state. Raises for what does not fit, naming it."""
        shapes = {name: sizes(shape, layout) for name, (shape, layout) in layouts.items() if layout.is_matrix}
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
