"""What a Lanczos iteration on W'W adds to the reads of kernels/penalty.py, one program per matrix.

    z = W'W q_k    r = z - Q Q'z, twice    alpha_k = q_k'z    beta_k = ||r||    q_k+1 = r / beta_k
    theta, s: largest eigenvalue and eigenvector of tridiagonal(alpha, beta);  done where beta_k |s_k| <= 2 tol theta

Bytes: k vectors of n read four times at step k, from L2 as a rule; W is m vectors read once, by another kernel. Nothing
here is known to the host: a matrix that is done says so in `status`, and its programs leave at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .combine import VECTOR, write_another
from .launch import launch
from .penalty import Work
from .table import COLUMNS, FIELDS, INDEX, ROWS, TERM_AT, U_AT, V_AT, Y_NORM, Z_NORM

# Panels of PANEL_ROWS Lanczos vectors by PANEL_COLUMNS: 16 elements a thread and 104 registers (sm_90), so that two
# programs share a multiprocessor; 32 elements take 173.
WARPS = 8
PANEL_ROWS = tl.constexpr(8)
PANEL_COLUMNS = tl.constexpr(512)

# Shifts tried at once for theta, one a thread: each sweep narrows the bracket 257 times.
SHIFTS = tl.constexpr(32 * WARPS)
# Relative width of the bracket. top_vector is off by its width over the gap between Ritz values, and its last component
# is compared with 2 tol theta / beta, rarely below 1e-6.
BRACKET = tl.constexpr(1e-13)
# 257^6 = 3e14; one more for the start of the bracket at zero.
MOST_SWEEPS = tl.constexpr(7)

# The small eigenproblem is solved at every second step: at step 40 it takes about as long as the projections do.
SOLVE_EVERY = tl.constexpr(2)

EPSILON = tl.constexpr(2.0**-23)  # of float32
EPSILON64 = tl.constexpr(2.0**-52)
LARGEST64 = tl.constexpr(1.7976931348623157e308)

# Of a matrix and step in `projected`, float64.
ENTRIES = tl.constexpr(5)
ALPHA = tl.constexpr(0)
BETA = tl.constexpr(1)
PROJECTION = tl.constexpr(2)  # of z on this Lanczos vector; later the pivot
FORWARD = tl.constexpr(3)
COMPONENT = tl.constexpr(4)  # of the eigenvector

# Of a matrix in `bracket`, float64: theta lies between LOW and HIGH.
BOUNDS = tl.constexpr(3)
LOW = tl.constexpr(0)
HIGH = tl.constexpr(1)
TOP = tl.constexpr(2)  # the largest alpha


class Krylov(NamedTuple):
    """The state of an iteration, on the device. Vectors are flat over all matrices, in the places of v."""

    basis: Any  # float32 (capacity, columns): the Lanczos vectors
    projected: Any  # float64 (capacity, matrices, ENTRIES)
    bracket: Any  # float64 (matrices, BOUNDS), zero at first
    status: Any  # int32 (matrices,): 0 at work; steps taken, where done; their negative, where max_iter came first
    q: Any  # float32 (columns,): the vector that W'W is applied to
    z: Any  # float32 (columns,): z / ||z||; zero at first
    rest: Any  # float32 (columns,)


@triton.jit
def _start_kernel(rows, zeros, q, basis):
    row = rows + tl.program_id(0).to(tl.int64) * FIELDS
    n = tl.load(row + COLUMNS).to(tl.int32)
    if n == 1:
        at = tl.load(row + V_AT)
        tl.store(q + at, 1.0)
        tl.store(basis + at, 1.0)
    elif n > 1:
        write_another(row, zeros, q)
        write_another(row, zeros, basis)


def launch_start(work: Work, krylov: Krylov) -> None:
    """The first Lanczos vector of every matrix: fixed, the same as the oracle's."""
    launch(_start_kernel, work.rows.shape[0], work.rows, krylov.z, krylov.q, krylov.basis, num_warps=WARPS)


@triton.jit(do_not_specialize=["k", "max_iter", "matrices", "total"])
def _lanczos_kernel(
    rows, sums, basis, projected, bracket, status, q, z, rest, k, max_iter, matrices, total, tol
):  # fmt: skip
    row = rows + tl.program_id(0).to(tl.int64) * FIELDS
    index = tl.load(row + INDEX)
    if tl.load(status + index) == 0:
        z_norm = tl.load(sums + tl.load(row + TERM_AT) + Z_NORM)
        n = tl.load(row + COLUMNS).to(tl.int32)
        own = projected + index * ENTRIES
        # False for NaN. A later z may be zero: then the space is invariant.
        usable = (z_norm <= LARGEST64) & ((z_norm > 0.0) | (k > 0)) & (n > 0)
        if usable:
            at = tl.load(row + V_AT)
            advance(
                own, bracket + index * BOUNDS, status + index, basis + at, q + at, z + at, rest + at, n, k, max_iter,
                matrices.to(tl.int64) * ENTRIES, total.to(tl.int64), z_norm, tol,
            )  # fmt: skip
        else:
            tl.store(own + COMPONENT, 1.0)
            tl.store(status + index, 1)


