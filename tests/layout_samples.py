"""Parameters in every layout, cut into matrices by code that shares nothing with the package's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import DTYPES, F64, NAMES, gaussian, step_in_float64, unit
from torch import Tensor

from spectral_ops.ops.layout import Kind, Layout, vector_dtype


@dataclass(frozen=True)
class Sample:
    """A parameter and how it is read. `place` puts a dense tensor of `shape` where a trainer may have it in memory."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    cut: Callable[[Tensor], Sequence[Tensor]] | None = (
        None  # into matrices (m, n); None: one matrix (shape[0], the rest)
    )
    place: Callable[[Tensor], Tensor] = torch.Tensor.clone
    overlaps: bool = False  # elements share memory: good for a weight, not for a gradient

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return self.place((0.3 * gaussian(self.name, *self.shape)).to(dtype))

    def matrices(self, w: Tensor) -> list[Tensor]:
        return [w.flatten(1)] if self.cut is None else list(self.cut(w))

    def vectors(self, dtype: torch.dtype) -> list[Tensor]:
        """One unit vector for every matrix."""
        shapes = [matrix.shape for matrix in self.matrices(self.tensor(dtype))]
        return [unit(f"{self.name}{i}", n).to(vector_dtype(dtype)) for i, (_, n) in enumerate(shapes)]


def transposed(w: Tensor) -> Tensor:
    """The same values, the first dimension innermost."""
    return w.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_last(w: Tensor) -> Tensor:
    return w.clone(memory_format=torch.channels_last)


def spread(w: Tensor) -> Tensor:
    """Every other column of a tensor whose other elements are NaN: one that is read, or written over, shows."""
    store = w.new_full((*w.shape[:-1], 2 * w.shape[-1] + 1), math.nan)
    store[..., 1::2] = w
    return store[..., 1::2]


def window(w: Tensor) -> Tensor:
    """Rows with a gap of NaN between them, starting at an odd address."""
    store = w.new_full((*w.shape[:-1], w.shape[-1] + 3), math.nan)
    store[..., 1:-2] = w
    return store[..., 1:-2]


def _groups(count: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda w: [part.flatten(1) for part in w.chunk(count)]


def _transposed_groups(count: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda w: [part.transpose(0, 1).flatten(1) for part in w.chunk(count)]


MATRIX = Kind.MATRIX
SAMPLES = [
    Sample("linear", (9, 7), Layout()),
    Sample("strips", (150, 1100), Layout()),
    Sample("column_blocks", (5, 9001), Layout()),
    Sample("transposed", (9, 7), Layout(), place=transposed),
    Sample("transposed_strips", (200, 700), Layout(), place=transposed),
    Sample("window", (9, 35), Layout(), place=window),
    Sample("spread_columns", (21, 35), Layout(), place=spread),
    Sample("expanded_rows", (1, 7), Layout(), place=lambda w: w.expand(9, 7), overlaps=True),
    Sample("expanded_columns", (9, 1), Layout(), place=lambda w: w.expand(9, 7), overlaps=True),
    Sample("overlapping_rows", (1, 30), Layout(), place=lambda w: w.as_strided((11, 9), (2, 1)), overlaps=True),
    Sample("conv", (8, 6, 3, 3), Layout()),
    Sample("conv_groups", (8, 6, 3, 3), Layout(MATRIX, 4), _groups(4)),
    Sample("conv_channels_last", (8, 6, 3, 3), Layout(), place=channels_last),
    Sample("conv_groups_channels_last", (8, 6, 3, 3), Layout(MATRIX, 4), _groups(4), channels_last),
    Sample("conv_channels_last_strips", (300, 40, 3, 3), Layout(), place=channels_last),
    Sample("conv_rows_innermost", (8, 6, 3, 3), Layout(), place=transposed),
    Sample("depthwise", (16, 1, 3, 3), Layout(MATRIX, 16), _groups(16)),
    Sample("depthwise_many", (700, 1, 3, 3), Layout(MATRIX, 700), _groups(700)),  # native: several parts a tile
    Sample("transposed_conv", (6, 4, 3, 2), Layout(MATRIX, 1, 0, 1), _transposed_groups(1)),
    Sample("transposed_conv_groups", (6, 4, 3, 2), Layout(MATRIX, 2, 0, 1), _transposed_groups(2)),
    Sample(
        "transposed_conv_channels_last", (6, 4, 3, 2), Layout(MATRIX, 2, 0, 1), _transposed_groups(2), channels_last
    ),
    Sample("packed_rows", (12, 5), Layout(MATRIX, 3), lambda w: w.chunk(3)),
    Sample("packed_rows_transposed", (12, 5), Layout(MATRIX, 3), lambda w: w.chunk(3), transposed),
    Sample("packed_columns", (5, 12), Layout(MATRIX, 3, 1, 1), lambda w: [part.T for part in w.chunk(3, dim=1)]),
    Sample("packed_columns_of_rows", (5, 12), Layout(MATRIX, 3, 1, 0), lambda w: w.chunk(3, dim=1)),
    Sample("stack", (4, 6, 5), Layout(MATRIX, 4, 0, 1), lambda w: w.unbind(0)),
    Sample(
        "stack_transposed", (4, 6, 5), Layout(MATRIX, 4, 0, 1), lambda w: w.unbind(0), lambda w: w.mT.contiguous().mT
    ),
    Sample("no_rows", (0, 5), Layout()),
    Sample("no_columns", (5, 0), Layout()),
]


def samples(*, without_overlap: bool = False, dtypes: Sequence[torch.dtype] = DTYPES) -> list[Any]:
    """(sample, dtype) as parameters for pytest."""
    return [
        pytest.param(sample, dtype, id=f"{sample.name}-{NAMES[dtype]}")
        for sample in SAMPLES
        for dtype in dtypes
        if not (without_overlap and sample.overlaps)
    ]


def penalty_in_float64(
    matrices: Sequence[Tensor], vectors: Sequence[Tensor], exponent: float, target: float
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """R, differentiable at fixed u; sigmas; the next vectors. Matrices in float64."""
    total, sigmas, after = torch.zeros((), dtype=F64), [], []
    for w, v in zip(matrices, vectors, strict=True):
        if w.numel() == 0:
            sigmas.append(torch.zeros((), dtype=F64))
            after.append(v.double())
            continue
        _, u, v_new = step_in_float64(w, v)
        sigma = torch.linalg.vector_norm(w.T @ u)
        total = total + (sigma**exponent - target**exponent) ** 2
        sigmas.append(sigma.detach())
        after.append(v_new)
    return total, sigmas, after


def vector_penalty_in_float64(x: Tensor, kind: Kind, parts: int, exponent: float, target: float) -> Tensor:
    """The terms of a vector parameter, cut into parts along its first dimension; differentiable."""
    total = torch.zeros((), dtype=F64)
    for part in x.chunk(parts):
        if kind == Kind.BIAS:
            total = total + torch.linalg.vector_norm(part) ** (2 * exponent)
        elif kind == Kind.SCALE:
            total = total + ((part.abs() ** exponent - target**exponent) ** 2).sum()
        else:
            total = total + (part.abs() ** (2 * exponent)).sum()
    return total
