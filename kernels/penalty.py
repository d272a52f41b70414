"""R(theta) of all layers of a model and its gradient, in one launch that reads each weight once.

    y = W v    z = W'y    s = ||z|| / ||y||    R = sum scale (s^k - t^k)^2 + terms of vectors    grad += c u v+'

Tiles in the order of their tickets (kernels/queue.py): strips are read, blocks of columns combined, the last block of a
matrix finishes it, and gradient strips wait for that. Bytes: weights once, gradients read and written once, ~3 % of the
weights again for partial sums. The usual code takes ~20 launches and three reads per layer.

What a tile does is called, not inlined. Inlined, all that depends on the thread alone (offsets, addresses in shared
memory, of ~15 layouts) is hoisted out of the loop over tiles and held in ~90 registers. A called function begins and
ends with a barrier: Triton orders shared memory by what a call leaves behind, not by how it begins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import table
from .combine import combine, finish, renew
from .queue import publish, row_counters, stall, wait
from .strips import read_one_sweep, read_two_sweeps, shifts
from .table import (
    BLOCKS,
    COMBINE_TILE,
    COMBINED,
    COUNTERS,
    EXITS,
    FIELDS,
    FINISHED,
    FIRST_COUNTER,
    GRADIENT_TILE,
    INDEX,
    READ_TILE,
    READS,
    SCALE,
    STRIPS,
    TERM_AT,
    TICKET,
    TILE,
    U_AT,
    V_AT,
    VECTOR_TILE,
)
from .terms import add_outer, float64_field, power, power_less_one, vector_term

ONE_SWEEP = tl.constexpr(table.ONE_SWEEP)
CHUNKED = tl.constexpr(table.CHUNKED)

# Panels of a strip in flight: with 32 elements a thread, 24 KB of shared memory for 4 warps of bf16.
STAGES = 3

# 4 programs of 4 warps, or 2 of 8, share the 65536 registers of a multiprocessor: ops/triton_table.py, PROGRAMS_PER_SM.
# Unsaid, Triton 3.6's ptxas takes up to 168.
MOST_REGISTERS = 128

# Counters and terms are reset and summed this many at a time.
CHUNK = tl.constexpr(256)


@triton.jit(noinline=True)
def _read(
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
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    EVICT: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
):
    tl.debug_barrier()
    old = v + tl.load(row + V_AT)
    shift_v, shift_y = shifts(tl.load(exponents + tl.load(row + INDEX)))
    if MODE == ONE_SWEEP:
        read_one_sweep(
            row, strip, old, space, shift_v, shift_y, DTYPE, A, PIECES, P, ALIGNED, STAGES, WARPS, EVICT,
            FIXED_ORDER,
        )  # fmt: skip
    else:
        read_two_sweeps(
            row, strip, old, space, shift_v, shift_y, DTYPE, MODE, A, P, ALIGNED, MODE == CHUNKED, FIXED_ORDER
        )
    tl.debug_barrier()


@triton.jit(noinline=True)
def _combine(row, block, space, sums, FIXED_ORDER: tl.constexpr):
    tl.debug_barrier()
    combine(row, block, space, sums, FIXED_ORDER)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _renew(row, v, exponents, space, sums, W_DTYPE: tl.constexpr, FIXED_ORDER: tl.constexpr):
    tl.debug_barrier()
    shift_y, bad = renew(row, v, exponents, space, sums, W_DTYPE, FIXED_ORDER)
    tl.debug_barrier()
    return shift_y, bad


@triton.jit(noinline=True)
def _finish(
    row, v, v_out, exponents, exponents_out, sigma, u, space, sums, exponent, factor, keep, shift_y, bad,
    SQUARE: tl.constexpr,
):  # fmt: skip
    tl.debug_barrier()
    finish(
        row, v, v_out, exponents, exponents_out, sigma, u, space, sums, exponent, factor, keep, shift_y, bad, SQUARE
    )
    tl.debug_barrier()


@triton.jit(noinline=True)
def _vector(
    row, sums, exponent, factor, write, W_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, SQUARE: tl.constexpr
):  # fmt: skip
    tl.debug_barrier()
    term = vector_term(row, exponent, factor, write, W_DTYPE, G_DTYPE, SQUARE, False)
    tl.store(sums + tl.load(row + TERM_AT) + 1, term)
    tl.debug_barrier()


@triton.jit(noinline=True)
def _gradient(
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
    STAGES: tl.constexpr,
):
    tl.debug_barrier()
    coefficient = tl.load(sums + tl.load(row + TERM_AT))
    if coefficient != 0.0:
        y = space + tl.load(row + U_AT)
        new = v + tl.load(row + V_AT)
        add_outer(row, strip, y, coefficient, new, DTYPE, A, P, MODE == CHUNKED, ALIGNED, False, STAGES)
    tl.debug_barrier()


@triton.jit
def _factor(strength, grad_scale):
    factor = tl.load(strength).to(tl.float64)
    if grad_scale is not None:
        factor *= tl.load(grad_scale).to(tl.float64)
    return factor


@triton.jit
def _is_skipped(found_inf):
    keep = False
    if found_inf is not None:
        keep = tl.load(found_inf).to(tl.float32) != 0.0
    return keep


# 0-d tensors lie anywhere: told apart by alignment, each place of theirs would be another compilation.
SCALARS = ["value", "strength", "grad_scale", "found_inf", "exponent_at", "upstream"]


@triton.jit(
    do_not_specialize=["tile_count", "row_count", "iterations", "looks", "tiles_each", "delays"],
    do_not_specialize_on_alignment=SCALARS,
)
def _penalty_kernel(
    rows,
    tiles,
    counters,
    space,
    sums,
    v,
    v_out,
    exponents,
    exponents_out,
    sigma,
    u,
    value,
    strength,
    grad_scale,
    found_inf,
    exponent_at,
    tile_count,
    row_count,
    iterations,
    looks,
    tiles_each,
    delays,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    READ_VARIANTS: tl.constexpr,
    READ_COUNT: tl.constexpr,
    GRADIENT_VARIANTS: tl.constexpr,
    GRADIENT_COUNT: tl.constexpr,
    REPEATED: tl.constexpr,
    SQUARE: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
    DEBUG: tl.constexpr,
):
    ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed")
    left = tiles_each
    while (ticket < tile_count) & (left > 0):
        tile = tiles + ticket.to(tl.int64) * TILE
        what = tl.load(tile)
        row_index = tl.load(tile + 1)
        part = tl.load(tile + 2)
        iteration = tl.load(tile + 3)
        row = rows + row_index.to(tl.int64) * FIELDS
        own = row_counters(counters, row_index)
        if DEBUG:
            if delays != 0:
                stall(counters, ticket, delays)
        if what == COMBINE_TILE:
            wait(own + READS, tl.load(row + STRIPS).to(tl.int32) * (iteration + 1), counters, ticket, looks, DEBUG)
            _combine(row, part, space, sums, FIXED_ORDER)
            blocks = tl.load(row + BLOCKS).to(tl.int32)
            if publish(own + COMBINED) == blocks * (iteration + 1) - 1:
                old = v
                old_exponents = exponents
                if REPEATED:
                    if iteration > 0:
                        old = v_out
                        old_exponents = exponents_out
                shift_y, bad = _renew(row, old, old_exponents, space, sums, W_DTYPE, FIXED_ORDER)
                _finish(
                    row, old, v_out, old_exponents, exponents_out, sigma, u, space, sums, tl.load(exponent_at),
                    _factor(strength, grad_scale), _is_skipped(found_inf), shift_y, bad, SQUARE,
                )  # fmt: skip
                publish(own + FINISHED)
        elif what == VECTOR_TILE:
            _vector(
                row, sums, tl.load(exponent_at), _factor(strength, grad_scale), not _is_skipped(found_inf), W_DTYPE,
                G_DTYPE, SQUARE,
            )  # fmt: skip
        elif what < GRADIENT_TILE:
            wait(own + FINISHED, iteration, counters, ticket, looks, DEBUG)
            old = v
            old_exponents = exponents
            if REPEATED:
                if iteration > 0:
                    old = v_out
                    old_exponents = exponents_out
            for i in tl.static_range(READ_COUNT):
                if what == READ_TILE + i:
                    _read(
                        row, part, old, old_exponents, space, W_DTYPE, READ_VARIANTS[i][0], READ_VARIANTS[i][1],
                        READ_VARIANTS[i][2], READ_VARIANTS[i][3], READ_VARIANTS[i][4], STAGES, WARPS,
                        "evict_last" if REPEATED else "evict_first", FIXED_ORDER,
                    )  # fmt: skip
            publish(own + READS)
        else:
            wait(own + FINISHED, iterations, counters, ticket, looks, DEBUG)
            if not _is_skipped(found_inf):
                for i in tl.static_range(GRADIENT_COUNT):
                    if what == GRADIENT_TILE + i:
                        _gradient(
                            row, part, v_out, space, sums, G_DTYPE, GRADIENT_VARIANTS[i][0], GRADIENT_VARIANTS[i][1],
                            GRADIENT_VARIANTS[i][3], GRADIENT_VARIANTS[i][4], STAGES,
                        )  # fmt: skip
        if DEBUG:
            left -= 1
        if left > 0:
            ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed")
    # The last to leave sums R and sets everything back for the next launch.
    if publish(counters + EXITS) == tl.num_programs(0) - 1:
        _leave(rows, counters, sums, value, strength, row_count)


class Work(NamedTuple):
    """A cut table on a device: what `launch_penalty` hands to the kernel beside the caller's own tensors."""

    rows: Any  # int64 (rows, FIELDS)
    tiles: Any  # int32 (tiles, TILE)
    counters: Any  # int32, all zero between launches
    space: Any  # float32: y, partial sums, z
    sums: Any  # float64: norms, coefficients, terms
    exponent: Any  # float64 (1,)
    weight_dtype: Any  # tl.bfloat16, ...
    gradient_dtype: Any
    read_variants: tuple[tuple[int, int, int, int, bool], ...]
    gradient_variants: tuple[tuple[int, int, int, int, bool], ...]
    square: bool  # the exponent is 2
    warps: int
    programs: int
    fixed_order: bool
    debug: bool = False
    looks: int = 1 << 20  # debug: how often a wait looks before it gives up
    tiles_each: int = 1 << 30  # debug: tiles that a program takes at most
    delays: int = 0  # debug: seed of random delays before each tile; 0: none


