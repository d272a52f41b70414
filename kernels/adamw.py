"""AdamW with the penalty folded in: one launch updates every parameter and reads sigma, u and v of the new weights.

    p = c u v'    W -> AdamW(W, g + p)    y = W v    z = W'y    s = ||z|| / ||y||    u = y / ||y||    v = z / ||z||

The queue and its tiles are the penalty's (kernels/penalty.py), but for the strips, which are updated as they are read.
Nothing waits but the combining of columns: the gradient's c u v' is of the s, u, v that the last step left. Bytes: what
AdamW moves by itself, and 4 per column and strip for partial sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .adamw_elements import GROUP_STRIDE, STRENGTH, STRENGTH_AT, STRENGTH_WIDE, factors_of, strength_of
from .launch import launch
from .penalty import Work
from .queue import publish, row_counters, stall, wait
from .strips import shifts
from .table import (
    ADAMW_FIELDS,
    BLOCKS,
    COLUMNS,
    COMBINE_TILE,
    COMBINED,
    COUNTERS,
    COUNTS,
    EXITS,
    FIRST_COUNTER,
    GROUP,
    INDEX,
    KIND,
    ONE_SWEEP,
    PLAIN_TILE,
    READ_TILE,
    READS,
    ROWS,
    SCALE,
    STEP,
    STEP_WIDE,
    STRIPS,
    TARGET,
    TERM,
    TERM_AT,
    TICKET,
    TILE,
    V_AT,
    VECTOR_TILE,
)
from .terms import float64_field, matrix_term, power
from .tiles import combine_tile, finish_matrix, renew_matrix
from .update import update_one_sweep, update_plain, update_two_sweeps, update_vector

# ops/layout.py: Kind
PLAIN_KIND = tl.constexpr(4)
# Rows are summed and their counters reset this many at a time.
CHUNK = tl.constexpr(256)


@triton.jit(noinline=True)
def strip_tile(
    row,
    strip,
    v,
    u,
    exponents,
    sigma,
    space,
    groups,
    grad_scale,
    seed,
    exponent,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    A: tl.constexpr,
    PIECES: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    COPIES: tl.constexpr,
    SQUARE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
):
    tl.debug_barrier()
    f = factors_of(row, groups, grad_scale, seed, MAXIMIZE)
    s = tl.load(sigma + tl.load(row + INDEX)).to(tl.float64)
    _, slope = matrix_term(row, s, exponent, SQUARE)
    coefficient = tl.where(s == 0.0, 0.0, strength_of(row, groups) * float64_field(row + SCALE) * slope)
    own_v = v + tl.load(row + V_AT)
    shift_v, shift_y = shifts(tl.load(exponents + tl.load(row + INDEX)))
    if MODE == ONE_SWEEP:
        update_one_sweep(
            row, strip, own_v, u, coefficient, f, space, shift_v, shift_y, W_DTYPE, G_DTYPE, A, PIECES, P, ALIGNED,
            COPIES, AMSGRAD, MASTERS, DECOUPLED, BY_CHANCE, FIXED_ORDER,
        )  # fmt: skip
    else:
        update_two_sweeps(
            row, strip, own_v, u, coefficient, f, space, shift_v, shift_y, W_DTYPE, G_DTYPE, MODE, A, P, ALIGNED,
            AMSGRAD, MASTERS, DECOUPLED, BY_CHANCE, FIXED_ORDER,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit(noinline=True)
def updated_vector_tile(
    row, sums, groups, grad_scale, seed, exponent, write, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr,
    SQUARE: tl.constexpr, AMSGRAD: tl.constexpr, MASTERS: tl.constexpr, MAXIMIZE: tl.constexpr,
    DECOUPLED: tl.constexpr, BY_CHANCE: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()
    f = factors_of(row, groups, grad_scale, seed, MAXIMIZE)
    term = update_vector(
        row, exponent, strength_of(row, groups), f, write, W_DTYPE, G_DTYPE, SQUARE, AMSGRAD, MASTERS, DECOUPLED,
        BY_CHANCE,
    )  # fmt: skip
    tl.store(sums + tl.load(row + TERM_AT) + TERM, term)
    tl.debug_barrier()


@triton.jit(noinline=True)
def plain_tile(
    row, chunk, groups, grad_scale, seed, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr, MAXIMIZE: tl.constexpr, BY_CHANCE: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()
    f = factors_of(row, groups, grad_scale, seed, MAXIMIZE)
    update_plain(row, chunk, f, W_DTYPE, G_DTYPE, AMSGRAD, MASTERS, BY_CHANCE)
    tl.debug_barrier()


@triton.jit
def numbers_at(addresses, wide, mask):
    """0-d tensors, float32 or float64, as float64; 0 where masked."""
    double = tl.load(addresses.to(tl.pointer_type(tl.float64)), mask=mask & (wide != 0), other=0.0)
    single = tl.load(addresses.to(tl.pointer_type(tl.float32)), mask=mask & (wide == 0), other=0.0)
    return double + single.to(tl.float64)


@triton.jit(noinline=True)
def leave_step(rows, counters, sums, sigma, groups, exponent, value, row_count, skipped, SQUARE: tl.constexpr):
    """strength * R from sigma and the vectors' terms; the counts of steps, unless skipped; every counter set back."""
    tl.debug_barrier()
    total = tl.full((), 0.0, tl.float64)
    for first in tl.range(0, row_count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        mask = index < row_count
        row = rows + index.to(tl.int64) * ADAMW_FIELDS
        kind = tl.load(row + KIND, mask=mask, other=PLAIN_KIND)
        m = tl.load(row + ROWS, mask=mask, other=0)
        matrix = (kind == 0) & (m > 0) & (tl.load(row + COLUMNS, mask=mask, other=0) > 0)
        s = tl.load(sigma + tl.load(row + INDEX, mask=matrix, other=0), mask=matrix, other=0.0).to(tl.float64)
        target = tl.load(row + TARGET, mask=matrix, other=0).to(tl.float64, bitcast=True)
        gap = power(s, exponent, SQUARE) - power(target, exponent, SQUARE)
        vector = (kind != 0) & (kind != PLAIN_KIND)
        term = tl.load(sums + tl.load(row + TERM_AT, mask=vector, other=0) + TERM, mask=vector, other=0.0)
        term += tl.where(matrix, gap * gap, 0.0)
        group = groups + tl.load(row + GROUP, mask=mask, other=0) * GROUP_STRIDE
        strength = tl.load(group + STRENGTH).to(tl.float64, bitcast=True)
        address = tl.load(group + STRENGTH_AT)
        width = tl.load(group + STRENGTH_WIDE)
        strength = tl.where(address != 0, numbers_at(address, width, address != 0), strength)
        scale = tl.load(row + SCALE, mask=mask, other=0).to(tl.float64, bitcast=True)
        total += tl.sum(tl.where(matrix | vector, strength * scale * term, 0.0), axis=0)
        counts = mask & (tl.load(row + COUNTS, mask=mask, other=0) > skipped)  # 1 or 0
        step = tl.load(row + STEP, mask=counts, other=0)
        width = tl.load(row + STEP_WIDE, mask=counts, other=0)
        count = numbers_at(step, width, counts) + 1.0
        tl.store(step.to(tl.pointer_type(tl.float64)), count, mask=counts & (width != 0))
        tl.store(step.to(tl.pointer_type(tl.float32)), count.to(tl.float32), mask=counts & (width == 0))
        for i in tl.static_range(COUNTERS):
            tl.store(counters + FIRST_COUNTER + index * COUNTERS + i, tl.zeros((CHUNK,), tl.int32), mask=mask)
    tl.store(value, total.to(tl.float32))
    tl.store(counters + TICKET, 0)
    tl.store(counters + EXITS, 0)


# 0-d tensors lie anywhere: told apart by alignment, each place of theirs would be another compilation.
SCALARS = ["value", "grad_scale", "found_inf", "exponent_at"]


@triton.jit(
    do_not_specialize=["tile_count", "row_count", "seed", "looks", "tiles_each", "delays"],
    do_not_specialize_on_alignment=SCALARS,
)
def _adamw_kernel(
    rows,
    tiles,
    counters,
    space,
    sums,
    groups,
    v,
    u,
    exponents,
    sigma,
    value,
    grad_scale,
    found_inf,
    exponent_at,
    tile_count,
    row_count,
    seed,
    looks,
    tiles_each,
    delays,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    READ_VARIANTS: tl.constexpr,
    READ_COUNT: tl.constexpr,
    SQUARE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
    DEBUG: tl.constexpr,
):
    skipped = tl.full((), 0, tl.int32)
    if found_inf is not None:
        skipped += (tl.load(found_inf).to(tl.float32) != 0.0).to(tl.int32)
    ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed")
    left = tiles_each
    while (ticket < tile_count) & (left > 0):
        tile = tiles + ticket.to(tl.int64) * TILE
        what = tl.load(tile)
        row_index = tl.load(tile + 1)
        part = tl.load(tile + 2)
        row = rows + row_index.to(tl.int64) * ADAMW_FIELDS
        own = row_counters(counters, row_index)
        if DEBUG:
            if delays != 0:
                stall(counters, ticket, delays)
        if what == VECTOR_TILE:
            updated_vector_tile(
                row, sums, groups, grad_scale, seed, tl.load(exponent_at), skipped == 0, W_DTYPE, G_DTYPE, SQUARE,
                AMSGRAD, MASTERS, MAXIMIZE, DECOUPLED, BY_CHANCE,
            )  # fmt: skip
        elif skipped == 0:
            if what == COMBINE_TILE:
                wait(own + READS, tl.load(row + STRIPS).to(tl.int32), counters, ticket, looks, DEBUG)
                combine_tile(row, part, space, sums, FIXED_ORDER)
                if publish(own + COMBINED) == tl.load(row + BLOCKS).to(tl.int32) - 1:
                    shift_y, bad = renew_matrix(row, v, exponents, space, sums, W_DTYPE, FIXED_ORDER)
                    finish_matrix(
                        row, v, v, exponents, exponents, sigma, u, None, space, sums, tl.load(exponent_at), 0.0, False,
                        shift_y, bad, SQUARE,
                    )  # fmt: skip
            elif what == PLAIN_TILE:
                plain_tile(
                    row, part, groups, grad_scale, seed, W_DTYPE, G_DTYPE, AMSGRAD, MASTERS, MAXIMIZE, BY_CHANCE
                )  # fmt: skip
            else:
                for i in tl.static_range(READ_COUNT):
                    if what == READ_TILE + i:
                        strip_tile(
                            row, part, v, u, exponents, sigma, space, groups, grad_scale, seed, tl.load(exponent_at),
                            W_DTYPE, G_DTYPE, READ_VARIANTS[i][0], READ_VARIANTS[i][1], READ_VARIANTS[i][2],
                            READ_VARIANTS[i][3], READ_VARIANTS[i][4], READ_VARIANTS[i][5], SQUARE, AMSGRAD, MASTERS,
                            MAXIMIZE, DECOUPLED, BY_CHANCE, FIXED_ORDER,
                        )  # fmt: skip
                publish(own + READS)
        if DEBUG:
            left -= 1
        if left > 0:
            ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed")
    # The last to leave sums R, counts the step and sets everything back for the next launch.
    if publish(counters + EXITS) == tl.num_programs(0) - 1:
        leave_step(rows, counters, sums, sigma, groups, tl.load(exponent_at), value, row_count, skipped, SQUARE)


class Step(NamedTuple):
    """What is compiled into a step, beside its Work."""

    amsgrad: bool
    masters: bool
    maximize: bool
    decoupled: bool
    by_chance: bool  # stochastic rounding of bfloat16 weights


def launch_adamw(
    work: Work,
    step: Step,
    groups: Any,
    v: Any,
    u: Any,
    exponents: Any,
    sigma: Any,
    value: Any,
    seed: int,
    grad_scale: Any = None,
    found_inf: Any = None,
) -> None:
    """One step of all rows of the table, on the current device and stream.

    Args:
        work: the table, of ADAMW_FIELDS numbers a row; no gradient variants.
        groups: int64 (parameter groups, GROUP_FIELDS), kernels/adamw_elements.py.
        v, u: flat float32; exponents: int32; sigma: float32 (matrices,). Of the weights as they are, then of the new.
        value: float32 0-d. seed: int32, of stochastic rounding.
        grad_scale, found_inf: 0-d tensors on the device, or None.
    """
    launch(
        _adamw_kernel,
        work.programs,
        work.rows,
        work.tiles,
        work.counters,
        work.space,
        work.sums,
        groups,
        v,
        u,
        exponents,
        sigma,
        value,
        grad_scale,
        found_inf,
        work.exponent,
        work.tiles.shape[0],
        work.rows.shape[0],
        seed,
        work.looks,
        work.tiles_each,
        work.delays,
        W_DTYPE=work.weight_dtype,
        G_DTYPE=work.gradient_dtype,
        READ_VARIANTS=work.read_variants,
        READ_COUNT=len(work.read_variants),
        SQUARE=work.square,
        AMSGRAD=step.amsgrad,
        MASTERS=step.masters,
        MAXIMIZE=step.maximize,
        DECOUPLED=step.decoupled,
        BY_CHANCE=step.by_chance,
        FIXED_ORDER=work.fixed_order,
        DEBUG=work.debug,
        num_warps=work.warps,
        maxnreg=work.registers,
    )
