"""What one tile asks of a program, as functions that are called and not inlined.

Inlined, all that depends on the thread alone (offsets, addresses in shared memory, of ~15 layouts) is hoisted out of
the loop over tiles and held in ~90 registers. A called function begins and ends with a barrier: Triton orders shared
memory by what a call leaves behind, not by how it begins.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import combine, finish, renew
from .strips import read_one_sweep, read_two_sweeps, shifts
from .table import (
    CHUNKED,
    COEFFICIENT,
    COUNTERS,
    EXITS,
    FIELDS,
    FIRST_COUNTER,
    INDEX,
    ONE_SWEEP,
    PARTIALS,
    SCALE,
    TERM,
    TERM_AT,
    TICKET,
    U_AT,
    V_AT,
)
from .terms import add_outer, vector_term

# Counters and terms are reset and summed this many at a time.
CHUNK = tl.constexpr(256)


@triton.jit(noinline=True)
def read_tile(
    row,
    strip,
    v,
    exponents,
    space,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    A: tl.constexpr,
    PIECES: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    COPIES: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
):
    tl.debug_barrier()
    old = v + tl.load(row + V_AT)
    shift_v, shift_y = shifts(tl.load(exponents + tl.load(row + INDEX)))
    if MODE == ONE_SWEEP:
        read_one_sweep(
            row, strip, old, space, shift_v, shift_y, DTYPE, A, PIECES, P, ALIGNED, COPIES, STAGES, EVICT,
            FIXED_ORDER,
        )  # fmt: skip
    else:
        read_two_sweeps(
            row, strip, old, space, shift_v, shift_y, DTYPE, MODE, A, P, ALIGNED, FIXED_ORDER
        )
    tl.debug_barrier()


@triton.jit(noinline=True)
def combine_tile(row, block, space, sums, FIXED_ORDER: tl.constexpr):
    tl.debug_barrier()
    combine(row, block, tl.load(row + PARTIALS).to(tl.int32), space, sums, FIXED_ORDER)
    tl.debug_barrier()


@triton.jit(noinline=True)
def renew_matrix(row, v, exponents, space, sums, W_DTYPE: tl.constexpr, FIXED_ORDER: tl.constexpr):
    tl.debug_barrier()
    shift_y, bad = renew(row, v, exponents, space, sums, W_DTYPE, FIXED_ORDER)
    tl.debug_barrier()
    return shift_y, bad


@triton.jit(noinline=True)
def finish_matrix(
    row, v, v_out, exponents, exponents_out, sigma, u, sigma_state, space, sums, exponent, factor, keep, shift_y,
    bad, SQUARE: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()
    finish(
        row, v, v_out, exponents, exponents_out, sigma, u, sigma_state, space, sums, exponent, factor, keep, shift_y,
        bad, SQUARE,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit(noinline=True)
def vector_tile(
    row, sums, exponent, factor, write, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, SQUARE: tl.constexpr
):  # fmt: skip
    tl.debug_barrier()
    term = vector_term(row, exponent, factor, write, W_DTYPE, G_DTYPE, SQUARE, False)
    tl.store(sums + tl.load(row + TERM_AT) + TERM, term)
    tl.debug_barrier()


@triton.jit(noinline=True)
def gradient_tile(
    row,
    strip,
    v,
    space,
    sums,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    tl.debug_barrier()
    coefficient = tl.load(sums + tl.load(row + TERM_AT) + COEFFICIENT)
    if coefficient != 0.0:
        y = space + tl.load(row + U_AT)
        new = v + tl.load(row + V_AT)
        add_outer(row, strip, y, coefficient, new, DTYPE, A, P, MODE == CHUNKED, ALIGNED, False)
    tl.debug_barrier()


@triton.jit(noinline=True)
def leave(rows, counters, sums, value, strength, row_count):
    """R from the terms, in their order, and every counter set back: what the last program of a launch does."""
    tl.debug_barrier()
    total = tl.full((), 0.0, tl.float64)
    for first in tl.range(0, row_count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        mask = index < row_count
        row = rows + index.to(tl.int64) * FIELDS
        term = tl.load(sums + tl.load(row + TERM_AT, mask=mask, other=0) + TERM, mask=mask, other=0.0)
        scale = tl.load(row + SCALE, mask=mask, other=0).to(tl.float64, bitcast=True)
        total += tl.sum(tl.where(mask, scale * term, 0.0), axis=0)
        for i in tl.static_range(COUNTERS):
            tl.store(counters + FIRST_COUNTER + index * COUNTERS + i, tl.zeros((CHUNK,), tl.int32), mask=mask)
    if value is not None:
        tl.store(value, (tl.load(strength).to(tl.float64) * total).to(tl.float32))
    tl.store(counters + TICKET, 0)
    tl.store(counters + EXITS, 0)
