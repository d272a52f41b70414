"""A strip of rows read once: y = W v for its rows, and its share of z = W'y.

    y_i = w_i . (2^a v)        z = sum_i (2^b y_i) w_i

Row i alone gives y_i, and z needs row i again just then: it is still in registers (ONE_SWEEP) or in L2. Bytes: the
strip once; y (4 per row) and one partial z (4 per column) written. The powers of two keep sums in range: `shifts`.

A variant is (mode, A, pieces, P, aligned, copies): panels of P rows by `pieces` times A columns, A a power of two, and
so many copies of z (spectral_ops/ops/cut.py). `aligned`: rows begin on 16 bytes and hold a multiple of 8 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import (
    BY_COLUMN,
    CHUNKED,
    COLUMNS,
    MOST_SHARES,
    PADDED,
    PARTIAL_AT,
    ROWS,
    STRIP_ROWS,
    U_AT,
    W_COLUMN,
    W_ORDER,
    W_PLACES,
    W_ROW,
    WEIGHT,
)

# Sums of float32 need no scaling while |log2 sigma| is at most this: norms of z are taken in float64. As csrc's.
FREE = tl.constexpr(24)

LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)


@triton.jit
def power_of_two(exponent):
    """2^exponent in float32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def shifts(exponent):
    """Powers of two for v and for y that keep both sums near 1 when sigma is about 2^exponent.

    v is not scaled down further than 2^-100, where its small elements would become subnormal.
    """
    free = (exponent <= FREE) & (exponent >= -FREE)
    v = tl.where(free, 0, tl.minimum(tl.maximum(-exponent, -100), 126))
    y = tl.where(free, 0, tl.minimum(tl.maximum(-exponent, -126), 126))
    return v, y