@triton.jit
def advance(own, bounds, status, basis, q, z, rest, n, k, max_iter, stride, total, z_norm, tol):
    """Step k of one matrix, from z / ||z|| and ||z|| to the next Lanczos vector or to the end."""
    # Twice is enough (Parlett, 6.9).
    project(own, basis, z, n, k, stride, total)
    alpha = tl.load(own + k * stride + PROJECTION)
    subtract(own, basis, z, rest, n, k, stride, total)
    project(own, basis, rest, n, k, stride, total)
    alpha = (alpha + tl.load(own + k * stride + PROJECTION)) * z_norm
    size = subtract(own, basis, rest, z, n, k, stride, total)
    beta = size * z_norm
    top = tl.maximum(tl.load(bounds + TOP), alpha)
    low = tl.load(bounds + LOW)
    # Weyl: the new row and column add at most their diagonal and their coupling.
    high = tl.maximum(tl.load(bounds + HIGH), alpha)
    if k > 0:
        high += tl.load(own + (k - 1) * stride + BETA)
    tl.debug_barrier()
    tl.store(own + k * stride + ALPHA, alpha)
    tl.store(own + k * stride + BETA, beta)
    tl.debug_barrier()
    # What is left of z when the space is invariant is rounding.
    invariant = (beta <= 4.0 * EPSILON * top) | (k + 1 == n)
    last = k + 1 >= max_iter
    done = invariant | last
    if done | (k % SOLVE_EVERY == SOLVE_EVERY - 1):
        low, high = top_eigenvalue(own, k, stride, low, high)
        share = top_vector(own, k, stride, high)
        # By the residual alone, as in the oracle: docs/design.md, section 9.
        converged = invariant | (beta * share <= 2.0 * tol * low)
        done = converged | last
        if done:
            tl.store(status, tl.where(converged, k + 1, -(k + 1)))
    tl.store(bounds + LOW, low)
    tl.store(bounds + HIGH, high)
    tl.store(bounds + TOP, top)
    if not done:  # else q stays: until the host drops this matrix, W'W q is computed and not looked at
        inverse = 1.0 / size
        for start in tl.range(0, n, VECTOR):
            columns = start + tl.arange(0, VECTOR)
            x = tl.load(z + columns, mask=columns < n, other=0.0).to(tl.float64) * inverse
            tl.store(q + columns, x.to(tl.float32), mask=columns < n)
            tl.store(basis + (k + 1) * total + columns, x.to(tl.float32), mask=columns < n)


@triton.jit
def project(own, basis, x, n, k, stride, total):
    """Q'x into `projected`, for the first k + 1 Lanczos vectors."""
    for first in tl.range(0, k + 1, PANEL_ROWS):
        i = first + tl.arange(0, PANEL_ROWS)
        at = basis + i.to(tl.int64)[:, None] * total
        h = tl.zeros((PANEL_ROWS,), tl.float64)
        for start in tl.range(0, n, PANEL_COLUMNS):
            columns = start + tl.arange(0, PANEL_COLUMNS)
            mask = (i <= k)[:, None] & (columns < n)[None, :]
            panel = tl.load(at + columns[None, :], mask=mask, other=0.0)  # (PANEL_ROWS, PANEL_COLUMNS)
            part = tl.load(x + columns, mask=columns < n, other=0.0)
            h += tl.sum(panel * part[None, :], axis=1).to(tl.float64)
        tl.store(own + i * stride + PROJECTION, h, mask=i <= k)
    tl.debug_barrier()


