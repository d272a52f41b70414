"""Sharded parameters that one call of SpectralAdamW serves, as `optim_parts.Part` is of whole ones.

Every rank updates its own shard by the same pass as without sharding, which leaves y and z of its own rows of the new
weights; one all-reduce makes s and v of the whole out of them (read.py), with which the next step begins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_ops.layers import Entry
from spectral_ops.ops.adamw import adamw_step
from spectral_ops.ops.adamw_lists import updated
from spectral_ops.ops.adamw_state import NAME, Hyper, Options, Spectrum, Tensors
from spectral_ops.ops.dtensor import local_tensor
from spectral_ops.ops.eager_penalty import Kept
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout
from spectral_ops.optim_parts import Marks, Part, checksum
from spectral_ops.sharding.group import ShardedGroup, Shards, check_gradient_placements
from spectral_ops.sharding.mesh import all_reduce, is_gone
from spectral_ops.sharding.read import State, read_here
from spectral_ops.vectors import Vectors


class ShardedPart(Part):
    """`u` holds this rank's rows. A bias has sigma and u, too: it is a matrix of one column."""

    group: ShardedGroup  # type: ignore[assignment]

    @classmethod
    def build(
        cls,
        entries: Sequence[Entry],
        parameters: list[nn.Parameter],
        group_of: list[int],
        options: Options,
        known: Mapping[str, Vectors],
    ) -> tuple[Part, dict[str, Vectors]]:
        group = ShardedGroup(list(entries), list(range(len(entries))), parameters, None)
        views = group.start(parameters, known)
        u = group.v.new_zeros(group.shards.reader.row_count)
        return cls(group, u, parameters, group_of, options), views  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lay_out()

    def _lay_out(self) -> None:
        self._reader, pieces = self.group.shards.reader, self.group.shards.pieces
        self._pieces = [*pieces.of_matrices, *pieces.vectors, *pieces.plain]
        every = self.group.entries
        self._layouts = [cast(Layout, entry.layout) for entry in every]
        self._table = LayerTable(
            [piece.layout for piece in self._pieces],
            [0.0 if piece.is_bias else every[piece.place].target for piece in self._pieces],
            [every[piece.place].strength for piece in self._pieces],
            [every[piece.place].name for piece in self._pieces],
        )
        device = self.u.device
        self._group_of_pieces = [self.group_of[piece.place] for piece in self._pieces]
        self._groups = max(self.group_of) + 1
        self._steps: list[Tensor] = []
        self._group_of_matrices = torch.tensor(self._group_of_pieces[: self._reader.n.numel()], device=device)
        self._vectors = [self._of_group(number) for number in range(self._groups)]

    def _of_group(self, number: int) -> tuple[list[int], LayerTable]:
        """Scales and shifts of one parameter group that count on this rank: places among the pieces, and a table."""
        first, counts = self._reader.n.numel(), self._reader.counts_of_vectors
        at = [first + i for i, here in enumerate(counts) if here and self._group_of_pieces[first + i] == number]
        table = self._table
        layouts, scales = [table.layouts[i] for i in at], [table.scales[i] for i in at]
        return at, LayerTable(layouts, [table.targets[i] for i in at], scales)

    @staticmethod
    def locals_of(parameters: Sequence[Any]) -> list[Tensor]:
        return [local_tensor(p) for p in parameters]

    def marks(self) -> Marks:
        # What all ranks see alike: one that alone took a weight for changed would wait for the others' sums. A shard
        # may be written to on one rank, and an empty one has the same address wherever it lies.
        return [0] * len(self.matrices), self.versions()

    def versions(self) -> list[int]:
        return [p._version for _, p in self.matrices]

    @staticmethod
    def version(p: Tensor) -> int:
        # An operation on a DTensor leaves its shard's count as it is, and one on the shard the DTensor's.
        return p._version + local_tensor(p)._version

    @staticmethod
    def has_vectors(entry: Entry) -> bool:
        return entry.layout is not None and entry.layout.kind in (Kind.MATRIX, Kind.BIAS)

    @property
    def captured(self) -> bool:
        return any([self.group.captured, self._table.captured, *(table.captured for _, table in self._vectors)])

    # ---- the step ----

    def prepared(self, tensors: Tensors) -> Tensors:
        """This rank's shards, gradients checked to be sharded as their weights, and process groups to be there."""
        if is_gone(self._reader.group):
            self.group.shards = Shards(self.group.entries, self.parameters)  # where there are new ones; or raises
            self._lay_out()
        placements = self.group.placements
        for entry, p, g, lie in zip(self.group.entries, self.parameters, tensors.gradients, placements, strict=True):
            if g is not None:
                check_gradient_placements(entry.name, p, g, lie)
        lists: list[Any] = [[None if x is None else local_tensor(x) for x in xs] for xs in tensors]
        return Tensors(*lists)

    def penalty_gradients(self, hyper: Sequence[Hyper]) -> dict[str, Tensor]:
        raise NotImplementedError(
            f"{NAME}: expected whole parameters in penalty_gradients(), got sharded ones. Take what a "
            "SpectralRegularizer's accumulate_grad_() adds to .grad."
        )

    def step(
        self, tensors: Tensors, hyper: Sequence[Hyper], grad_scale: float | Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        group, reader, count = self.group, self._reader, self._reader.n.numel()
        pieces = self._cut(tensors)
        v = reader.local_v(group.v)
        # The pass overwrites these with what it reads of its own rows.
        spectrum = Spectrum(v.clone(), self.u.clone(), group.exponents.clone(), group.sigma.clone())
        adamw_step(
            pieces, spectrum, self._table, self._group_of_pieces, hyper, self.options, grad_scale, found_inf,
            self._backend(),
        )  # fmt: skip
        changed = updated(tensors, self._layouts)
        self._count_step([tensors.steps[i] for i in changed], found_inf)
        torch.autograd.graph.increment_version([self.parameters[i] for i in changed])
        exponent = self.options.exponent
        views = list(pieces.weights)
        local = Kept(spectrum.sigma, spectrum.u, spectrum.v)
        products = reader.exchange(views[:count], v, local, group.exponents, self._values(views))
        terms, vectors = reader.finish(products, self._state(), exponent, found_inf)
        if found_inf is not None:  # of a step that was skipped, the sums say nothing
            terms = reader.terms(group.sigma, exponent)
        return self._value(terms, vectors, hyper)

    def _cut(self, tensors: Tensors) -> Tensors:
        """By piece; of the counts of steps copies, for several pieces may be of one parameter."""

        def cut(xs: Sequence[Any]) -> list[Any]:
            return [None if xs[p.place] is None else p.view(xs[p.place]) for p in self._pieces] if xs else []

        return Tensors(
            cut([w.detach() for w in tensors.weights]),
            cut(tensors.gradients),
            cut(tensors.exp_avgs),
            cut(tensors.exp_avg_sqs),
            self._copied_steps(tensors.steps),
            cut(tensors.max_exp_avg_sqs),
            cut(tensors.masters),
        )

    def _copied_steps(self, steps: Sequence[Tensor]) -> list[Tensor]:
        counts = [steps[piece.place] for piece in self._pieces]
        if [(x.dtype, x.device) for x in counts] != [(x.dtype, x.device) for x in self._steps]:
            self._steps = [torch.empty_like(x) for x in counts]
        if counts:
            torch._foreach_copy_(self._steps, counts)
        return self._steps

    def _count_step(self, counted: list[Tensor], found_inf: Tensor | None) -> None:
        """On every rank, of parameters of which it has no element, too."""
        if not counted:
            return
        if found_inf is None:
            torch._foreach_add_(counted, 1)
        else:
            for step in counted:
                step.add_((found_inf == 0).to(step.device, step.dtype))

    def _values(self, views: Sequence[Tensor]) -> Tensor:
        """What scales and shifts of every parameter group give to R on this rank."""
        out = []
        none = self.group.v.new_empty(0)
        for at, table in self._vectors:
            value = none.new_zeros(())
            if at:
                value, _ = read_here(table, 0, [views[i] for i in at], none, none.int(), self.options.exponent)
            out.append(value.double())
        return torch.stack(out)

    def _value(self, terms: Tensor, vectors: Tensor, hyper: Sequence[Hyper]) -> Tensor:
        """strength * R, of every parameter group its own."""
        total = vectors.new_zeros(())
        for number, h in enumerate(hyper[: self._groups]):
            of_group = torch.where(self._group_of_matrices == number, terms, 0.0).sum() + vectors[number]
            total = total + h.strength * of_group
        return total.to(self.u.dtype)

    def _state(self) -> State:
        return State(self.group.v, self.group.exponents, self.group.sigma, self.u)

    # ---- what is known of the weights ----

    def prime(self, names: Collection[str]) -> None:
        """The priming read; of all weights, for it costs one sum in any case."""
        group, reader = self.group, self._reader
        views = group.shards.views(self.parameters)
        old = self._state()
        new = old.clone()
        reader.read(views, new, self.options.exponent)
        entries = group.entries
        named = [entries[p.place].name in names for p in reader.matrices]
        stale = torch.tensor(named, dtype=torch.bool, device=self.u.device)
        masks = State(reader.over_n(stale), stale, stale, reader.over_rows(stale))
        for store, x, mask in zip(old, new, masks, strict=True):
            store.copy_(torch.where(mask, x, store))

    def checksums(self) -> dict[str, Tensor]:
        """Of the whole weights, whatever the sharding: of integers, that wrap. All ranks call it together."""
        counts = dict.fromkeys((name for name, _ in self.matrices), False)
        entries, reader = self.group.entries, self._reader
        for piece, here in zip(reader.matrices, reader.counts_of_z, strict=True):
            counts[entries[piece.place].name] |= here
        device = self.u.device
        sums = [
            checksum(local_tensor(p)) if counts[name] else torch.zeros((), dtype=torch.int64, device=device)
            for name, p in self.matrices
        ]
        if not sums:
            return {}
        return dict(zip(counts, all_reduce(torch.stack(sums), reader.group).unbind(), strict=True))

    def whole_u(self) -> dict[str, Tensor]:
        """u of every matrix, (parts, m), by name. All ranks call it together."""
        places, size = self._places_of_u()
        reader = self._reader
        mine = reader.over_rows(torch.tensor(reader.counts_of_y, dtype=torch.bool, device=self.u.device))
        out = self.u.new_zeros(size).index_copy_(0, places, torch.where(mine, self.u, 0.0))
        all_reduce(out, reader.group)
        found, at = {}, 0
        for place, name in self._with_vectors():
            parts, m = self._sizes(place)
            found[name] = out[at : at + parts * m].view(parts, m)
            at += parts * m
        return found

    def take_u(self, known: Mapping[str, Tensor]) -> None:
        """This rank's rows of what is known, (parts, m) by name."""
        places, size = self._places_of_u()
        whole, at = self.u.new_zeros(size), 0
        for place, name in self._with_vectors():
            parts, m = self._sizes(place)
            if name in known:
                whole[at : at + parts * m] = known[name].to(whole).flatten()
            at += parts * m
        self.u.copy_(whole[places])

    def _with_vectors(self) -> list[tuple[int, str]]:
        """Place and name of the matrices, then of the biases: in the order of the pieces."""
        places = dict.fromkeys(piece.place for piece in self._reader.matrices)
        return [(place, self.group.entries[place].name) for place in places]

    def _sizes(self, place: int) -> tuple[int, int]:
        """(parts, m) of a matrix or a bias."""
        layout, shape = self.group.entries[place].layout, self.group.entries[place].shape
        assert layout is not None
        split = shape[layout.row_dim]
        if layout.kind == Kind.BIAS or layout.row_dim == layout.split_dim:
            split = shape[layout.split_dim] // layout.parts
        return layout.parts, split

    def _places_of_u(self) -> tuple[Tensor, int]:
        """Where this rank's rows lie among all rows of all matrices, and how many these are."""
        out, at = [], 0
        for piece in self._reader.matrices:
            out.append(torch.arange(at + piece.row_at, at + piece.row_at + piece.rows))
            at += self._sizes(piece.place)[1]
        none = torch.zeros(0, dtype=torch.int64)
        return torch.cat([none, *out]).to(self.u.device), at

