"""Warm power iteration of many matrices: sigma, u and the next v from one read of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.checks import check_matrices, check_no_batch, check_positive_int, check_vectors
from spectral_ops.ops.layer_table import layer_table
from spectral_ops.ops.layout import Layout, has_operators, pack, sizes, starts, unpack
from spectral_ops.ops.linear_map import LinearMap, Matrices, linear_map
from spectral_ops.ops.registry import define


def power_iteration(
    weights: Sequence[Tensor], v: Sequence[Tensor], *, n_iter: int = 1
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Steps of power iteration on every matrix of a list, each step reading each matrix once.

    Equivalent to, for every (w, v):

        for _ in range(n_iter):
            y = w @ v
            z = w.T @ y
            sigma, u, v = z.norm() / y.norm(), y / y.norm(), z / z.norm()

    Args:
        weights: matrices (m_i, n_i), float32, bfloat16, float16 (or all float64), any strides, one device. A weight
            of more dimensions is read as (shape[0], the rest).
        v: unit vectors (n_i,), float32 (float64 for float64 weights), updated in place.
        n_iter: steps; 1 is enough where v is kept from one training step to the next.

    Returns:
        sigma (L,): ||W'u|| at the last step, at most sigma_1 up to rounding; u: list of unit vectors (m_i,); v itself.
        sigma and u are float32, or float64 for float64 weights. Where W v = 0, sigma and u are 0 and v becomes
        another, fixed unit vector; where W is not finite, sigma is NaN and v stays. No gradient flows through any of
        them: use `spectral_penalty` or `spectral_norm`.

    Raises:
        TypeError, ValueError: a weight or vector of the wrong type, dtype, shape or device; n_iter below 1.
        NotImplementedError: a weight or vector under vmap.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., 8.2.1; docs/design.md, section 2.

    Example:
        >>> w = torch.diag(torch.tensor([3.0, 1.0]))
        >>> sigma, u, v = power_iteration([w], [torch.ones(2) / 2**0.5], n_iter=20)
        >>> round(sigma.item(), 4)
        3.0
    """
    check_matrices("power_iteration", weights)
    check_no_batch("power_iteration", weights, "weights")
    check_vectors("power_iteration", weights, v)
    check_no_batch("power_iteration", v, "v")
    n_iter = check_positive_int("power_iteration", "n_iter", n_iter)
    layouts = [Layout()] * len(weights)
    sigma, u, v_new, _ = torch.ops.spectral_ops.power_iteration(
        [w.detach() for w in weights], flatten(v), zero_exponents(weights, layouts), pack(layouts), n_iter
    )
    commit(v, v_new)
    return sigma, list(u.split([w.shape[0] for w in weights])), list(v)