@triton.jit
def subtract(own, basis, x, out, n, k, stride, total):
    """out = x - Q h with h as `project` left it, and its norm. Not in place: threads hold copies of one another's x."""
    squares = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, n, PANEL_COLUMNS):
        columns = start + tl.arange(0, PANEL_COLUMNS)
        rest = tl.load(x + columns, mask=columns < n, other=0.0)
        for first in tl.range(0, k + 1, PANEL_ROWS):
            i = first + tl.arange(0, PANEL_ROWS)
            h = tl.load(own + i * stride + PROJECTION, mask=i <= k, other=0.0).to(tl.float32)
            mask = (i <= k)[:, None] & (columns < n)[None, :]
            at = basis + i.to(tl.int64)[:, None] * total + columns[None, :]
            panel = tl.load(at, mask=mask, other=0.0)  # (PANEL_ROWS, PANEL_COLUMNS)
            rest -= tl.sum(panel * h[:, None], axis=0)
        tl.store(out + columns, rest, mask=columns < n)
        wide = rest.to(tl.float64)
        squares += tl.sum(wide * wide, axis=0)
    tl.debug_barrier()
    return tl.sqrt(squares)


@triton.jit
def top_eigenvalue(own, k, stride, low, high):
    """A narrower bracket of the largest eigenvalue: x is above it where all pivots of x - T are positive."""
    lanes = tl.arange(0, SHIFTS)
    left = MOST_SWEEPS
    while (high - low > BRACKET * high) & (left > 0):
        step = (high - low) / (SHIFTS + 1)
        x = low + (lanes + 1).to(tl.float64) * step
        pivot = x - tl.load(own + ALPHA)
        below = pivot <= 0.0
        for i in tl.range(1, k + 1):
            b = tl.load(own + (i - 1) * stride + BETA)
            pivot = x - tl.load(own + i * stride + ALPHA) - b * b / tl.where(below, 1.0, pivot)
            below = below | (pivot <= 0.0)
        count = tl.sum(below.to(tl.int32), axis=0)
        high = tl.where(count == SHIFTS, high, low + (count + 1).to(tl.float64) * step)
        low = low + count.to(tl.float64) * step
        left -= 1
    return low, high


@triton.jit
def top_vector(own, k, stride, theta):
    """s = (theta - T)^-1 (1, ..., 1)' into `projected`, theta just above the largest eigenvalue; |s_k| / ||s||.

    Pivots are positive and couplings of T are too, so every term is positive: nothing cancels. The components on other
    eigenvectors are smaller by the bracket's width over their distance. (The recurrence from s_k = 1 fails once s_k is
    below the square root of theta's error.)
    """
    least = EPSILON64 * theta  # for a pivot that rounding has made zero
    pivot = tl.maximum(theta - tl.load(own + ALPHA), least)
    forward = pivot * 0.0 + 1.0
    tl.store(own + PROJECTION, pivot)
    tl.store(own + FORWARD, forward)
    for i in tl.range(1, k + 1):
        b = tl.load(own + (i - 1) * stride + BETA)
        ratio = b / pivot
        forward = 1.0 + ratio * forward
        pivot = tl.maximum(theta - tl.load(own + i * stride + ALPHA) - b * ratio, least)
        tl.store(own + i * stride + PROJECTION, pivot)
        tl.store(own + i * stride + FORWARD, forward)
    tl.debug_barrier()
    last = forward / pivot
    tl.store(own + k * stride + COMPONENT, last)
    s = last
    squares = s * s
    for back in tl.range(0, k):
        at = own + (k - 1 - back) * stride
        s = (tl.load(at + FORWARD) + tl.load(at + BETA) * s) / tl.load(at + PROJECTION)
        squares += s * s
        tl.store(at + COMPONENT, s)
    tl.debug_barrier()
    return last / tl.sqrt(squares)


def launch_lanczos(work: Work, krylov: Krylov, k: int, tol: float, max_iter: int) -> None:
    """Step k of every matrix at work, after a launch of kernels/penalty.py from krylov.q into krylov.z."""
    launch(
        _lanczos_kernel,
        work.rows.shape[0],
        work.rows,
        work.sums,
        krylov.basis,
        krylov.projected,
        krylov.bracket,
        krylov.status,
        krylov.q,
        krylov.z,
        krylov.rest,
        k,
        max_iter,
        krylov.status.shape[0],
        krylov.q.shape[0],
        tol,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["matrices", "total"])
