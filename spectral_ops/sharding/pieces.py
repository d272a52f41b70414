"""The matrices and vectors of sharded parameters, and what of each lies on this rank.

Every part of every matrix has one piece on every rank, which may be empty, so that v, sigma and what is summed are in
the same order everywhere; the parts of a packed projection may straddle ranks.

A bias is a matrix of one column with target 0: sigma = ||b||, (sigma^k)^2 = ||b||^(2k), u = b / ||b||. It then needs no
sum of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_ops.layers import Entry
from spectral_ops.ops.layout import Kind, Layout
from spectral_ops.rules import refuse_sharded_operator
from spectral_ops.sharding.mesh import Block, Ranks


class Piece(NamedTuple):
    """The part of one matrix, or the elements of one vector, that lie on this rank."""

    place: int  # of its parameter
    layout: Layout
    cut: tuple[int, int, int] | None  # (dimension, start, length) of the local tensor; None: all of it
    is_bias: bool
    rows: int  # here
    row_at: int  # the first of them, among those of the matrix
    columns: int  # here
    n: int  # columns of the matrix
    places: Tensor | None  # which of its columns are here; None: all
    row_cuts: frozenset[Ranks]  # dimensions of the mesh that share out its rows
    column_cuts: frozenset[Ranks]
    is_empty_matrix: bool  # on all ranks together: counts for nothing

    def view(self, local: Tensor) -> Tensor:
        if self.cut is not None:
            local = local.narrow(*self.cut)
        return local.unsqueeze(1) if self.is_bias else local


class Pieces(NamedTuple):
    """Of a list of parameters, each kind in the order of the list."""

    matrices: list[Piece]
    biases: list[Piece]
    vectors: list[Piece]  # scales and shifts
    plain: list[Piece]  # without a term

    @property
    def of_matrices(self) -> list[Piece]:
        """Whatever has a sigma."""
        return self.matrices + self.biases


def cut_into_pieces(entries: Sequence[Entry], blocks: Sequence[Block]) -> Pieces:
    pieces = Pieces([], [], [], [])
    for place, (entry, block) in enumerate(zip(entries, blocks, strict=True)):
        layout = entry.layout
        assert layout is not None
        if layout.operator is not None:
            refuse_sharded_operator(entry.name)
        if layout.kind == Kind.MATRIX:
            pieces.matrices.extend(_of_matrix(place, entry, layout, block))
        elif layout.kind == Kind.BIAS:
            pieces.biases.extend(_of_bias(place, entry, layout, block))
        else:
            kind = pieces.plain if layout.kind == Kind.PLAIN else pieces.vectors
            kind.append(_of_vector(place, layout, block))
    return pieces


def _of_matrix(place: int, entry: Entry, layout: Layout, block: Block) -> list[Piece]:
    split, row_dim = layout.split_dim, layout.row_dim
    size = entry.shape[split] // layout.parts
    begin, end = block.ranges[split]
    # Where a dimension counts parts and nothing else, a part is here or it is not: neither rows nor columns are cut.
    along_parts = {ranks for ranks, dim in block.cuts.items() if dim == split and size == 1 and split != row_dim}
    row_cuts = frozenset(ranks for ranks, dim in block.cuts.items() if dim == row_dim)
    column_cuts = frozenset(block.cuts.keys() - row_cuts - along_parts)
    others = [dim for dim in range(len(entry.shape)) if dim != row_dim]  # of the columns, in their order
    out = []
    for part in range(layout.parts):
        low, high = max(begin, part * size), min(end, (part + 1) * size)
        length = max(0, high - low)
        ranges = list(block.ranges)
        ranges[split] = (low - part * size, low - part * size + length) if length else (0, 0)
        whole = [size if dim == split else n for dim, n in enumerate(entry.shape)]
        n = math.prod(whole[dim] for dim in others)
        here = tuple(b - a for a, b in ranges)
        columns = math.prod(here[dim] for dim in others)
        places = None
        if columns != n:
            places = torch.arange(n).view([whole[dim] for dim in others])
            for at, dim in enumerate(others):
                places = places.narrow(at, ranges[dim][0], here[dim])
            places = places.flatten()
        cut = None if layout.parts == 1 else (split, low - begin if length else 0, length)
        # What shares out parts says of a part only who holds it, as if that were all of its rows.
        out.append(
            Piece(
                place, Layout(row_dim=row_dim), cut, False, here[row_dim], ranges[row_dim][0], columns, n, places,
                row_cuts | along_parts, column_cuts, math.prod(whole) == 0,
            )  # fmt: skip
        )
    return out


def _of_bias(place: int, entry: Entry, layout: Layout, block: Block) -> list[Piece]:
    size = entry.shape[0] // layout.parts
    begin, end = block.ranges[0]
    out = []
    for part in range(layout.parts):
        low, high = max(begin, part * size), min(end, (part + 1) * size)
        length = max(0, high - low)
        cut = (0, low - begin if length else 0, length)
        cuts = frozenset(block.cuts)
        row_at = low - part * size if length else 0
        out.append(Piece(place, Layout(), cut, True, length, row_at, 1, 1, None, cuts, frozenset(), size == 0))
    return out


def _of_vector(place: int, layout: Layout, block: Block) -> Piece:
    n = math.prod(block.shape)
    return Piece(place, layout, None, False, 1, 0, n, n, None, frozenset(block.cuts), frozenset(), n == 0)