def launch_penalty(
    work: Work,
    v: Any,
    v_out: Any,
    exponents: Any,
    exponents_out: Any,
    sigma: Any,
    u: Any,
    value: Any,
    strength: Any,
    grad_scale: Any = None,
    found_inf: Any = None,
    iterations: int = 1,
) -> None:
    """One step, or `iterations` of them, for all rows of the table, on the current device and stream.

    Args:
        work: the table; its gradients are added to where its tiles say so.
        v, v_out: flat float32; may be the same. exponents, exponents_out: int32, likewise.
        sigma: float32 (matrices,). u: flat float32, or None. value: float32 0-d, or None.
        strength, grad_scale, found_inf: 0-d tensors on the device; the last two may be None.
    """
    _penalty_kernel[(work.programs,)](
        work.rows,
        work.tiles,
        work.counters,
        work.space,
        work.sums,
        v,
        v_out,
        exponents,
        exponents_out,
        sigma,
        u,
        value,
        strength,
        grad_scale,
        found_inf,
        work.exponent,
        work.tiles.shape[0],
        work.rows.shape[0],
        iterations,
        work.looks,
        work.tiles_each,
        work.delays,
        W_DTYPE=work.weight_dtype,
        G_DTYPE=work.gradient_dtype,
        READ_VARIANTS=work.read_variants,
        READ_COUNT=len(work.read_variants),
        GRADIENT_VARIANTS=work.gradient_variants,
        GRADIENT_COUNT=len(work.gradient_variants),
        REPEATED=iterations > 1,
        SQUARE=work.square,
        FIXED_ORDER=work.fixed_order,
        STAGES=STAGES,
        WARPS=work.warps,
        DEBUG=work.debug,
        num_warps=work.warps,
        maxnreg=MOST_REGISTERS,
    )