def _ritz_kernel(rows, basis, projected, status, z, x_out, matrices, total):
    """x = Q s / ||Q s||, each matrix from as many Lanczos vectors as it took; z is scratch."""
    row = rows + tl.program_id(0).to(tl.int64) * FIELDS
    index = tl.load(row + INDEX)
    n = tl.load(row + COLUMNS).to(tl.int32)
    count = tl.abs(tl.load(status + index))
    stride = matrices.to(tl.int64) * ENTRIES
    wide_total = total.to(tl.int64)
    own = projected + index * ENTRIES + COMPONENT
    at = tl.load(row + V_AT)
    squares = tl.full((), 0.0, tl.float64)
    for first in tl.range(0, count, VECTOR):
        i = first + tl.arange(0, VECTOR)
        s = tl.load(own + i * stride, mask=i < count, other=0.0)
        squares += tl.sum(s * s, axis=0)
    inverse = 1.0 / tl.sqrt(squares)  # before s is rounded to float32, whose range it may leave
    squares = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, n, PANEL_COLUMNS):
        columns = start + tl.arange(0, PANEL_COLUMNS)
        x = tl.zeros((PANEL_COLUMNS,), tl.float32)
        for first in tl.range(0, count, PANEL_ROWS):
            i = first + tl.arange(0, PANEL_ROWS)
            s = (tl.load(own + i * stride, mask=i < count, other=0.0) * inverse).to(tl.float32)
            mask = (i < count)[:, None] & (columns < n)[None, :]
            q = basis + at + i.to(tl.int64)[:, None] * wide_total + columns[None, :]
            x += tl.sum(tl.load(q, mask=mask, other=0.0) * s[:, None], axis=0)
        tl.store(z + at + columns, x, mask=columns < n)
        wide = x.to(tl.float64)
        squares += tl.sum(wide * wide, axis=0)
    tl.debug_barrier()
    inverse = 1.0 / tl.sqrt(squares)
    for start in tl.range(0, n, VECTOR):
        columns = start + tl.arange(0, VECTOR)
        x = tl.load(z + at + columns, mask=columns < n, other=0.0).to(tl.float64) * inverse
        tl.store(x_out + at + columns, x.to(tl.float32), mask=columns < n)


def launch_ritz(work: Work, krylov: Krylov) -> None:
    """The Ritz vector of every matrix into krylov.q."""
    launch(
        _ritz_kernel,
        work.rows.shape[0],
        work.rows,
        krylov.basis,
        krylov.projected,
        krylov.status,
        krylov.z,
        krylov.q,
        krylov.status.shape[0],
        krylov.q.shape[0],
        num_warps=WARPS,
    )


@triton.jit
def _bound_kernel(rows, sums, x, v, u, sigma, bound):
    """sigma_1^2 <= ||y||^2 + ||z - ||y||^2 x||, of y = W x and z = W'y: how far above sigma it may lie."""
    row = rows + tl.program_id(0).to(tl.int64) * FIELDS
    index = tl.load(row + INDEX)
    m = tl.load(row + ROWS).to(tl.int32)
    n = tl.load(row + COLUMNS).to(tl.int32)
    at = tl.load(row + V_AT)
    term = sums + tl.load(row + TERM_AT)
    y_norm = tl.load(term + Y_NORM)
    z_norm = tl.load(term + Z_NORM)
    square = y_norm * y_norm
    squares = tl.full((), 0.0, tl.float64)
    for start in tl.range(0, n, VECTOR):
        columns = start + tl.arange(0, VECTOR)
        mask = columns < n
        old = tl.load(x + at + columns, mask=mask, other=0.0).to(tl.float64)
        rest = z_norm * tl.load(v + at + columns, mask=mask, other=0.0).to(tl.float64) - square * old
        squares += tl.sum(rest * rest, axis=0)
    found = tl.load(sigma + index).to(tl.float64)
    exact = z_norm / tl.where(y_norm == 0.0, 1.0, y_norm)
    above = tl.sqrt(square + tl.sqrt(squares)) - exact
    rounding = 4.0 * EPSILON * exact
    result = tl.where(above > 0.0, above, 0.0) + rounding
    regular = found > 0.0  # neither zero nor NaN, which are their own bounds
    tl.store(bound + index, tl.where(regular, result, found).to(tl.float32))
    if not regular:  # the step has left no pair of vectors there: u = 0, and v the vector it began with
        for start in tl.range(0, n, VECTOR):
            columns = start + tl.arange(0, VECTOR)
            old = tl.load(x + at + columns, mask=columns < n, other=0.0)
            tl.store(v + at + columns, old, mask=columns < n)
        for start in tl.range(0, m, VECTOR):
            places = start + tl.arange(0, VECTOR)
            tl.store(u + tl.load(row + U_AT) + places, tl.zeros((VECTOR,), tl.float32), mask=places < m)


def launch_bound(work: Work, x: Any, v: Any, u: Any, sigma: Any, bound: Any) -> None:
    """The bound of every matrix after a step of kernels/penalty.py from x to v; u and v where that found none."""
    launch(_bound_kernel, work.rows.shape[0], work.rows, work.sums, x, v, u, sigma, bound, num_warps=WARPS)
