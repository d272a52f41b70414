"""The kernels' table of layers: cut once for a set of shapes, uploaded again only where an address changed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_ops.ops.cut import Cut, Matrix, Rows, cut
from spectral_ops.ops.layout import Layout, sizes
from spectral_ops.ops.views import View, view_of

# Programs per multiprocessor by warps: what 128 registers a thread allow. More would do no harm and no good.
PROGRAMS_PER_SM = {4: 4, 8: 2, 16: 1}
# The interpreter runs programs one after another.
INTERPRETED = {4: 2, 8: 2, 16: 2}


def bits(x: float) -> int:
    """The float64 as the int64 of the same bits."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def programs_by_warps(device: torch.device) -> dict[int, int]:
    if device.type != "cuda":
        return INTERPRETED
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return {warps: count * sms for warps, count in PROGRAMS_PER_SM.items()}


@dataclass(frozen=True)
class Start:
    """Where a parameter's first matrix lies in the flat v and u, and its number in sigma."""

    v: int
    u: int
    index: int


class Part:
    """The launch of one pair of dtypes: its rows without addresses, its tiles, what it needs of memory.

    Rows: all matrices in the order of the parameters, then all vectors.
    """

    def __init__(
        self,
        items: Sequence[int],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        layouts: Sequence[Layout],
        targets: Sequence[float],
        scales: Sequence[float],
        starts: Sequence[Start],
        iterations: int,
    ):
        from spectral_ops.kernels import table

        self.device = weights[items[0]].device
        self.weight_dtype = weights[items[0]].dtype
        self.gradient_dtype = gradients[items[0]].dtype if gradients else self.weight_dtype
        # Matrices first; `sorted` keeps their order.
        self.items = sorted(items, key=lambda i: not layouts[i].is_matrix)
        views = [view_of(weights[i], layouts[i]) for i in self.items]
        g_views = [view_of(gradients[i], layouts[i]) for i in self.items] if gradients else [None] * len(views)
        matrices: list[Matrix] = []
        for i, view, g_view in zip(self.items, views, g_views, strict=True):
            if layouts[i].is_matrix:
                parts, m, n = sizes(weights[i].shape, layouts[i])
                g_rows = None if g_view is None else _rows(gradients[i], g_view, n)
                size = weights[i].element_size()
                matrices += [Matrix(m, n, size, _rows(weights[i], view, n), g_rows)] * parts
        vectors = sum(layouts[i].parts for i in self.items if not layouts[i].is_matrix)
        self.cut: Cut = cut(matrices, vectors, iterations, programs_by_warps(self.device))
        self.tiles = torch.tensor(self.cut.tiles, dtype=torch.int32).view(-1, table.TILE.value)
        self._maps: list[Tensor] = []  # kept alive: rows hold their addresses
        self._owner: list[int] = []  # of each row, the place of its parameter in items
        self._offsets: list[tuple[int, int]] = []  # of each row's first element in weight and gradient, in bytes
        y = sum(x.m for x in matrices)
        self._space = -(-max((s.u for s in starts), default=0) // table.PAD) * table.PAD + _padded(y)
        self._sums = 0
        rows: list[list[int]] = []
        for place, i in enumerate(self.items):
            common = [0] * table.FIELDS.value
            parts, common[table.ROWS.value], common[table.COLUMNS.value] = sizes(weights[i].shape, layouts[i])
            common[table.TARGET.value], common[table.SCALE.value] = bits(targets[i]), bits(scales[i])
            common[table.KIND.value] = int(layouts[i].kind)
            view, g_view = views[place], g_views[place]
            self._set_view(common, view, table.W_ROW.value)
            if g_view is not None:
                self._set_view(common, g_view, table.G_ROW.value)
            for part in range(parts):
                row = list(common)
                self._owner.append(place)
                at = part * view.part_stride * weights[i].element_size()
                g_at = 0 if g_view is None else part * g_view.part_stride * gradients[i].element_size()
                self._offsets.append((at, g_at))
                row[table.TERM_AT.value] = self._take_sums(2)
                if layouts[i].is_matrix:
                    self._place(row, part, starts[i], len(rows))
                rows.append(row)
        self.rows = torch.tensor(rows, dtype=torch.int64).view(-1, table.FIELDS.value)
        self.space_size, self.sums_size = max(self._space, 1), max(self._sums, 1)

    def _take_sums(self, count: int) -> int:
        self._sums += count
        return self._sums - count

    def _take_space(self, count: int) -> int:
        self._space += count
        return self._space - count

    def _set_view(self, row: list[int], view: View, first: int) -> None:
        row[first], row[first + 1] = view.row_stride, view.column_stride
        for offset, mapping in ((2, view.order), (3, view.places)):
            if mapping is not None:
                self._maps.append(mapping.to(self.device))
                row[first + offset] = self._maps[-1].data_ptr()

    def _place(self, row: list[int], part: int, start: Start, number: int) -> None:
        """Of a matrix: its places in the flat buffers and in the workspace, and its share of the work."""
        from spectral_ops.kernels import table

        share = self.cut.shares[number]
        m, n = row[table.ROWS.value], row[table.COLUMNS.value]
        row[table.PADDED.value] = _padded(n)
        row[table.V_AT.value] = start.v + part * n
        row[table.U_AT.value] = start.u + part * m
        row[table.INDEX.value] = start.index + part
        row[table.PARTIAL_AT.value] = self._take_space(max(share.strips, 1) * _padded(n))
        row[table.Z_AT.value] = self._take_space(_padded(n))
        row[table.SUMS_AT.value] = self._take_sums(2 * share.blocks)
        row[table.STRIPS.value], row[table.STRIP_ROWS.value] = share.strips, share.strip_rows
        row[table.BLOCKS.value] = share.blocks

    def addressed(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """The rows with the addresses of these tensors."""
        from spectral_ops.kernels import table

        rows = self.rows.clone()
        w = [weights[i].data_ptr() for i in self.items]
        rows[:, table.WEIGHT.value] = torch.tensor(
            [w[place] + at for place, (at, _) in zip(self._owner, self._offsets, strict=True)], dtype=torch.int64
        )
        if gradients:
            g = [gradients[i].data_ptr() for i in self.items]
            rows[:, table.GRADIENT.value] = torch.tensor(
                [g[place] + at for place, (_, at) in zip(self._owner, self._offsets, strict=True)], dtype=torch.int64
            )
        return rows


def _padded(n: int) -> int:
    from spectral_ops.kernels import table

    return -(-n // table.PAD) * table.PAD


def _rows(t: Tensor, view: View, n: int) -> Rows:
    aligned = view.divisible and n % 8 == 0 and t.data_ptr() % 16 == 0
    return Rows(view.dense, not view.dense and view.row_stride == 1, aligned)
