"""How the elements of a parameter lie in memory, read as matrices: what a kernel must know to walk them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_ops.ops.layout import Layout, as_matrices

# Kernels hold places within a row as int32.
MOST_PLACES = 2**31


class View(NamedTuple):
    """parts x rows x columns of one tensor; strides in elements.

    dense: the columns of a row lie side by side, in their own order or in `order`. Otherwise column j lies at
    j * column_stride, or at places[j] where no one stride describes it.
    """

    part_stride: int
    row_stride: int
    column_stride: int
    dense: bool
    order: Tensor | None  # (columns,) int32: which column lies at each place
    places: Tensor | None  # (columns,) int32: where each column lies

    @property
    def divisible(self) -> bool:
        """Whether every row begins a multiple of 8 elements after the first, and is dense."""
        return self.dense and self.row_stride % 8 == 0 and self.part_stride % 8 == 0


def view_of(w: Tensor, layout: Layout) -> View:
    """Raises ValueError where a row of strided elements spans 2^31 or more."""
    whole = as_matrices(w.detach(), layout)
    first = 2 if layout.is_matrix else 1
    part_stride = whole.stride(0)
    row_stride = whole.stride(1) if layout.is_matrix else 0
    dims = [x for x in zip(whole.shape[first:], whole.stride()[first:], strict=True) if x[0] != 1]
    sizes = [size for size, _ in dims]
    # From the one that changes place fastest; dense where each begins where the ones before it end.
    by_stride = sorted(range(len(dims)), key=lambda dim: dims[dim][1])
    if all(dims[dim][1] == math.prod(dims[d][0] for d in by_stride[:i]) for i, dim in enumerate(by_stride)):
        outermost_first = by_stride[::-1]
        if outermost_first == sorted(outermost_first):
            return View(part_stride, row_stride, 1, True, None, None)
        order = torch.arange(math.prod(sizes), dtype=torch.int32).view(sizes).permute(outermost_first).flatten()
        return View(part_stride, row_stride, 1, True, order, None)
    if all(dims[i][1] == dims[i + 1][1] * dims[i + 1][0] for i in range(len(dims) - 1)):
        return View(part_stride, row_stride, dims[-1][1], False, None, None)
    places = torch.zeros(1, dtype=torch.int64)
    for size, stride in dims:
        places = (places[:, None] + torch.arange(size) * stride).flatten()
    if places.numel() and int(places.max()) >= MOST_PLACES:
        raise ValueError(
            f"view_of: expected the elements of a row within 2^31 places, got strides {tuple(whole.stride())}. "
            "Make the weight contiguous."
        )
    return View(part_stride, row_stride, 0, False, None, places.to(torch.int32))