@triton.jit
def rows_of(row, ADDRESS: tl.constexpr, STRIDE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """(first element, stride of rows, columns) of a weight or a gradient, hinted where it is aligned."""
    first = tl.load(row + ADDRESS).to(tl.pointer_type(DTYPE))
    stride = tl.load(row + STRIDE)
    n = tl.load(row + COLUMNS).to(tl.int32)
    if ALIGNED:
        # On values loaded here: hints on a function's arguments are lost when it is inlined.
        first = tl.multiple_of(first, 16)
        stride = tl.multiple_of(stride, 8)
        n = tl.multiple_of(n, 8)
    return first, stride, n


@triton.jit
def strip_of(row, strip):
    """The rows [begin, end) of a strip."""
    count = tl.load(row + STRIP_ROWS).to(tl.int32)
    begin = strip * count
    return begin, tl.minimum(begin + count, tl.load(row + ROWS).to(tl.int32))


@triton.jit
def load_vector(v, order, at, mask):
    """v for the places `at` of a row: in the row's own order where that is not the columns'."""
    columns = at
    if order != 0:
        columns = tl.load(order.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
    return tl.load(v + columns, mask=mask, other=0.0)


@triton.jit
def places_of(columns, stride, places, mask, DENSE: tl.constexpr):
    """Where in their row, in elements, columns lie: side by side where it is dense, else by stride or by a map."""
    found = columns.to(tl.int64)
    if not DENSE:
        found *= stride
        if places != 0:
            found = tl.load(places.to(tl.pointer_type(tl.int32)) + columns, mask=mask, other=0).to(tl.int64)
    return found


@triton.jit
def add_partial(z, columns, mask, value, FIXED_ORDER: tl.constexpr):
    if FIXED_ORDER:
        tl.store(z + columns, value, mask=mask)
    else:
        tl.atomic_add(z + columns, value, mask=mask, sem="relaxed")


@triton.jit
def partial_of(row, number, space, FIXED_ORDER: tl.constexpr):
    """Where a share of z goes: to a place of its own, by its number, or all to one."""
    at = tl.load(row + PARTIAL_AT)
    if FIXED_ORDER:
        at += number * tl.load(row + PADDED)  # in 64 bits, as the table is
    return space + tl.multiple_of(at, 8)


@triton.jit
def read_one_sweep(
    row,
    strip,
    v,
    space,
    shift_v,
    shift_y,
    DTYPE: tl.constexpr,
    A: tl.constexpr,
    PIECES: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    COPIES: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
):
    """Dense rows that fit the registers: the panel gives y, and then, still there, its share of z.

    z is kept in as many copies as a load of all threads spans rows: each thread adds up its own rows. Up to
    MOST_SHARES of them go to memory as they are: summing them here held a program up for a fifth of its time
    (docs/performance.md).
    """
    w, stride, n = rows_of(row, WEIGHT, W_ROW, DTYPE, ALIGNED)
    begin, end = strip_of(row, strip)
    y_at = space + tl.load(row + U_AT)
    order = tl.load(row + W_ORDER)
    scale_v = power_of_two(shift_v)
    scale_y = power_of_two(shift_y)
    a = tl.arange(0, A)
    vs = ()
    zs = ()
    for i in tl.static_range(PIECES):
        vs += (load_vector(v, order, i * A + a, i * A + a < n) * scale_v,)
        zs += (tl.zeros((COPIES, A), tl.float32),)
    for first in tl.range(begin, end, P, num_stages=STAGES):
        rows = first + tl.arange(0, P)
        in_rows = rows < end
        at = w + rows.to(tl.int64)[:, None] * stride
        panels = ()
        for i in tl.static_range(PIECES):
            panels += (load_panel(at, i * A + a, in_rows, i * A + a < n, EVICT),)  # (P, A)
        products = panels[0].to(tl.float32) * vs[0][None, :]
        for i in tl.static_range(1, PIECES):
            products += panels[i].to(tl.float32) * vs[i][None, :]
        y = tl.sum(products, axis=1)
        tl.store(y_at + rows, y, mask=in_rows)
        y *= scale_y
        sums = ()
        for i in tl.static_range(PIECES):
            sums += (zs[i] + sum_rows(panels[i].to(tl.float32) * y[:, None], COPIES),)
        zs = sums
    for i in tl.static_range(PIECES):
        store_shares(row, strip, space, zs[i], i * A + a, n, FIXED_ORDER)


@triton.jit
def store_shares(row, strip, space, z, columns, n, FIXED_ORDER: tl.constexpr):
    """What a strip leaves of z at these columns; z: (copies, A)."""
    COPIES: tl.constexpr = z.shape[0]
    A: tl.constexpr = z.shape[1]
    shares: tl.constexpr = MOST_SHARES if COPIES > MOST_SHARES else COPIES
    to = partial_of(row, strip * shares, space, FIXED_ORDER)
    if FIXED_ORDER:
        padded = tl.multiple_of(tl.load(row + PADDED).to(tl.int32), 8)
        share = tl.sum(tl.reshape(z, (shares, COPIES // shares, A)), axis=1)  # (shares, A)
        to += tl.arange(0, shares)[:, None] * padded + columns[None, :]
        tl.store(to, share, mask=tl.broadcast_to((columns < n)[None, :], (shares, A)))
    else:
        tl.atomic_add(to + columns, tl.sum(z, axis=0), mask=columns < n, sem="relaxed")


@triton.jit
def load_panel(at, columns, in_rows, in_columns, EVICT: tl.constexpr):
    mask = in_rows[:, None] & in_columns[None, :]
    return tl.load(at + columns[None, :], mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def sum_rows(panel, COPIES: tl.constexpr):
    """(P, A) to (COPIES, A): each thread's own rows where COPIES is what a load of all threads spans."""
    P: tl.constexpr = panel.shape[0]
    A: tl.constexpr = panel.shape[1]
    return tl.sum(tl.reshape(panel, (P // COPIES, COPIES, A)), axis=0)


@triton.jit
def read_two_sweeps(
    row,
    strip,
    v,
    space,
    shift_v,
    shift_y,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
):
    """Rows of any length and any strides, in panels of P by A: all of y first, then z, the second read from L2."""
    w, row_stride, n = rows_of(row, WEIGHT, W_ROW, DTYPE, ALIGNED)
    begin, end = strip_of(row, strip)
    if MODE == BY_COLUMN:
        row_stride = 1
    column_stride = tl.load(row + W_COLUMN)
    y_at = space + tl.load(row + U_AT)
    order = tl.load(row + W_ORDER)
    mapping = tl.load(row + W_PLACES)
    scale_v = power_of_two(shift_v)
    scale_y = power_of_two(shift_y)
    for first in tl.range(begin, end, P):
        rows = first + tl.arange(0, P)
        in_rows = rows < end
        y = tl.zeros((P,), tl.float32)
        for start in tl.range(0, n, A):
            columns = start + tl.arange(0, A)
            in_columns = columns < n
            x = load_vector(v, order, columns, in_columns)
            places = places_of(columns, column_stride, mapping, in_columns, MODE == CHUNKED)
            at = w + rows.to(tl.int64)[:, None] * row_stride + places[None, :]
            panel = tl.load(at, mask=in_rows[:, None] & in_columns[None, :], other=0.0).to(tl.float32)  # (P, A)
            y += tl.sum(panel * (x * scale_v)[None, :], axis=1)
        tl.store(y_at + rows, y, mask=in_rows)
    tl.debug_barrier()  # y comes back in other threads
    z = partial_of(row, strip, space, FIXED_ORDER)
    for start in tl.range(0, n, A):
        columns = start + tl.arange(0, A)
        in_columns = columns < n
        places = places_of(columns, column_stride, mapping, in_columns, MODE == CHUNKED)
        sums = tl.zeros((A,), tl.float32)
        for first in tl.range(begin, end, P):
            rows = first + tl.arange(0, P)
            in_rows = rows < end
            y = tl.load(y_at + rows, mask=in_rows, other=0.0) * scale_y
            at = w + rows.to(tl.int64)[:, None] * row_stride + places[None, :]
            panel = tl.load(at, mask=in_rows[:, None] & in_columns[None, :], other=0.0).to(tl.float32)  # (P, A)
            sums += tl.sum(panel * y[:, None], axis=0)
        add_partial(z, columns, in_columns, sums, FIXED_ORDER)
    tl.debug_barrier()


@triton.jit
def largest_element(row, DTYPE: tl.constexpr, P: tl.constexpr, A: tl.constexpr):
    """(max |w|, how many elements are not finite) of a whole matrix of any strides, by one program."""
    w, row_stride, n = rows_of(row, WEIGHT, W_ROW, DTYPE, False)
    column_stride = tl.load(row + W_COLUMN)
    m = tl.load(row + ROWS).to(tl.int32)
    mapping = tl.load(row + W_PLACES)
    top = tl.full((), 0.0, tl.float32)
    bad = tl.full((), 0, tl.int32)
    for first in tl.range(0, m, P):
        rows = first + tl.arange(0, P)
        for start in tl.range(0, n, A):
            columns = start + tl.arange(0, A)
            mask = (rows < m)[:, None] & (columns < n)[None, :]
            places = places_of(columns, column_stride, mapping, columns < n, False)
            at = w + rows.to(tl.int64)[:, None] * row_stride + places[None, :]
            size = tl.abs(tl.load(at, mask=mask, other=0.0).to(tl.float32))
            finite = size <= LARGEST_FLOAT32  # false for NaN too
            top = tl.maximum(top, tl.max(tl.max(tl.where(finite, size, 0.0), axis=1), axis=0))
            bad += tl.sum(tl.sum(tl.where(finite, 0, 1), axis=1), axis=0)
    return top, bad
