"""R(theta) of all layers of a model and its gradient, in one launch that reads each weight once.

    y = W v    z = W'y    s = ||z|| / ||y||    R = sum scale (s^k - t^k)^2 + terms of vectors    grad += c u v+'

Tiles in the order of their tickets (kernels/queue.py): strips are read, blocks of columns combined, the last block of a
matrix finishes it, and gradient strips wait for that. Bytes: weights once, gradients read and written once, ~3 % of the
weights again for partial sums. The usual code takes ~20 launches and three reads per layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import launch
from .queue import publish, row_counters, stall, wait
from .table import (
    BLOCKS,
    COMBINE_TILE,
    COMBINED,
    EXITS,
    FIELDS,
    FINISHED,
    GRADIENT_TILE,
    READ_TILE,
    READS,
    STRIPS,
    TICKET,
    TILE,
    VECTOR_TILE,
)
from .tiles import combine_tile, finish_matrix, gradient_tile, leave, read_tile, renew_matrix, vector_tile

# Panels of a strip in flight: with 32 elements a thread, 24 KB of shared memory for 4 warps of bf16.
STAGES = 3


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
SCALARS = ["value", "strength", "grad_scale", "found_inf", "exponent_at"]


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
    sigma_state,
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
            combine_tile(row, part, space, sums, FIXED_ORDER)
            blocks = tl.load(row + BLOCKS).to(tl.int32)
            if publish(own + COMBINED) == blocks * (iteration + 1) - 1:
                old = v
                old_exponents = exponents
                if REPEATED:
                    if iteration > 0:
                        old = v_out
                        old_exponents = exponents_out
                shift_y, bad = renew_matrix(row, old, old_exponents, space, sums, W_DTYPE, FIXED_ORDER)
                finish_matrix(
                    row, old, v_out, old_exponents, exponents_out, sigma, u, sigma_state, space, sums,
                    tl.load(exponent_at), _factor(strength, grad_scale), _is_skipped(found_inf), shift_y, bad, SQUARE,
                )  # fmt: skip
                publish(own + FINISHED)
        elif what == VECTOR_TILE:
            vector_tile(
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
                    read_tile(
                        row, part, old, old_exponents, space, W_DTYPE, READ_VARIANTS[i][0], READ_VARIANTS[i][1],
                        READ_VARIANTS[i][2], READ_VARIANTS[i][3], READ_VARIANTS[i][4], READ_VARIANTS[i][5], STAGES,
                        "evict_last" if REPEATED else "evict_first", FIXED_ORDER,
                    )  # fmt: skip
            publish(own + READS)
        else:
            wait(own + FINISHED, iterations, counters, ticket, looks, DEBUG)
            if not _is_skipped(found_inf):
                for i in tl.static_range(GRADIENT_COUNT):
                    if what == GRADIENT_TILE + i:
                        gradient_tile(
                            row, part, v_out, space, sums, G_DTYPE, GRADIENT_VARIANTS[i][0], GRADIENT_VARIANTS[i][1],
                            GRADIENT_VARIANTS[i][3], GRADIENT_VARIANTS[i][4],
                        )  # fmt: skip
        if DEBUG:
            left -= 1
        if left > 0:
            ticket = tl.atomic_add(counters + TICKET, 1, sem="relaxed")
    # The last to leave sums R and sets everything back for the next launch.
    if publish(counters + EXITS) == tl.num_programs(0) - 1:
        leave(rows, counters, sums, value, strength, row_count)


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
    read_variants: tuple[tuple[int, int, int, int, bool, int], ...]
    gradient_variants: tuple[tuple[int, int, int, int, bool], ...]
    square: bool  # the exponent is 2
    warps: int
    registers: int  # that a thread gets at most
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
    sigma_state: Any = None,
) -> None:
    """One step, or `iterations` of them, for all rows of the table, on the current device and stream.

    Args:
        work: the table; its gradients are added to where its tiles say so.
        v, v_out: flat float32; may be the same. exponents, exponents_out: int32, likewise.
        sigma: float32 (matrices,). u: flat float32, or None. value: float32 0-d, or None.
        sigma_state: float32 (matrices,), or None. Given, it receives sigma too, and v the next v as v_out does: what is
            kept for a backward and the state it came from, in one launch. One iteration only, v_out not v.
        strength, grad_scale, found_inf: 0-d tensors on the device; the last two may be None.
    """
    launch(
        _penalty_kernel,
        work.programs,
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
        sigma_state,
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
        DEBUG=work.debug,
        num_warps=work.warps,
        maxnreg=work.registers,
    )