def power_iteration_ref(w: Tensor | LinearMap, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step for a stack of maps, (parts, m, n) or a LinearMap, and vectors (parts, n), on any device."""
    maps = Matrices(w.to(v.dtype)) if isinstance(w, Tensor) else w
    if maps.m == 0 or maps.n == 0:
        return v.new_zeros(maps.parts), v.new_zeros(maps.parts, maps.m), v.clone()
    # Scaled by a power of two to elements of about 1, so that y and z stay in range; exact, and undone in sigma.
    largest = maps.largest()
    finite = largest.isfinite()
    exponent = torch.where(finite & (largest > 0), torch.frexp(largest).exponent, 0)
    maps = maps.scaled(-exponent)
    y = maps.apply(v)
    # y may be small where v is almost orthogonal to the rows: its direction counts, so it is scaled before it is
    # squared.
    top = y.abs().amax(dim=1, keepdim=True)
    zero = top == 0
    y = y / torch.where(zero, torch.ones_like(top), top)
    z = maps.adjoint(y)
    y_norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    z_norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    zero = zero | (z_norm == 0)
    sigma = torch.where(zero, torch.zeros_like(z_norm), z_norm / y_norm).squeeze(1)
    u = torch.where(zero, torch.zeros_like(y), y / y_norm)
    v_new = torch.where(zero, another_unit_vector(v), z / z_norm)
    bad = ~finite
    sigma = torch.where(bad, torch.full_like(sigma, float("nan")), torch.ldexp(sigma, exponent))
    u = torch.where(bad[:, None], torch.full_like(u, float("nan")), u)
    return sigma, u, torch.where(bad[:, None], v, v_new)


def another_unit_vector(v: Tensor) -> Tensor:
    """The unit vectors (parts, n) that replace v where W v = 0: a hash of column and v[0], the same as csrc's."""
    parts, n = v.shape
    if n <= 1:
        return -v
    seed = v[:, :1].float().view(torch.int32).to(torch.int64)
    x = lowbias32((torch.arange(n, device=v.device) * 0x9E3779B9 + seed) & 0xFFFFFFFF)
    out = (x >> 8).to(torch.float64) * 2.0**-23 - 1.0
    return (out / torch.linalg.vector_norm(out, dim=1, keepdim=True)).to(v.dtype)


def lowbias32(x: Tensor) -> Tensor:
    """C. Wellons' hash of 32 bits, https://nullprogram.com/blog/2018/07/31/, of int64 numbers below 2^32."""
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    """x * factor mod 2^32 for x < 2^32, in int64: in two halves, since the whole product may pass 2^63."""
    low = (x & 0xFFFF) * factor
    high = (((x >> 16) * factor) & 0xFFFF) << 16
    return (low + high) & 0xFFFFFFFF


def flatten(v: Sequence[Tensor]) -> Tensor:
    """The list of vectors as one new tensor."""
    return torch.cat(list(v))


def commit(v: Sequence[Tensor], v_new: Tensor) -> None:
    """Writes the flat result of an op back into the caller's vectors; on a device in one launch or few."""
    torch._foreach_copy_(list(v), list(v_new.split([x.shape[0] for x in v])))


def counts(weights: Sequence[Tensor], layouts: Sequence[Layout]) -> tuple[int, int, int]:
    """(matrices, total rows, total columns) over the matrices of a list."""
    end = starts([w.shape for w in weights], layouts)[-1]
    return end.number, end.u, end.v


def zero_exponents(weights: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """Exponents when nothing is known of sigma yet; a backend renews them where that leaves its range."""
    return torch.zeros(counts(weights, layouts)[0], dtype=torch.int32, device=weights[0].device)


def exponents_of(sigma: Tensor, old: Tensor) -> Tensor:
    """floor(log2 sigma) where that exists, else the old one."""
    known = (sigma > 0) & sigma.isfinite()
    return torch.where(known, torch.frexp(sigma).exponent - 1, old)


# ---- the registered op: (weights, flat v, exponents) -> sigma, flat u, flat v, exponents; nothing is mutated ----


def steps_ref(
    weights: Sequence[Tensor], v: Tensor, exponents: Tensor, layouts: Sequence[Layout], n_iter: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered op in plain torch."""
    sigmas, us, vs = [v.new_empty(0)], [v.new_empty(0)], [v.new_empty(0)]
    start = 0
    for w, layout in zip(weights, layouts, strict=True):
        if not layout.is_matrix:
            continue
        parts, _, n = sizes(w.shape, layout)
        maps = linear_map(w, layout, v.dtype)
        part_v = v[start : start + parts * n].view(parts, n)
        start += parts * n
        for _ in range(n_iter):
            sigma, u, part_v = power_iteration_ref(maps, part_v)
        sigmas.append(sigma)
        us.append(u.flatten())
        vs.append(part_v.flatten())
    sigma = torch.cat(sigmas)
    return sigma, torch.cat(us), torch.cat(vs), exponents_of(sigma, exponents)


def _power_iteration(
    weights: list[Tensor], v: Tensor, exponents: Tensor, layouts: str, n_iter: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = backends.choose(v.device, backends.op_name("power_iteration", has_operators(layouts)), v.dtype)
    if backend == "reference":
        return steps_ref(weights, v, exponents, unpack(layouts), n_iter)
    ones = [1.0] * len(weights)
    table = layer_table(layouts, ones, ones, weights)
    state = table.empty_state(weights, v, exponents)
    assert state.u is not None
    launcher = table.launcher(backend, v.device)
    if launcher is not None:
        launcher.step(weights, (), state, 2.0, iterations=n_iter)
    else:
        work = table.native.at(weights)
        state.v_out.copy_(v)
        work.table.step(
            work.weights,
            [],
            state.v_out.data_ptr(),
            state.v_out.data_ptr(),
            exponents.data_ptr(),
            state.exponents_out.data_ptr(),
            state.sigma.data_ptr(),
            state.u.data_ptr(),
            0,
            2.0,
            1.0,
            1.0,
            n_iter,
            torch.get_num_threads(),
        )
    return state.sigma, state.u, state.v_out, state.exponents_out


def _power_iteration_fake(
    weights: list[Tensor], v: Tensor, exponents: Tensor, layouts: str, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    matrices, rows, _ = counts(weights, unpack(layouts))
    return v.new_empty(matrices), v.new_empty(rows), torch.empty_like(v), torch.empty_like(exponents)


define(
    "power_iteration(Tensor[] weights, Tensor v, Tensor exponents, str layouts, int n_iter)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _power_iteration,
    fake=_power_iteration_fake,
)
