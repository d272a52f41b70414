"""What SpectralAdamW knows of s, u, v of every matrix, by name, whichever calls its parameters are cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectral_ops.layers import Entry
from spectral_ops.ops.adamw_state import Options
from spectral_ops.ops.dtensor import is_dtensor
from spectral_ops.optim_loading import checked_spectra
from spectral_ops.optim_parts import Marks, Part, address_of, checksum
from spectral_ops.vectors import Vectors, to_state

NO_WEIGHT = -(1 << 63)  # as a checksum: of 16 and 32 bits no sum reaches it


@dataclass
class Loaded:
    """Of a matrix, what a state holds: until a step is taken the weight that it is of may be yet to come."""

    vectors: Vectors
    u: Tensor  # (parts, m)
    checksum: int  # of that weight


class Spectra:
    """s, u, v by parameter name, views into the parts' buffers, and which weights they are of."""

    def __init__(self) -> None:
        self.vectors: dict[str, Vectors] = {}
        self.u: dict[str, Tensor] = {}  # (parts, m)
        self._recorded: list[Part] = []  # whose `seen` is not in _seen yet
        self._seen: dict[str, tuple[int, int]] = {}  # address and version of the weight that they are of
        self._loaded: dict[str, Loaded] = {}  # what was loaded, until a step is taken with it

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

    def follow(self, before: Sequence[Entry], now: Sequence[Entry]) -> None:
        """Goes on with what is read as before, under the name it has now, and forgets the rest, which starts anew."""
        self._settle()
        old = {id(e.held): e for e in before}
        went_on = [(old[id(e.held)], e) for e in now if id(e.held) in old]
        names = {a.name: b.name for a, b in went_on if (a.layout, a.shape) == (b.layout, b.shape)}
        for known in (self.vectors, self.u, self._seen, self._loaded):
            kept = {names[name]: x for name, x in known.items() if name in names}
            known.clear()
            known.update(kept)  # type: ignore[arg-type]

    def refresh(self, part: Part) -> None:
        """The priming read of those weights that are not the ones last seen."""
        if part.seen is not None and part.seen == part.marks():
            return
        self._settle()
        sums = part.checksums() if any(name in self._loaded for name, _ in part.matrices) else {}
        stale, read_over = [], {}
        for (name, _), mark in zip(part.matrices, _each(part.marks()), strict=True):
            if self._seen.get(name) == mark:
                continue
            loaded = self._loaded.get(name)
            if loaded is None or loaded.checksum != int(sums[name]):
                stale.append(name)
            if loaded is not None and name in self._seen:  # of another weight, which it has held meanwhile
                read_over[name] = loaded
        for name, loaded in read_over.items():
            self.vectors[name].copy_(loaded.vectors)
        if read_over:
            part.take_u(part.whole_u() | {name: loaded.u for name, loaded in read_over.items()})
        if stale:
            part.prime(set(stale))
        self._see(part)

    def record(self, part: Part) -> None:
        """After a step: what is known of the part's matrices is known of their weights as it left them."""
        self._see(part)
        if self._loaded:
            for name, _ in part.matrices:
                self._loaded.pop(name, None)

    def _see(self, part: Part) -> None:
        """After a step, weights are where they were when it began."""
        if part.seen is None:
            self._recorded.append(part)
            part.seen = part.marks()
        else:
            part.seen = part.seen[0], part.versions()

    def _settle(self) -> None:
        """Moves to _seen, by name, what the parts have seen: from now on they may be cut otherwise."""
        for part in self._recorded:
            assert part.seen is not None
            names = [name for name, _ in part.matrices]
            self._seen |= dict(zip(names, _each(part.seen), strict=True))
            part.seen = None
        self._recorded = []

    def forget(self) -> None:
        """Every weight is read again before the next step."""
        self._settle()
        self._seen.clear()
        self._loaded.clear()

    # ---- saving and loading ----

    def state_dict(self, parts: Sequence[Part], entries: Sequence[Entry]) -> dict[str, dict[str, Tensor]]:
        """Vectors, u and a checksum of the weights that they are of, by name; what no step was taken with, as it came.

        Args:
            parts: with what is known refreshed.
            entries: of all parameters, frozen ones too.
        """
        self.keep(parts)
        self._settle()
        loaded = self._loaded
        state = to_state(self.vectors | {name: x.vectors for name, x in loaded.items()})
        state["u"] = {name: u.clone() for name, u in (self.u | {name: x.u for name, x in loaded.items()}).items()}
        sums = {name: x for part in parts for name, x in part.checksums().items()}
        for entry in entries:
            name, p = entry.name, entry.parameter
            if name in state["v"] and name not in sums:  # frozen; where it was changed since, its vectors are of none
                known = self._seen.get(name) == _mark(p)
                whole = p.full_tensor() if is_dtensor(p) and known else p  # type: ignore[attr-defined]
                sums[name] = checksum(whole) if known else torch.tensor(NO_WEIGHT)
        state["checksum"] = sums | {name: torch.tensor(x.checksum) for name, x in loaded.items()}
        return state

    def load(self, state: Any, entries: Sequence[Entry]) -> Spectra:
        """A new one that holds a state. Raises for what does not fit, naming it."""
        vectors = checked_spectra(state, entries)
        new = Spectra()
        new.vectors = self.vectors | vectors
        new.u = self.u | {name: state["u"][name].detach().clone() for name in vectors}
        for name, x in vectors.items():
            new._loaded[name] = Loaded(x, new.u[name], int(state["checksum"].get(name, NO_WEIGHT)))
        return new


def _mark(p: Tensor) -> tuple[int, int]:
    """As a part's `marks` have it."""
    return 0 if is_dtensor(p) else address_of(p), p._version


def _each(marks: Marks) -> list[tuple[int, int]]:
    """Address and version of every weight."""
    addresses, versions = marks
    numbers = np.frombuffer(addresses, np.int64).tolist() if isinstance(addresses, bytes) else addresses
    return list(zip(numbers, versions, strict=True))
