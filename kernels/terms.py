"""Values and slopes of the terms of R, the gradient's rank-one panels, and vector parameters whole.

    matrix   (s^k - t^k)^2          2 k s^(k-1) (s^k - t^k) u v'
    bias     ||b||^(2k)             2 k ||b||^(2k-2) b
    scale    (|g|^k - t^k)^2        2 k |g|^(k-1) (|g|^k - t^k) sign g
    shift    |s|^(2k)               2 k |s|^(2k-2) s

Bytes: a gradient is read and written once; the backward of the loss form only writes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .strips import load_vector, places_of, rows_of, strip_of
from .table import (
    COLUMNS,
    G_COLUMN,
    G_ORDER,
    G_PLACES,
    G_ROW,
    GRADIENT,
    KIND,
    SCALE,
    TARGET,
    W_COLUMN,
    W_PLACES,
    WEIGHT,
)

# Elements of a vector parameter at a time.
VECTOR_BLOCK = tl.constexpr(512)

# ops/layout.py: Kind
BIAS = tl.constexpr(1)
SCALE_KIND = tl.constexpr(2)


@triton.jit
def float64_field(address):
    return tl.load(address).to(tl.float64, bitcast=True)


@triton.jit
def lowbias32(x):
    """C. Wellons' hash of uint32 numbers, as in ops/power_iteration.py and csrc."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def power(x, k, SQUARE: tl.constexpr):
    """x^k for x >= 0 and k > 0, in float64; NaN stays NaN."""
    if SQUARE:
        return x * x
    else:
        return tl.where(x == 0.0, 0.0, tl.exp2(k * tl.log2(x)))


@triton.jit
def power_less_one(x, k, SQUARE: tl.constexpr):
    """x^(k-1) for x >= 0 and k >= 1; the product it goes into is zero where x is."""
    if SQUARE:
        return x
    else:
        return tl.where(x == 0.0, 0.0, tl.exp2((k - 1.0) * tl.log2(x)))


@triton.jit
def matrix_term(row, sigma, exponent, SQUARE: tl.constexpr):
    """((s^k - t^k)^2, its derivative in s), in float64."""
    gap = power(sigma, exponent, SQUARE) - power(float64_field(row + TARGET), exponent, SQUARE)
    return gap * gap, 2.0 * exponent * power_less_one(sigma, exponent, SQUARE) * gap


@triton.jit
def add_outer(
    row,
    strip,
    left,
    coefficient,
    v,
    DTYPE: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    DENSE: tl.constexpr,
    ALIGNED: tl.constexpr,
    OVERWRITE: tl.constexpr,
):
    """A strip of the gradient (+)= coefficient * left v', in panels of P rows by A columns, rounded once."""
    g, row_stride, n = rows_of(row, GRADIENT, G_ROW, DTYPE, ALIGNED)
    begin, end = strip_of(row, strip)
    column_stride = tl.load(row + G_COLUMN)
    order = tl.load(row + G_ORDER)
    mapping = tl.load(row + G_PLACES)
    for start in tl.range(0, n, A):
        columns = start + tl.arange(0, A)
        in_columns = columns < n
        x = load_vector(v, order, columns, in_columns)
        places = places_of(columns, column_stride, mapping, in_columns, DENSE)
        for first in tl.range(begin, end, P):
            rows = first + tl.arange(0, P)
            in_rows = rows < end
            mask = in_rows[:, None] & in_columns[None, :]
            y = tl.load(left + rows, mask=in_rows, other=0.0)
            added = (y.to(tl.float64) * coefficient).to(tl.float32)[:, None] * x[None, :]  # (P, A)
            at = g + rows.to(tl.int64)[:, None] * row_stride + places[None, :]
            if not OVERWRITE:
                added += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(at, added.to(DTYPE), mask=mask)


@triton.jit
def vector_part(x, mask, kind, exponent, target, SQUARE: tl.constexpr):
    """What elements x (float64, 0 where masked) give to a vector's term: of a bias to ||b||^2. target: t^k."""
    if kind == BIAS:
        part = x * x
    elif kind == SCALE_KIND:
        gap = power(tl.abs(x), exponent, SQUARE) - target
        part = tl.where(mask, gap * gap, 0.0)
    else:
        part = power(x * x, exponent, SQUARE)
    return tl.sum(part, axis=0)


@triton.jit
def vector_slope(x, squares, kind, exponent, target, SQUARE: tl.constexpr):
    """The term's derivative at elements x, in float64; squares: ||b||^2 of a bias."""
    if kind == BIAS:
        slope = power_less_one(squares, exponent, SQUARE) * x
    elif kind == SCALE_KIND:
        size = tl.abs(x)
        slope = power_less_one(size, exponent, SQUARE) * (power(size, exponent, SQUARE) - target)
        slope = tl.where(x < 0.0, -slope, tl.where(x == 0.0, 0.0, slope))
    else:
        slope = power_less_one(x * x, exponent, SQUARE) * x
    return 2.0 * exponent * slope


@triton.jit
def vector_term(
    row,
    exponent,
    factor,
    write,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    SQUARE: tl.constexpr,
    OVERWRITE: tl.constexpr,
):
    """The term of one bias, scale or shift; where it has a gradient and `write`, factor * its slope goes there."""
    w = tl.load(row + WEIGHT).to(tl.pointer_type(W_DTYPE))
    g_address = tl.load(row + GRADIENT)
    g = g_address.to(tl.pointer_type(G_DTYPE))
    n = tl.load(row + COLUMNS).to(tl.int32)
    kind = tl.load(row + KIND).to(tl.int32)
    target = power(float64_field(row + TARGET), exponent, SQUARE)
    scale = float64_field(row + SCALE) * factor
    w_stride = tl.load(row + W_COLUMN)
    g_stride = tl.load(row + G_COLUMN)
    w_places = tl.load(row + W_PLACES)
    g_places = tl.load(row + G_PLACES)
    total = tl.full((), 0.0, tl.float64)  # of a bias ||b||^2, of the others the term
    for start in tl.range(0, n, VECTOR_BLOCK):
        at = start + tl.arange(0, VECTOR_BLOCK)
        mask = at < n
        x = tl.load(w + places_of(at, w_stride, w_places, mask, False), mask=mask, other=0.0).to(tl.float64)
        total += vector_part(x, mask, kind, exponent, target, SQUARE)
    if write & (g_address != 0):
        for start in tl.range(0, n, VECTOR_BLOCK):
            at = start + tl.arange(0, VECTOR_BLOCK)
            mask = at < n
            x = tl.load(w + places_of(at, w_stride, w_places, mask, False), mask=mask, other=0.0).to(tl.float64)
            added = scale * vector_slope(x, total, kind, exponent, target, SQUARE)
            place = g + places_of(at, g_stride, g_places, mask, False)
            if not OVERWRITE:
                added += tl.load(place, mask=mask, other=0.0).to(tl.float64)
            tl.store(place, added.to(tl.float32).to(G_DTYPE), mask=mask)
    if kind == BIAS:
        total = power(total, exponent, SQUARE)
    return total