@triton.jit(noinline=True)
def _leave(rows, counters, sums, value, strength, row_count):
    tl.debug_barrier()
    total = tl.full((), 0.0, tl.float64)
    for first in tl.range(0, row_count, CHUNK):
        index = first + tl.arange(0, CHUNK)
        mask = index < row_count
        row = rows + index.to(tl.int64) * FIELDS
        term = tl.load(sums + tl.load(row + TERM_AT, mask=mask, other=0) + 1, mask=mask, other=0.0)
        scale = tl.load(row + SCALE, mask=mask, other=0).to(tl.float64, bitcast=True)
        total += tl.sum(tl.where(mask, scale * term, 0.0), axis=0)
        for i in tl.static_range(COUNTERS):
            tl.store(counters + FIRST_COUNTER + index * COUNTERS + i, tl.zeros((CHUNK,), tl.int32), mask=mask)
    if value is not None:
        tl.store(value, (tl.load(strength).to(tl.float64) * total).to(tl.float32))
    tl.store(counters + TICKET, 0)
    tl.store(counters + EXITS, 0)


@triton.jit(do_not_specialize_on_alignment=SCALARS)
def _penalty_backward_kernel(
    rows,
    tiles,
    sigma,
    u,
    v,
    upstream,
    exponent_at,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    GRADIENT_VARIANTS: tl.constexpr,
    GRADIENT_COUNT: tl.constexpr,
    SQUARE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad = upstream * scale * dR/dW from what a step returned: nothing to wait for, one tile per program."""
    exponent = tl.load(exponent_at)
    factor = tl.load(upstream).to(tl.float64)
    tile = tiles + tl.program_id(0).to(tl.int64) * TILE
    what = tl.load(tile)
    row = rows + tl.load(tile + 1).to(tl.int64) * FIELDS
    part = tl.load(tile + 2)
    if what == VECTOR_TILE:
        vector_term(row, exponent, factor, True, W_DTYPE, G_DTYPE, SQUARE, True)
    else:
        s = tl.load(sigma + tl.load(row + INDEX)).to(tl.float64)
        target = power(float64_field(row + table.TARGET), exponent, SQUARE)
        slope = 2.0 * exponent * power_less_one(s, exponent, SQUARE) * (power(s, exponent, SQUARE) - target)
        coefficient = factor * float64_field(row + SCALE) * tl.where(s == 0.0, 0.0, slope)
        left = u + tl.load(row + U_AT)
        right = v + tl.load(row + V_AT)
        for i in tl.static_range(GRADIENT_COUNT):
            if what == GRADIENT_TILE + i:
                add_outer(
                    row, part, left, coefficient, right, G_DTYPE, GRADIENT_VARIANTS[i][1], GRADIENT_VARIANTS[i][3],
                    GRADIENT_VARIANTS[i][0] == CHUNKED, GRADIENT_VARIANTS[i][4], True, STAGES,
                )  # fmt: skip


def launch_penalty_backward(work: Work, sigma: Any, u: Any, v: Any, upstream: Any) -> None:
    """gradient = upstream * scale * dR/dW for every row, overwritten, from the sigma, u and v+ of a step."""
    _penalty_backward_kernel[(work.tiles.shape[0],)](
        work.rows,
        work.tiles,
        sigma,
        u,
        v,
        upstream,
        work.exponent,
        W_DTYPE=work.weight_dtype,
        G_DTYPE=work.gradient_dtype,
        GRADIENT_VARIANTS=work.gradient_variants,
        GRADIENT_COUNT=len(work.gradient_variants),
        SQUARE=work.square,
        STAGES=STAGES,
        num_warps=work.warps,
        maxnreg=MOST_REGISTERS,
    )
