"""The matrix zoo, the truth about its matrices in float64, and errors that a NaN cannot pass."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spectral_ops.ops.layout import vector_dtype

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16, F64)
NAMES = {F32: "fp32", BF16: "bf16", F16: "fp16", F64: "fp64"}
SMALLEST = {F32: 2.0**-149, BF16: 2.0**-133, F16: 2.0**-24, F64: 5e-324}  # the smallest subnormal number


# ---- the truth, and errors: all written so that `error <= limit` is false for NaN ----


class Truth(NamedTuple):
    """Of a matrix as rounded to its dtype. An empty matrix has sigma = 0 and no vectors."""

    sigma: float
    values: Tensor
    u: Tensor
    v: Tensor
    frobenius: float
    largest_column: float


def unscaled(w: Tensor) -> tuple[Tensor, Tensor]:
    """(W 2^-p, p) in float64, elements of about 1: the squares of its largest and smallest numbers leave float64."""
    w = w.detach().double()
    power = torch.frexp(w.abs().max()).exponent
    return torch.ldexp(w, -power), power


def svd(w: Tensor) -> Truth:
    """By LAPACK in float64."""
    if w.numel() == 0:
        none = torch.zeros(0, dtype=F64)
        return Truth(0.0, none, none, none, 0.0, 0.0)
    w, power = unscaled(w)
    flat = w.T if w.shape[0] > w.shape[1] else w
    if flat.shape[1] > 4 * flat.shape[0]:
        # Long ones by their Gram matrix: for the largest value and its vectors as good, and much faster.
        values, vectors = torch.linalg.eigh(flat @ flat.T)
        values, short = values.flip(0).clamp(min=0).sqrt(), vectors[:, -1]
        long = flat.T @ short
        long = long / long.norm() if values[0] > 0 else long
        u, v = (long, short) if flat is not w else (short, long)
    else:
        left, values, right = torch.linalg.svd(w, full_matrices=False)
        u, v = left[:, 0], right[0]
    norms = torch.linalg.vector_norm(w), torch.linalg.vector_norm(w, dim=0).max()
    values, frobenius, largest_column = (torch.ldexp(x, power) for x in (values, *norms))
    return Truth(values[0].item(), values, u, v, frobenius.item(), largest_column.item())


def eps(dtype: torch.dtype) -> float:
    """Of the dtype in which sums are taken and vectors are kept."""
    return torch.finfo(vector_dtype(dtype)).eps


def roundings(w: Tensor) -> float:
    """Of a sum over rows: 6, and a random walk over the length, which only 65536 rows show.

    Measured, (s - sigma_1) / (eps sigma_1): at most 3.2 over the zoo up to 150 rows, 29 for 65536 (reference, bf16).
    """
    return 6 + w.shape[0] ** 0.5 / 4


def slack(dtype: torch.dtype, k: float, size: float) -> float:
    """k roundings of a number of this size, which are absolute below the normal numbers."""
    return k * (eps(dtype) * size + SMALLEST[vector_dtype(dtype)])


def error(x: Tensor, truth: Tensor | float) -> float:
    """The largest |x - truth|; NaN if there is one anywhere, inf for shapes that differ."""
    target = torch.as_tensor(truth, dtype=F64)
    if x.shape != target.shape:
        return math.inf
    return (x.detach().double() - target).abs().max().item() if x.numel() else 0.0


def relative_error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth||, or ||x|| where the truth is zero."""
    target = truth.detach().double()
    if x.shape != target.shape:
        return math.inf
    size = torch.linalg.vector_norm(target).item()
    return torch.linalg.vector_norm(x.detach().double() - target).item() / (size or 1.0)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """The same shape, dtype and bit patterns: NaN equals NaN, and 0 is not -0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return torch.equal(x.contiguous().view(kind), y.contiguous().view(kind))


def step_in_float64(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, u and the next v of one step for a matrix (m, n), W v not zero."""
    w, power = unscaled(w)
    y = w @ v.double()
    u = y / y.norm()
    z = w.T @ u
    return torch.ldexp(z.norm(), power), u, z / z.norm()


# ---- building blocks ----


