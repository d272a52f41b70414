"""z of a matrix from its strips' shares, and the end of its step: sigma, u, the next v, the gradient's coefficient.

    s = ||z|| / ||y||        u = y / ||y||        v+ = z / ||z||

Bytes: strips x n partial sums, most of them still in L2, and vectors. Norms and what follows are scalars in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .strips import LARGEST_FLOAT32, largest_element, partial_of, read_two_sweeps, shifts
from .table import (
    BLOCKS,
    COEFFICIENT,
    COLUMNS,
    INDEX,
    PADDED,
    ROWS,
    SCALE,
    STRIDED,
    STRIPS,
    SUMS_AT,
    TERM,
    TERM_AT,
    U_AT,
    V_AT,
    W_ORDER,
    Y_NORM,
    Z_AT,
    Z_NORM,
)
from .terms import float64_field, lowbias32, matrix_term

# Partial sums are taken SUM_PARTIALS by COMBINE_COLUMNS at a time, and other long vectors VECTOR elements at a time.
COMBINE_COLUMNS = 512
SUM_PARTIALS = 16
VECTOR = tl.constexpr(512)
BLOCK_COLUMNS = tl.constexpr(COMBINE_COLUMNS)
BLOCK_PARTIALS = tl.constexpr(SUM_PARTIALS)
MOST_BLOCKS = tl.constexpr(64)  # norms of blocks summed at a time

# Panels of the second reading, where speed does not matter but registers do.
SLOW_P = tl.constexpr(4)
SLOW_A = tl.constexpr(256)

# Norms are taken in float64. Below LEAST an element that still matters to 2^-24 of a norm would be subnormal, above
# MOST float32 sums may overflow. As csrc's.
LEAST = tl.constexpr(2.0**-80)
MOST = tl.constexpr(2.0**120)


@triton.jit
def combine(row, block, partials, space, sums, FIXED_ORDER: tl.constexpr):
    """One block of columns of z, summed over its shares in their order, and its part of ||z||^2 and ||y||^2."""
    # Up to a multiple of 8, so that loads are vectors: nothing is ever written behind the columns, there are zeros.
    padded = tl.multiple_of(tl.load(row + PADDED).to(tl.int32), 8)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_columns = columns < padded
    partial = partial_of(row, 0, space, False)
    z = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if FIXED_ORDER:
        for first in tl.range(0, partials, BLOCK_PARTIALS):
            share = first + tl.arange(0, BLOCK_PARTIALS)
            at = partial + share.to(tl.int64)[:, None] * padded + columns[None, :]
            mask = (share < partials)[:, None] & in_columns[None, :]
            z += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
    else:
        z = tl.load(partial + columns, mask=in_columns, other=0.0)
        tl.store(partial + columns, tl.zeros((BLOCK_COLUMNS,), tl.float32), mask=in_columns)  # for the next step
    tl.store(space + tl.load(row + Z_AT) + columns, z, mask=in_columns)
    wide = z.to(tl.float64)
    at = sums + tl.load(row + SUMS_AT) + 2 * block
    tl.store(at, tl.sum(wide * wide, axis=0))
    # Rows are shared out among the blocks as columns are.
    m = tl.load(row + ROWS).to(tl.int32)
    count = tl.cdiv(m, tl.load(row + BLOCKS).to(tl.int32))
    begin = block * count
    end = tl.minimum(begin + count, m)
    y_at = space + tl.load(row + U_AT)
    total = tl.full((), 0.0, tl.float64)
    for first in tl.range(begin, end, VECTOR):
        rows = first + tl.arange(0, VECTOR)
        y = tl.load(y_at + rows, mask=rows < end, other=0.0).to(tl.float64)
        total += tl.sum(y * y, axis=0)
    tl.store(at + 1, total)


@triton.jit
def norms(row, sums):
    """(||z||, ||y||) from the blocks' shares, in their order."""
    blocks = tl.load(row + BLOCKS).to(tl.int32)
    at = sums + tl.load(row + SUMS_AT)
    z = tl.full((), 0.0, tl.float64)
    y = tl.full((), 0.0, tl.float64)
    for first in tl.range(0, blocks, MOST_BLOCKS):
        block = first + tl.arange(0, MOST_BLOCKS)
        z += tl.sum(tl.load(at + 2 * block, mask=block < blocks, other=0.0), axis=0)
        y += tl.sum(tl.load(at + 2 * block + 1, mask=block < blocks, other=0.0), axis=0)
    return tl.sqrt(z), tl.sqrt(y)


