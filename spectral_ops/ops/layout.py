"""How a parameter is read as matrices: the small vocabulary shared by the rules, the ops and the C++ table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_ops.ops.conv_operator import ConvOperator, unpack_operator


class Kind(IntEnum):
    """What a parameter is to the penalty. The numbers are the ones csrc/table.h uses."""

    MATRIX = 0  # (sigma_1(W)^k - t^k)^2 for each part
    BIAS = 1  # ||b||_2^(2k) for each part
    SCALE = 2  # sum_i (|g_i|^k - t^k)^2
    SHIFT = 3  # sum_i |s_i|^(2k)
    PLAIN = 4  # no term: what an optimizer step updates and nothing else


class Layout(NamedTuple):
    """One parameter read as `parts` matrices (or vectors): cut `split_dim` into `parts`, rows along `row_dim`.

    Linear and conv: (MATRIX, groups, 0, 0). Transposed conv, read output-first: (MATRIX, groups, 0, 1).
    Attention's in_proj_weight: (MATRIX, 3, 0, 0). GPT-2's packed Conv1D: (MATRIX, 3, 1, 1).
    A stack (S, m, n): (MATRIX, S, 0, 1).
    With an operator, a conv weight is no matrix but that linear map, one for every group.
    """

    kind: Kind = Kind.MATRIX
    parts: int = 1
    split_dim: int = 0
    row_dim: int = 0
    operator: ConvOperator | None = None

    @property
    def is_matrix(self) -> bool:
        return self.kind == Kind.MATRIX


def as_matrices(w: Tensor, layout: Layout) -> Tensor:
    """The parameter as a view of shape (parts, m, *columns); a vector as (parts, *n). Never copies."""
    dim = layout.split_dim
    if layout.kind == Kind.PLAIN and w.ndim == 0:
        return w.view(1, 1)
    # Not unflatten(-1): the size is ambiguous where a dimension is 0.
    w = w.unflatten(dim, (layout.parts, w.shape[dim] // layout.parts)).movedim(dim, 0)
    return w.movedim(layout.row_dim + 1, 1) if layout.is_matrix else w


class Sizes(NamedTuple):
    """(parts, m, n) of a parameter read as matrices; of a vector m = 1; of an operator its outputs and inputs."""

    parts: int
    m: int
    n: int


def sizes(shape: Sequence[int], layout: Layout) -> Sizes:
    if not layout.is_matrix:
        return Sizes(layout.parts, 1, math.prod(shape) // layout.parts)
    if layout.operator is not None:
        first, second = shape[0] // layout.parts, shape[1]  # channels of a group
        rows, columns = (second, first) if layout.operator.transposed else (first, second)
        output = layout.operator.output_size(shape[2:])
        return Sizes(layout.parts, rows * math.prod(output), columns * math.prod(layout.operator.input_size))
    rest = [size for dim, size in enumerate(shape) if dim not in (layout.split_dim, layout.row_dim)]
    m, split = shape[layout.row_dim], shape[layout.split_dim] // layout.parts
    if layout.row_dim == layout.split_dim:
        return Sizes(layout.parts, split, math.prod(rest))
    return Sizes(layout.parts, m, math.prod(rest) * split)


class Start(NamedTuple):
    """Where a parameter's first matrix lies in the flat v and u, and its number in sigma and exponents."""

    v: int
    u: int
    number: int


def starts(shapes: Sequence[Sequence[int]], layouts: Sequence[Layout]) -> list[Start]:
    """Of every parameter, vectors too, which take no place; and one more: where the last one ends."""
    out = [Start(0, 0, 0)]
    for shape, layout in zip(shapes, layouts, strict=True):
        parts, m, n = sizes(shape, layout) if layout.is_matrix else (0, 0, 0)
        at = out[-1]
        out.append(Start(at.v + parts * n, at.u + parts * m, at.number + parts))
    return out


def pack(layouts: Sequence[Layout]) -> str:
    """Layouts as the text that registered ops take: "kind parts split_dim row_dim" of each, with an operator followed
    by "|" and its numbers, one layout's behind the other's with ";" between.

    Text, since every int of a list is turned into an object and back at each call: 20 conv layers hold 380.
    """
    return ";".join(_pack(layout) for layout in layouts)


def _pack(layout: Layout) -> str:
    text = f"{int(layout.kind)} {layout.parts} {layout.split_dim} {layout.row_dim}"
    return text if layout.operator is None else f"{text}|{layout.operator.pack()}"


def unpack(packed: str) -> list[Layout]:
    return [_unpack(text) for text in packed.split(";")] if packed else []


def _unpack(text: str) -> Layout:
    layout, _, operator = text.partition("|")
    kind, parts, split_dim, row_dim = map(int, layout.split())
    return Layout(Kind(kind), parts, split_dim, row_dim, unpack_operator(operator) if operator else None)


def has_operators(packed: str) -> bool:
    """Whether packed layouts are of operators: a list holds these or matrices and vectors, for kernels differ."""
    return "|" in packed


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of vectors, sums and sigma: float64 for float64 weights, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
