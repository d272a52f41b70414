"""What an optimizer step asks of a program: strips of matrices updated and read, vectors, elements without a term of R.

Bytes: weight and moments read and written once, gradients read once; p = c u v' is made on the way. For y and z the new
weight is still in registers (update_one_sweep), or in L2 (rows of other kinds).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .adamw_elements import advance, first_of, given_of, rounded, update_elements
from .strips import (
    load_vector,
    places_of,
    power_of_two,
    read_two_sweeps,
    rows_of,
    store_shares,
    strip_of,
    sum_rows,
)
from .table import (
    BY_COLUMN,
    CHUNKED,
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SQ,
    GRADIENT,
    KIND,
    MASTER,
    MAX_EXP_AVG_SQ,
    PLACE,
    SCALE,
    TARGET,
    U_AT,
    W_COLUMN,
    W_ORDER,
    W_PLACES,
    W_ROW,
    WEIGHT,
)
from .terms import BIAS, VECTOR_BLOCK, float64_field, power, vector_part, vector_slope

# Elements without a term of R, so many at a time, and in one tile.
PLAIN_BLOCK = tl.constexpr(2048)
PLAIN_CHUNK = 65536
CHUNK_ELEMENTS = tl.constexpr(PLAIN_CHUNK)


@triton.jit
def update_one_sweep(
    row,
    strip,
    v,
    u,
    coefficient,
    f,
    space,
    shift_v,
    shift_y,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    A: tl.constexpr,
    PIECES: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    COPIES: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
):
    """Dense rows that fit the registers: a panel is asked for, updated and written, then gives y and z."""
    _, stride, n = rows_of(row, WEIGHT, W_ROW, W_DTYPE, ALIGNED)
    w = first_of(row, WEIGHT, W_DTYPE, ALIGNED)
    g = first_of(row, GRADIENT, G_DTYPE, ALIGNED)
    given = given_of(row, n)
    if ALIGNED:
        given = tl.multiple_of(given, 8)
    master = first_of(row, MASTER, tl.float32, ALIGNED)
    average = first_of(row, EXP_AVG, tl.float32, ALIGNED)
    square = first_of(row, EXP_AVG_SQ, tl.float32, ALIGNED)
    highest = first_of(row, MAX_EXP_AVG_SQ, tl.float32, ALIGNED)
    first_place = tl.load(row + PLACE)
    begin, end = strip_of(row, strip)
    y_at = space + tl.load(row + U_AT)
    u_at = u + tl.load(row + U_AT)
    order = tl.load(row + W_ORDER)
    scale_v = power_of_two(shift_v)
    scale_y = power_of_two(shift_y)
    # p's own v is not scaled: where v is scaled up, c u goes down; where down, p goes up, since c u might overflow.
    coefficient *= power_of_two(tl.minimum(-shift_v, 0)).to(tl.float64)
    unscale = power_of_two(tl.maximum(-shift_v, 0))
    a = tl.arange(0, A)
    vs = ()
    zs = ()
    for i in tl.static_range(PIECES):
        vs += (load_vector(v, order, i * A + a, i * A + a < n) * scale_v,)
        zs += (tl.zeros((COPIES, A), tl.float32),)
    for first in tl.range(begin, end, P):
        rows = first + tl.arange(0, P)
        in_rows = rows < end
        # A pointer for each array; pieces lie at constant distances, which cost no registers.
        at = rows.to(tl.int64)[:, None] * stride + a[None, :]
        w_at = w + at
        g_at = g + at
        m_at = average + at
        s_at = square + at
        top_at = highest + at
        master_at = master + at
        olds = ()
        gs = ()
        ms = ()
        ss = ()
        tops = ()
        for i in tl.static_range(PIECES):
            mask = in_rows[:, None] & (i * A + a < n)[None, :]
            if MASTERS:
                olds += (tl.load(master_at + i * A, mask=mask, other=0.0),)
            else:
                olds += (tl.load(w_at + i * A, mask=mask, other=0.0),)
            gs += (tl.load(g_at + i * A, mask=in_rows[:, None] & (i * A + a < given)[None, :], other=0.0),)
            ms += (tl.load(m_at + i * A, mask=mask, other=0.0),)
            ss += (tl.load(s_at + i * A, mask=mask, other=0.0),)
            if AMSGRAD:
                tops += (tl.load(top_at + i * A, mask=mask, other=0.0),)
            else:
                tops += (0.0,)
        left = (tl.load(u_at + rows, mask=in_rows, other=0.0).to(tl.float64) * coefficient).to(tl.float32)
        news = ()
        products = tl.zeros((P, A), tl.float32)
        for i in tl.static_range(PIECES):
            mask = in_rows[:, None] & (i * A + a < n)[None, :]
            new, m, s, top = advance(
                olds[i].to(tl.float32), gs[i].to(tl.float32), ms[i], ss[i], tops[i],
                left[:, None] * vs[i][None, :] * unscale, f, AMSGRAD, DECOUPLED,
            )  # fmt: skip
            tl.store(m_at + i * A, m, mask=mask)
            tl.store(s_at + i * A, s, mask=mask)
            if AMSGRAD:
                tl.store(top_at + i * A, top, mask=mask)
            if MASTERS:
                tl.store(master_at + i * A, new, mask=mask)
            stored = rounded(new, at + (first_place + i * A), f[9], W_DTYPE, BY_CHANCE)
            tl.store(w_at + i * A, stored, mask=mask)
            news += (tl.where(mask, stored.to(tl.float32), 0.0),)
            products += news[i] * vs[i][None, :]
        y = tl.sum(products, axis=1)
        tl.store(y_at + rows, y, mask=in_rows)
        y *= scale_y
        sums = ()
        for i in tl.static_range(PIECES):
            sums += (zs[i] + sum_rows(news[i] * y[:, None], COPIES),)
        zs = sums
    for i in tl.static_range(PIECES):
        store_shares(row, strip, space, zs[i], i * A + a, n, FIXED_ORDER)


@triton.jit
def update_two_sweeps(
    row,
    strip,
    v,
    u,
    coefficient,
    f,
    space,
    shift_v,
    shift_y,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BY_CHANCE: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
):
    """Rows of any length and any strides: a strip is updated in panels of P by A, then read from L2."""
    _, row_stride, n = rows_of(row, WEIGHT, W_ROW, W_DTYPE, ALIGNED)
    begin, end = strip_of(row, strip)
    if MODE == BY_COLUMN:
        row_stride = 1
    column_stride = tl.load(row + W_COLUMN)
    u_at = u + tl.load(row + U_AT)
    order = tl.load(row + W_ORDER)
    mapping = tl.load(row + W_PLACES)
    given = given_of(row, n)
    if ALIGNED:
        given = tl.multiple_of(given, 8)
    for start in tl.range(0, n, A):
        columns = start + tl.arange(0, A)
        in_columns = columns < n
        x = load_vector(v, order, columns, in_columns)
        places = places_of(columns, column_stride, mapping, in_columns, MODE == CHUNKED)
        for first in tl.range(begin, end, P):
            rows = first + tl.arange(0, P)
            in_rows = rows < end
            left = (tl.load(u_at + rows, mask=in_rows, other=0.0).to(tl.float64) * coefficient).to(tl.float32)
            update_elements(
                row, rows.to(tl.int64)[:, None] * row_stride + places[None, :],
                in_rows[:, None] & in_columns[None, :], in_rows[:, None] & (columns < given)[None, :],
                left[:, None] * x[None, :], f, W_DTYPE, G_DTYPE, ALIGNED, AMSGRAD, MASTERS, DECOUPLED, BY_CHANCE,
            )  # fmt: skip
    tl.debug_barrier()  # the new weights come back in other threads
    read_two_sweeps(row, strip, v, space, shift_v, shift_y, W_DTYPE, MODE, A, P, ALIGNED, FIXED_ORDER)


@triton.jit
def update_vector(
    row,
    exponent,
    strength,
    f,
    write,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    SQUARE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BY_CHANCE: tl.constexpr,
):
    """A step of one bias, scale or shift (none unless `write`), and the term of the new one."""
    w = tl.load(row + WEIGHT).to(tl.pointer_type(W_DTYPE))
    n = tl.load(row + COLUMNS).to(tl.int32)
    kind = tl.load(row + KIND).to(tl.int32)
    target = power(float64_field(row + TARGET), exponent, SQUARE)
    factor = float64_field(row + SCALE) * strength
    stride = tl.load(row + W_COLUMN)
    mapping = tl.load(row + W_PLACES)
    squares = tl.full((), 0.0, tl.float64)
    if kind == BIAS:
        for start in tl.range(0, n, VECTOR_BLOCK):
            at = start + tl.arange(0, VECTOR_BLOCK)
            mask = at < n
            x = tl.load(w + places_of(at, stride, mapping, mask, False), mask=mask, other=0.0).to(tl.float64)
            squares += tl.sum(x * x, axis=0)
    total = tl.full((), 0.0, tl.float64)
    given = given_of(row, n)
    for start in tl.range(0, n, VECTOR_BLOCK):
        columns = start + tl.arange(0, VECTOR_BLOCK)
        mask = columns < n
        at = places_of(columns, stride, mapping, mask, False)
        x = tl.load(w + at, mask=mask, other=0.0)
        p = (factor * vector_slope(x.to(tl.float64), squares, kind, exponent, target, SQUARE)).to(tl.float32)
        if write:
            x = update_elements(
                row, at, mask, columns < given, p, f, W_DTYPE, G_DTYPE, False, AMSGRAD, MASTERS, DECOUPLED, BY_CHANCE
            )  # fmt: skip
        new = tl.where(mask, x.to(tl.float64), 0.0)
        total += vector_part(new, mask, kind, exponent, target, SQUARE)
    if kind == BIAS:
        total = power(total, exponent, SQUARE)
    return total


@triton.jit
def update_plain(
    row,
    chunk,
    f,
    W_DTYPE: tl.constexpr,
    G_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTERS: tl.constexpr,
    BY_CHANCE: tl.constexpr,
):
    """A step of elements without a term of R, CHUNK_ELEMENTS of them."""
    n = tl.load(row + COLUMNS)
    begin = chunk.to(tl.int64) * CHUNK_ELEMENTS
    end = tl.minimum(begin + CHUNK_ELEMENTS, n)
    stride = tl.load(row + W_COLUMN)
    mapping = tl.load(row + W_PLACES)
    side_by_side = tl.load(row + W_ROW) == 1  # and on 16 bytes
    for start in tl.range(begin, end, PLAIN_BLOCK):
        at = start + tl.arange(0, PLAIN_BLOCK)
        mask = at < end
        if side_by_side:
            update_elements(row, at, mask, mask, 0.0, f, W_DTYPE, G_DTYPE, True, AMSGRAD, MASTERS, False, BY_CHANCE)
        else:
            places = at * stride
            if mapping != 0:
                places = tl.load(mapping.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0).to(tl.int64)
            update_elements(
                row, places, mask, mask, 0.0, f, W_DTYPE, G_DTYPE, False, AMSGRAD, MASTERS, False, BY_CHANCE
            )  # fmt: skip