@triton.jit
def floor_log2(x):
    """floor(log2 x) of a positive normal float64."""
    return (((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023).to(tl.int32)


@triton.jit
def hashed(columns, seed):
    """In [-1, 1): a hash of the column and of v[0], as in ops/power_iteration.py and csrc."""
    x = lowbias32(columns.to(tl.uint32) * 0x9E3779B9 + seed)
    return (x >> 8).to(tl.float32) * 1.1920928955078125e-07 - 1.0


@triton.jit
def write_another(row, v, v_out):
    """The fixed unit vector that replaces v where W v = 0. v may be v_out."""
    at = tl.load(row + V_AT)
    write_another_unit_vector(v + at, v_out + at, tl.load(row + COLUMNS).to(tl.int32))


@triton.jit
def write_another_unit_vector(v, v_out, n):
    """The same of a vector of n elements."""
    first_element = tl.load(v)
    tl.debug_barrier()  # every thread has it before one overwrites it
    if n == 1:
        tl.store(v_out, -first_element)
    else:
        seed = first_element.to(tl.uint32, bitcast=True)
        squares = tl.full((), 0.0, tl.float64)
        for start in tl.range(0, n, VECTOR):
            columns = start + tl.arange(0, VECTOR)
            x = tl.where(columns < n, hashed(columns, seed), 0.0).to(tl.float64)
            squares += tl.sum(x * x, axis=0)
        inverse = 1.0 / tl.sqrt(squares)
        for start in tl.range(0, n, VECTOR):
            columns = start + tl.arange(0, VECTOR)
            x = hashed(columns, seed).to(tl.float64) * inverse
            tl.store(v_out + columns, x.to(tl.float32), mask=columns < n)


@triton.jit
def read_again(row, v, space, sums, shift_v, shift_y, W_DTYPE: tl.constexpr, FIXED_ORDER: tl.constexpr):
    """The whole matrix once more, by this program alone, with other powers of two."""
    at = v + tl.load(row + V_AT)
    strips = tl.load(row + STRIPS).to(tl.int32)
    for strip in tl.range(0, strips):
        read_two_sweeps(
            row, strip, at, space, shift_v, shift_y, W_DTYPE, STRIDED, SLOW_A, SLOW_P, False, FIXED_ORDER
        )
    tl.debug_barrier()
    for block in tl.range(0, tl.load(row + BLOCKS).to(tl.int32)):
        combine(row, block, strips, space, sums, FIXED_ORDER)  # one share from each strip, here
    tl.debug_barrier()


@triton.jit
def renew(row, v, exponents, space, sums, W_DTYPE: tl.constexpr, FIXED_ORDER: tl.constexpr):
    """The sums once more where they left their range: (the power of two of y, how many elements are not finite)."""
    m = tl.load(row + ROWS).to(tl.int32)
    n = tl.load(row + COLUMNS).to(tl.int32)
    shift_v, shift_y = shifts(tl.load(exponents + tl.load(row + INDEX)))
    bad = tl.full((), 0, tl.int32)
    z_norm, y_norm = norms(row, sums)
    in_range = (y_norm > LEAST) & (z_norm > LEAST) & (y_norm < MOST) & (z_norm < MOST)  # false for NaN
    if (not in_range) & (m > 0) & (n > 0):
        # The exponent is out of date by more than the range allows (or never was known): from max |W|, and once more.
        largest, bad = largest_element(row, W_DTYPE, SLOW_P, SLOW_A)
        if (bad == 0) & (largest > 0.0):
            sides = (floor_log2(m.to(tl.float64)) + floor_log2(n.to(tl.float64))) // 4
            shift_v, shift_y = shifts(floor_log2(largest.to(tl.float64)) + sides)
            read_again(row, v, space, sums, shift_v, shift_y, W_DTYPE, FIXED_ORDER)
    return shift_y, bad


@triton.jit
def finish(
    row,
    v,
    v_out,
    exponents,
    exponents_out,
    sigma_out,
    u_out,
    sigma_state,
    space,
    sums,
    exponent,
    factor,
    keep,
    shift_y,
    bad,
    SQUARE: tl.constexpr,
):
    """The end of a matrix's step, by the program that combined its last block. `keep`: no state is written.

    sigma_state: where there is one, sigma goes there too, and the next v into v as well as v_out.
    """
    m = tl.load(row + ROWS).to(tl.int32)
    n = tl.load(row + COLUMNS).to(tl.int32)
    index = tl.load(row + INDEX)
    v_at = tl.load(row + V_AT)
    y_at = space + tl.load(row + U_AT)
    e = tl.load(exponents + index)
    z_norm, y_norm = norms(row, sums)
    empty = (m == 0) | (n == 0)
    zero = (not empty) & (bad == 0) & ((y_norm == 0.0) | (z_norm == 0.0))
    nothing = zero | empty
    unscale = tl.exp2(-shift_y.to(tl.float64))
    sigma = tl.where(nothing, 0.0, z_norm / tl.where(nothing, 1.0, y_norm) * unscale)
    inverse_y = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, y_norm))
    if bad > 0:
        sigma = sigma * 0.0 + float("nan")
        inverse_y = inverse_y * 0.0 + float("nan")
    term, slope = matrix_term(row, sigma, exponent, SQUARE)
    scale = float64_field(row + SCALE)
    term_at = sums + tl.load(row + TERM_AT)
    tl.store(term_at + COEFFICIENT, tl.where(sigma == 0.0, 0.0, factor * scale * slope * inverse_y))
    tl.store(term_at + TERM, tl.where(empty, 0.0, term))
    unscale_v = tl.exp2(-tl.maximum(shift_y, -100).to(tl.float64))  # of v: strips.py, shifts
    tl.store(term_at + Y_NORM, tl.where(nothing, 0.0, y_norm * unscale_v))
    tl.store(term_at + Z_NORM, tl.where(nothing, 0.0, z_norm * unscale_v * unscale) + sigma * 0.0)  # NaN where sigma is
    if not keep:
        tl.store(sigma_out + index, sigma.to(tl.float32))
        if sigma_state is not None:
            tl.store(sigma_state + index, sigma.to(tl.float32))
        known = (sigma > 0.0) & (sigma <= LARGEST_FLOAT32)
        tl.store(exponents_out + index, tl.where(known, floor_log2(tl.where(known, sigma, 1.0)), e))
        if zero:
            write_another(row, v, v_out)
            if sigma_state is not None:
                write_another(row, v, v)
        elif empty | (bad > 0):
            for start in tl.range(0, n, VECTOR):
                columns = start + tl.arange(0, VECTOR)
                old = tl.load(v + v_at + columns, mask=columns < n, other=0.0)
                tl.store(v_out + v_at + columns, old, mask=columns < n)
        else:
            order = tl.load(row + W_ORDER)
            inverse_z = 1.0 / z_norm
            for start in tl.range(0, n, VECTOR):
                at = start + tl.arange(0, VECTOR)
                z = tl.load(space + tl.load(row + Z_AT) + at, mask=at < n, other=0.0).to(tl.float64) * inverse_z
                columns = at
                if order != 0:
                    columns = tl.load(order.to(tl.pointer_type(tl.int32)) + at, mask=at < n, other=0)
                tl.store(v_out + v_at + columns, z.to(tl.float32), mask=at < n)
                if sigma_state is not None:
                    tl.store(v + v_at + columns, z.to(tl.float32), mask=at < n)
    if u_out is not None:
        for start in tl.range(0, m, VECTOR):
            rows = start + tl.arange(0, VECTOR)
            y = tl.load(y_at + rows, mask=rows < m, other=0.0).to(tl.float64)
            u = tl.where(nothing, 0.0, y * inverse_y).to(tl.float32)
            tl.store(u_out + tl.load(row + U_AT) + rows, u, mask=rows < m)
