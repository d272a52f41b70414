"""What the step of sharded weights adds around its all-reduce, one program per matrix.

    pack      ||y|| = s (v . v+), z = ||y|| s v+ of this rank's rows, in units of 2^exponent, into what is summed
    finish    of the sums: sigma = ||z|| / ||y||, v = z / ||z||, this rank's u = y / ||y||, the term of R

s, u, v+ are what kernels/penalty.py gives for the shard. Bytes: 40 of every column and 8 of every row here, thousandths
of what the weights have. The plain form is spectral_ops/sharding/read.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .combine import VECTOR, write_another_unit_vector
from .launch import launch
from .terms import power

WARPS = 4

# Of a matrix in `matrices`, int64.
FIELDS = tl.constexpr(7)
V_AT = tl.constexpr(0)
COLUMNS = tl.constexpr(1)
U_AT = tl.constexpr(2)
ROWS = tl.constexpr(3)  # on this rank
Z_COUNTS = tl.constexpr(4)  # whether this rank's z enters the sum: of what several ranks hold, one speaks
Y_COUNTS = tl.constexpr(5)
IS_EMPTY = tl.constexpr(6)  # on all ranks together: counts for nothing

LARGEST64 = tl.constexpr(1.7976931348623157e308)


class Sums(NamedTuple):
    """Of all matrices: what goes into the all-reduce and comes out of it, and this rank's ||y||; float64."""

    z: Any
    squares: Any  # ||y||^2
    y_norms: Any  # of this rank's rows


class Vectors(NamedTuple):
    """Flat over all matrices; u over this rank's rows."""

    v: Any  # float32
    exponents: Any  # int32
    sigma: Any
    u: Any


@triton.jit
def power_of_two(exponent):
    """2^exponent in float64, for |exponent| < 1023."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _pack_kernel(matrices, v, exponents, local_sigma, local_v, z, squares, y_norms):
    i = tl.program_id(0).to(tl.int64)
    row = matrices + i * FIELDS
    at, n = tl.load(row + V_AT), tl.load(row + COLUMNS).to(tl.int32)
    sigma = tl.load(local_sigma + i).to(tl.float64)
    unit = power_of_two(-tl.load(exponents + i))
    cosine = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, n, VECTOR):
        columns = start + tl.arange(0, VECTOR)
        mask = columns < n
        old = tl.load(v + at + columns, mask=mask, other=0.0).to(tl.float64)
        new = tl.load(local_v + at + columns, mask=mask, other=0.0).to(tl.float64)
        cosine += tl.sum(old * new, axis=0)
    y_norm = tl.abs(sigma * cosine) * unit  # by rounding it may be negative
    tl.store(y_norms + i, y_norm)
    tl.store(squares + i, tl.where(tl.load(row + Y_COUNTS) != 0, y_norm * y_norm, 0.0))
    factor = tl.where(tl.load(row + Z_COUNTS) != 0, y_norm * (sigma * unit), 0.0)
    for start in tl.range(0, n, VECTOR):
        columns = start + tl.arange(0, VECTOR)
        mask = columns < n
        new = tl.load(local_v + at + columns, mask=mask, other=0.0).to(tl.float64)
        tl.store(z + at + columns, new * factor, mask=mask)


@triton.jit
def _finish_kernel(
    matrices, z, squares, y_norms, targets, scales, exponent_at, v, exponents, sigma, u, local_u, terms, found_inf,
    SQUARE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = matrices + i * FIELDS
    at, n = tl.load(row + V_AT), tl.load(row + COLUMNS).to(tl.int32)
    old_exponent = tl.load(exponents + i)
    y = tl.sqrt(tl.load(squares + i))
    seen = y > 0.0
    inverse = 1.0 / tl.where(seen, y, 1.0)
    sums = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, n, VECTOR):
        columns = start + tl.arange(0, VECTOR)
        x = tl.load(z + at + columns, mask=columns < n, other=0.0) * inverse
        sums += tl.sum(x * x, axis=0)
    scaled = tl.sqrt(sums)
    finite = (y <= LARGEST64) & (scaled <= LARGEST64)
    live = seen & (scaled > 0.0)
    s = tl.where(finite, tl.where(live, scaled * power_of_two(old_exponent), 0.0), float("nan")).to(tl.float32)
    exponent = tl.load(exponent_at)
    gap = power(s.to(tl.float64), exponent, SQUARE) - power(tl.load(targets + i), exponent, SQUARE)
    is_empty = tl.load(row + IS_EMPTY) != 0
    tl.store(terms + i, tl.where(is_empty, 0.0, tl.load(scales + i) * gap * gap))
    keep = False
    if found_inf is not None:
        keep = tl.load(found_inf) != 0.0
    if not keep:
        tl.store(sigma + i, s)
        known = finite & live
        bits = s.to(tl.int32, bitcast=True)
        # A subnormal sigma counts as the smallest normal one: the exponent is a guess of the range, no more.
        tl.store(exponents + i, tl.where(known, ((bits >> 23) & 255) - 127, old_exponent))
        if known:
            factor = inverse / scaled
            for start in tl.range(0, n, VECTOR):
                columns = start + tl.arange(0, VECTOR)
                mask = columns < n
                x = tl.load(z + at + columns, mask=mask, other=0.0) * factor
                tl.store(v + at + columns, x.to(tl.float32), mask=mask)
        elif finite & (not is_empty):
            write_another_unit_vector(v + at, v + at, n)
        share = tl.where(finite, tl.where(live, tl.load(y_norms + i) * inverse, 0.0), float("nan"))
        here, count = tl.load(row + U_AT), tl.load(row + ROWS).to(tl.int32)
        for start in tl.range(0, count, VECTOR):
            rows = start + tl.arange(0, VECTOR)
            mask = rows < count
            x = tl.load(local_u + here + rows, mask=mask, other=0.0).to(tl.float64) * share
            tl.store(u + here + rows, x.to(tl.float32), mask=mask)


def launch_pack(matrices: Any, v: Any, exponents: Any, local_sigma: Any, local_v: Any, sums: Sums) -> None:
    """This rank's share of the sums, from what the read of its shard with v gave."""
    launch(
        _pack_kernel, matrices.shape[0], matrices, v, exponents, local_sigma, local_v, *sums, num_warps=WARPS
    )


def launch_finish(
    matrices: Any, sums: Sums, targets: Any, scales: Any, exponent_at: Any, vectors: Vectors, local_u: Any, terms: Any,
    found_inf: Any, square: bool,
) -> None:  # fmt: skip
    """The next vectors, in place, from the sums over all ranks; where found_inf is not 0, none of them."""
    launch(
        _finish_kernel, matrices.shape[0], matrices, *sums, targets, scales, exponent_at, *vectors, local_u, terms,
        found_inf, SQUARE=square, num_warps=WARPS,
    )  # fmt: skip
