"""The backward of the penalty as a loss term: gradients from what a step returned, in one launch.

    grad = upstream * scale * 2 k s^(k-1) (s^k - t^k) u v+'

Nothing to wait for: one tile a program. Bytes: every gradient written once (and read, where it is added to, as the step
of sharded weights does); of the weights only vector parameters are read.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .launch import launch
from .penalty import Work
from .table import CHUNKED, FIELDS, GRADIENT_TILE, INDEX, SCALE, TILE, U_AT, V_AT, VECTOR_TILE
from .terms import add_outer, float64_field, matrix_term, vector_term


@triton.jit(do_not_specialize_on_alignment=["upstream", "exponent_at"])
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
    OVERWRITE: tl.constexpr,
):
    """grad (+)= upstream * scale * dR/dW from what a step returned: nothing to wait for, one tile per program."""
    exponent = tl.load(exponent_at)
    factor = tl.load(upstream).to(tl.float64)
    tile = tiles + tl.program_id(0).to(tl.int64) * TILE
    what = tl.load(tile)
    row = rows + tl.load(tile + 1).to(tl.int64) * FIELDS
    part = tl.load(tile + 2)
    if what == VECTOR_TILE:
        vector_term(row, exponent, factor, True, W_DTYPE, G_DTYPE, SQUARE, OVERWRITE)
    else:
        s = tl.load(sigma + tl.load(row + INDEX)).to(tl.float64)
        _, slope = matrix_term(row, s, exponent, SQUARE)
        coefficient = factor * float64_field(row + SCALE) * tl.where(s == 0.0, 0.0, slope)
        left = u + tl.load(row + U_AT)
        right = v + tl.load(row + V_AT)
        for i in tl.static_range(GRADIENT_COUNT):
            if what == GRADIENT_TILE + i:
                add_outer(
                    row, part, left, coefficient, right, G_DTYPE, GRADIENT_VARIANTS[i][1], GRADIENT_VARIANTS[i][3],
                    GRADIENT_VARIANTS[i][0] == CHUNKED, GRADIENT_VARIANTS[i][4], OVERWRITE,
                )  # fmt: skip


def launch_penalty_backward(
    work: Work, sigma: Any, u: Any, v: Any, upstream: Any, accumulate: bool = False
) -> None:
    """gradient = upstream * scale * dR/dW, or += , for every row, from the sigma, u and v+ of a step."""
    launch(
        _penalty_backward_kernel,
        work.tiles.shape[0],
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
        OVERWRITE=not accumulate,
        num_warps=work.warps,
        maxnreg=work.registers,
    )
