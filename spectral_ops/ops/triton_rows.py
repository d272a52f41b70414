"""The rows of the kernels' table for one pair of dtypes: where everything lies, but for the addresses."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import table
from spectral_ops.ops import cut
from spectral_ops.ops.capture import capturing
from spectral_ops.ops.layout import Kind, Start, sizes, starts
from spectral_ops.ops.views import View, view_of

if TYPE_CHECKING:
    from spectral_ops.ops.layer_table import LayerTable

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The interpreter runs programs one after another; the second finds nothing left to do.
INTERPRETED = 2


class Rows:
    """One row per part of each parameter of `items`: matrices in their order, then vectors.

    The optimizer step's rows (triton_adamw_rows.py) are made the same way and hold more.
    """

    fields = table.FIELDS.value

    def __init__(
        self,
        layers: LayerTable,
        items: Sequence[int],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        iterations: int,
    ):
        layouts = layers.layouts
        places = starts([w.shape for w in weights], layouts)
        self.layers = layers
        self.items = sorted(items, key=lambda i: (not layouts[i].is_matrix, layouts[i].kind == Kind.PLAIN))
        self.device = weights[items[0]].device
        self.weight_type = TYPES[weights[items[0]].dtype]
        self.gradient_type = TYPES[gradients[items[0]].dtype] if gradients else self.weight_type
        self.owner: list[int] = []  # of each row, the place of its parameter in items
        self._spare: Tensor | None = None
        self._maps: list[Tensor] = []  # kept alive: rows hold their addresses
        # The workspace begins with y, whose places are u's.
        self.space_size, self.sums_size = padded(places[-1].u), 0
        w_offsets: list[int] = []  # of each row's first element in its tensor, in bytes
        g_offsets: list[int] = []
        views = [view_of(weights[i], layouts[i]) for i in self.items]
        g_views = [view_of(gradients[i], layouts[i]) for i in self.items] if gradients else []
        matrices: list[cut.Matrix] = []
        for place, i in enumerate(self.items):
            if layouts[i].is_matrix:
                parts, m, n = sizes(weights[i].shape, layouts[i])
                matrix = cut.Matrix(m, n, weights[i].element_size(), self._rows_of(i, weights[i], views[place], n))
                if gradients:
                    g_rows = rows_of(gradients[i], g_views[place], n)
                    matrix = replace(matrix, gradient=g_rows, gradient_size=gradients[i].element_size())
                matrices += [matrix] * parts
        others = [
            (layouts[i].kind, weights[i].numel() // layouts[i].parts)
            for i in self.items
            if not layouts[i].is_matrix
            for _ in range(layouts[i].parts)
        ]
        self.cut = self._cut(matrices, others, iterations)
        self.widest = max((x.n for x in matrices), default=0)
        self.programs = min(self.programs_of(self.cut.shape), useful_programs(self.cut.tiles))
        rows: list[list[int]] = []
        for place, i in enumerate(self.items):
            parts, m, n = sizes(weights[i].shape, layouts[i])
            common = [0] * self.fields
            common[table.ROWS.value], common[table.COLUMNS.value] = m, n
            common[table.TARGET.value] = float_bits(layers.targets[i])
            common[table.SCALE.value] = float_bits(layers.scales[i])
            common[table.KIND.value] = int(layouts[i].kind)
            self._set_view(common, views[place], table.W_ROW.value)
            if gradients:
                self._set_view(common, g_views[place], table.G_ROW.value)
            for part in range(parts):
                row = list(common)
                w_offsets.append(part * views[place].part_stride * weights[i].element_size())
                if gradients:
                    g_offsets.append(part * g_views[place].part_stride * gradients[i].element_size())
                row[table.TERM_AT.value] = self._take_sums(table.TERMS)
                if layouts[i].is_matrix:
                    self._set_places(row, part, places[i], self.cut.shares[len(rows)])
                self._set_more(row, i, part, views[place])
                self.owner.append(place)
                rows.append(row)
        self._numbers = np.array(rows, dtype=np.int64).reshape(-1, self.fields)
        self.template = torch.from_numpy(self._numbers)
        self._owners = np.array([self.items[place] for place in self.owner], dtype=np.int64)
        self._offsets = np.array([w_offsets, g_offsets] if gradients else [w_offsets], dtype=np.int64)

    # ---- what the optimizer step's rows do otherwise ----

    def _cut(
        self, matrices: Sequence[cut.Matrix], others: Sequence[tuple[Kind, int]], iterations: int
    ) -> cut.Cut:
        """others: (kind, elements) of rows that are no matrices."""
        return cut.cut(matrices, len(others), iterations, self.programs_of)

    def _rows_of(self, i: int, w: Tensor, view: View, n: int) -> cut.Rows:
        return rows_of(w, view, n)

    def _set_more(self, row: list[int], i: int, part: int, view: View) -> None:
        """The fields of a row beyond the penalty's."""

    def programs_of(self, shape: cut.Shape) -> int:
        """How many run at a time. More would do no harm and no good."""
        if self.device.type != "cuda":
            return INTERPRETED
        return shape.per_multiprocessor * torch.cuda.get_device_properties(self.device).multi_processor_count

    # ---- on the device ----

    def stage(self, addresses: bytes) -> Tensor:
        """`addressed`, where the device can copy it from without waiting: pinned. torch keeps it until it was read."""
        filled = self.addressed(addresses)
        if self.device.type != "cuda":
            return filled
        if not capturing(self.device):
            return filled.pin_memory()
        # Pinning may synchronise, which a capture does not allow: one is in store for it.
        staged, self._spare = self._spare, None
        return (torch.empty_like(filled, pin_memory=True) if staged is None else staged).copy_(filled)

    def stock(self) -> None:
        """Outside a capture: what the next one will need."""
        if self._spare is None and self.device.type == "cuda":
            with torch.inference_mode(False):
                self._spare = torch.empty_like(self.template, pin_memory=True)

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator, which else may hand the memory out again while that stream still reads it."""
        for x in (self.tiles, self.gradient_tiles, *self._maps):
            x.record_stream(stream)

    @cached_property
    def host_tiles(self) -> Tensor:
        """(tiles, TILE) int32, in the order of their tickets."""
        return torch.tensor(self.cut.tiles, dtype=torch.int32).view(-1, table.TILE.value)

    @cached_property
    def tiles(self) -> Tensor:
        """The same on the device."""
        return upload(self.host_tiles, self.device)

    @cached_property
    def gradient_tiles(self) -> Tensor:
        """Those that write gradients, which are all that a backward does."""
        kinds = (table.VECTOR_TILE.value, table.GRADIENT_TILE.value)
        tiles = [tile for tile in self.cut.tiles if tile[0] == kinds[0] or tile[0] >= kinds[1]]
        return upload(torch.tensor(tiles, dtype=torch.int32).view(-1, table.TILE.value), self.device)

    def addressed(self, addresses: bytes) -> Tensor:
        """The rows with these addresses, int64: of all weights of the call, then of all gradients, if it has any."""
        # By numpy: on arrays this small an operation of torch costs several times as much.
        rows = self._numbers.copy()
        of_tensors = np.frombuffer(addresses, dtype=np.int64).reshape(len(self._offsets), -1)
        for field, tensors, offsets in zip((table.WEIGHT, table.GRADIENT), of_tensors, self._offsets, strict=False):
            rows[:, field.value] = tensors[self._owners] + offsets
        return torch.from_numpy(rows)

    def _take_sums(self, count: int) -> int:
        self.sums_size += count
        return self.sums_size - count

    def _take_space(self, count: int) -> int:
        self.space_size += count
        return self.space_size - count

    def _set_view(self, row: list[int], view: View, first: int) -> None:
        row[first], row[first + 1] = view.row_stride, view.column_stride
        for offset, mapping in ((2, view.order), (3, view.places)):
            if mapping is not None:
                self._maps.append(upload(mapping, self.device))
                row[first + offset] = self._maps[-1].data_ptr()

    def _set_places(self, row: list[int], part: int, start: Start, share: cut.Share) -> None:
        m, n = row[table.ROWS.value], row[table.COLUMNS.value]
        row[table.PADDED.value] = padded(n)
        row[table.V_AT.value], row[table.U_AT.value] = start.v + part * n, start.u + part * m
        row[table.INDEX.value] = start.number + part
        row[table.PARTIAL_AT.value] = self._take_space(max(share.partials, 1) * padded(n))
        row[table.Z_AT.value] = self._take_space(padded(n))
        row[table.SUMS_AT.value] = self._take_sums(2 * share.blocks)
        row[table.STRIPS.value], row[table.STRIP_ROWS.value] = share.strips, share.strip_rows
        row[table.PARTIALS.value], row[table.BLOCKS.value] = share.partials, share.blocks


def upload(x: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def rows_of(t: Tensor, view: View, n: int) -> cut.Rows:
    aligned = view.divisible and n % 8 == 0 and t.data_ptr() % 16 == 0
    return cut.Rows(view.dense, not view.dense and view.row_stride == 1, aligned)


def useful_programs(tiles: Sequence[tuple[int, int, int, int]]) -> int:
    """No more than may work at a time: the others would ask, again and again, whether they may begin."""
    gradients = sum(what >= table.GRADIENT_TILE.value for what, *_ in tiles)
    reads = sum(table.READ_TILE.value <= what < table.GRADIENT_TILE.value for what, *_ in tiles)
    return max(1, reads, gradients, len(tiles) - reads - gradients)


def padded(n: int) -> int:
    return -(-n // table.PAD) * table.PAD


def float_bits(x: float) -> int:
    """The float64 as the int64 of the same bits."""
    return struct.unpack("<q", struct.pack("<d", x))[0]
