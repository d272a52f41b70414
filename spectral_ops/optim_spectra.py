"""What SpectralAdamW knows of s, u, v of every matrix, by name, whichever calls its parameters are cut into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from spectral_ops.layers import Entry
from spectral_ops.ops.adamw_state import NAME, Options
from spectral_ops.ops.layout import Kind, Layout, Sizes, sizes
from spectral_ops.optim_parts import Marks, Part
from spectral_ops.vectors import STATE_KEYS, Vectors, from_state, to_state

MORE_KEYS = ("u", "checksum")


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
        sums = part.checksums() if self._loaded else {}
        stale = []
        for (name, _), mark in zip(part.matrices, _each(part.marks()), strict=True):
            if self._seen.get(name) == mark:
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


def _each(marks: Marks) -> list[tuple[int, int]]:
    """Address and version of every weight."""
    addresses, versions = marks
    numbers = np.frombuffer(addresses, np.int64).tolist() if isinstance(addresses, bytes) else addresses
    return list(zip(numbers, versions, strict=True))