def generator(name: str) -> torch.Generator:
    """The same numbers for a name, whatever ran before."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def gaussian(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(name), dtype=F64)


def with_values(name: str, m: int, n: int, values: Sequence[float]) -> Tensor:
    """Random singular vectors, these singular values."""
    k = len(values)
    u, _ = torch.linalg.qr(gaussian(name + "u", m, k))
    v, _ = torch.linalg.qr(gaussian(name + "v", n, k))
    return (u * torch.tensor(values, dtype=F64)) @ v.T


def unit(name: str, n: int) -> Tensor:
    v = gaussian(name + "start", n)
    return v / v.norm() if n else v


# ---- the zoo ----


@dataclass(frozen=True)
class Case:
    """A matrix by name. `build` is told the dtype it is rounded to; `start` is v where not a random one."""

    name: str
    build: Callable[[torch.dtype], Tensor]
    start: Callable[[int], Tensor] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return _matrix(self, dtype).clone()

    def truth(self, dtype: torch.dtype) -> Truth:
        """Of the matrix as rounded to dtype."""
        return _truth(self, dtype)

    def v(self, dtype: torch.dtype) -> Tensor:
        n = _matrix(self, dtype).shape[1]
        return (unit(self.name, n) if self.start is None else self.start(n)).to(vector_dtype(dtype))


@functools.cache
def _matrix(case: Case, dtype: torch.dtype) -> Tensor:
    return case.build(dtype).to(dtype)


@functools.cache
def _truth(case: Case, dtype: torch.dtype) -> Truth:
    return svd(_matrix(case, dtype))


def _kahan(n: int, angle: float = 1.2) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    upper = torch.eye(n, dtype=F64) - c * torch.triu(torch.ones(n, n, dtype=F64), diagonal=1)
    return torch.diag(s ** torch.arange(n, dtype=F64)) @ upper


def _frank(n: int) -> Tensor:
    i, j = torch.arange(1, n + 1)[:, None], torch.arange(1, n + 1)[None, :]
    return torch.where(j >= i - 1, n + 1 - torch.maximum(i, j), 0).double()


def _hilbert(n: int) -> Tensor:
    i = torch.arange(n, dtype=F64)
    return 1 / (i[:, None] + i[None, :] + 1)


def _signed_permutation(name: str, n: int) -> Tensor:
    order = torch.randperm(n, generator=generator(name))
    return torch.eye(n, dtype=F64)[order] * gaussian(name, n).sign()


def _constant(n: int) -> Tensor:
    return torch.full((n,), n**-0.5, dtype=F64)


def _first_axis(n: int) -> Tensor:
    return torch.eye(1, n, dtype=F64)[0]


def _largest_diagonal(dtype: torch.dtype) -> Tensor:
    """sigma_1 is the largest number of the dtype."""
    top = torch.finfo(dtype).max
    values = torch.tensor([top, -top / 2, top / 4, 1.0, 0.0], dtype=F64)
    return values[:, None] * _signed_permutation("largest", 5)


def _largest_dense(dtype: torch.dtype) -> Tensor:
    """Rank one, all elements of one size; sigma_1 is 0.9 of the largest number, so that rounding it stays finite."""
    signs = gaussian("largest_dense", 8).sign()
    return 0.9 * torch.finfo(dtype).max / 8 * signs[:, None] * signs.roll(3)


def _subnormal(dtype: torch.dtype) -> Tensor:
    return SMALLEST[dtype] * torch.randint(-9, 10, (7, 6), generator=generator("subnormal")).double()


def _centred(m: int, n: int) -> Tensor:
    """Rows of small integers that sum to zero."""
    w = torch.randint(-8, 9, (m, n - 1), generator=generator(f"centred{n}")).double()
    return torch.cat([w, -w.sum(dim=1, keepdim=True)], dim=1)


def _fixed(w: Tensor) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: w


def _skew(w: Tensor) -> Tensor:
    return w - w.T


def _orthogonal_to_axis(m: int, n: int) -> Tensor:
    w = gaussian("orthogonal_to_axis", m, n)
    w[:, 0] = 0
    return w


WIDE_RANGE = (F32, BF16, F64)  # fp16 holds neither 1e18 nor 1e-18

ZOO = [
    Case("zero", _fixed(torch.zeros(5, 7, dtype=F64))),
    Case("one_by_one", _fixed(torch.full((1, 1), -3.0, dtype=F64))),
    Case("one_row", _fixed(gaussian("one_row", 1, 37))),
    Case("one_column", _fixed(gaussian("one_column", 41, 1))),
    Case("no_rows", _fixed(torch.zeros(0, 7, dtype=F64))),
    Case("no_columns", _fixed(torch.zeros(7, 0, dtype=F64))),
    Case("rank_one", _fixed(with_values("rank_one", 12, 9, [2.5]))),
    Case("repeated_top", _fixed(with_values("repeated_top", 16, 12, [2, 2, 2, 1.5, 1, 0.5]))),
    Case("gap_1e-6", _fixed(with_values("gap", 20, 16, [1, 1 - 1e-6, 0.9, 0.5, 0.1]))),
    Case("clustered_top", _fixed(with_values("clustered", 24, 24, [1 - 1e-3 * i for i in range(8)] + [0.3]))),
    Case("graded", _fixed(with_values("graded", 30, 20, [10.0**-i for i in range(13)]))),
    Case("gaussian", _fixed(gaussian("gaussian", 70, 50))),
    Case("strips", _fixed(gaussian("strips", 150, 1100))),  # native: several strips of rows
    Case("tall", _fixed(gaussian("tall", 65536, 3))),
    Case("wide", _fixed(gaussian("wide", 3, 65536))),  # native: columns combined in blocks
    Case("hilbert", _fixed(_hilbert(12))),
    Case("kahan", _fixed(_kahan(20))),
    Case("frank", _fixed(_frank(12))),
    Case("jordan", _fixed(0.5 * torch.eye(16, dtype=F64) + torch.diag(torch.ones(15, dtype=F64), 1))),
    Case("orthogonal", _fixed(torch.linalg.qr(gaussian("orthogonal", 16, 16))[0])),
    Case("skew", _fixed(_skew(gaussian("skew", 15, 15)))),
    Case("start_orthogonal", _fixed(_orthogonal_to_axis(9, 10)), start=_first_axis),  # W v = 0
    Case("centred", _fixed(_centred(20, 16)), start=_constant),  # W v = 0 exactly: v is 1/4 everywhere
    Case("centred_inexact", _fixed(_centred(20, 12)), start=_constant),  # W v is rounding and nothing else
    Case("scale_1e18", _fixed(1e18 * gaussian("scale_1e18", 20, 30)), dtypes=WIDE_RANGE),
    Case("scale_1e9", _fixed(1e9 * gaussian("scale_1e9", 20, 30)), dtypes=WIDE_RANGE),
    Case("scale_1e4", _fixed(1e4 * gaussian("scale_1e4", 20, 30))),
    Case("scale_1e-4", _fixed(1e-4 * gaussian("scale_1e-4", 20, 30))),
    Case("scale_1e-9", _fixed(1e-9 * gaussian("scale_1e-9", 20, 30)), dtypes=WIDE_RANGE),
    Case("scale_1e-18", _fixed(1e-18 * gaussian("scale_1e-18", 20, 30)), dtypes=WIDE_RANGE),
    Case(
        "rows_1e-18_to_1e18",
        _fixed(10.0 ** torch.arange(-18, 19, 2, dtype=F64)[:, None] * gaussian("rows", 19, 8)),
        dtypes=WIDE_RANGE,
    ),
    Case("largest_diagonal", _largest_diagonal),
    Case("largest_dense", _largest_dense),
    Case("smallest_normal", lambda dtype: torch.finfo(dtype).tiny * (1 + gaussian("tiny", 11, 9).abs())),
    Case("subnormal", _subnormal),
]

# Where there is a largest singular value above zero: properties that divide by it.
EMPTY = ("no_rows", "no_columns")
WITHOUT_SIGMA = ("zero", *EMPTY)
# The first step reads W v = 0 (up to rounding), and says nothing of sigma_1.
BLIND = ("start_orthogonal", "centred", "centred_inexact")


def zoo(
    *, without: Collection[str] = (), only: Collection[str] = (), dtypes: Sequence[torch.dtype] = DTYPES
) -> list[Any]:
    """(case, dtype) as parameters for pytest."""
    known = {case.name for case in ZOO}
    assert set(without) <= known and set(only) <= known, "a case that does not exist"
    return [
        pytest.param(case, dtype, id=f"{case.name}-{NAMES[dtype]}")
        for case in ZOO
        for dtype in dtypes
        if dtype in case.dtypes and case.name not in without and (not only or case.name in only)
    ]
