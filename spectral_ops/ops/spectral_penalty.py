"""R(theta), its gradient, and what a step leaves for the next: one read of every weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.checks import (
    check_exponent,
    check_matrices,
    check_no_transform,
    check_target,
    check_upstream,
    check_vectors,
)
from spectral_ops.ops.layer_table import layer_table
from spectral_ops.ops.layout import Kind, Layout, as_matrices, has_operators, pack, sizes, unpack
from spectral_ops.ops.linear_map import Matrices, linear_map
from spectral_ops.ops.power_iteration import commit, counts, flatten, power_iteration_ref, steps_ref, zero_exponents
from spectral_ops.ops.registry import LIBRARY, define


def spectral_penalty(
    weights: Sequence[Tensor], v: Sequence[Tensor], *, exponent: float = 2.0, target: float = 1.0
) -> Tensor:
    """The sum over matrices of (sigma^k - t^k)^2, differentiable in the weights; one warm step of power iteration.

    Equivalent to

        total = 0
        for w, x in zip(weights, v):
            with torch.no_grad():
                u = torch.nn.functional.normalize(w @ x, dim=0)
                x.copy_(torch.nn.functional.normalize(w.T @ u, dim=0))
            sigma = torch.linalg.vector_norm(w.T @ u)
            total = total + (sigma**exponent - target**exponent) ** 2

    Args:
        weights: matrices (m_i, n_i), float32, bfloat16, float16 (or all float64), any strides, one device. A weight
            of more dimensions is read as (shape[0], the rest).
        v: unit vectors (n_i,), float32 (float64 for float64 weights), updated in place at every call, whether or not
            gradients are enabled. Start from `spectral_norm(weights, return_vectors=True)`, or from anything.
        exponent: k >= 1; 2 is the paper's.
        target: t >= 0, where sigma is pulled to; 1 is the paper's.

    Returns:
        R, 0-d, in v's dtype. sigma is a lower bound of sigma_1, exact once v has converged.

    Gradient: 2 k s^(k-1) (s^k - t^k) u v', the exact gradient of ||W'u|| at fixed u; not differentiable twice. Inside
        of torch.utils.checkpoint the recomputation starts from the v that the forward has advanced, so that the
        gradient is that of the next step: call it outside of the checkpointed function.

    Raises:
        TypeError, ValueError: a weight or vector of the wrong type, dtype, shape or device; an exponent below 1, a
            target below 0, or one that is not finite.
        NotImplementedError: a weight or vector under forward-mode differentiation or a transform of torch.func (grad,
            vjp, jacrev, vmap), gradients in batches.

    Source: Lewandowski et al., ICLR 2025, arXiv 2406.06811, section 4; docs/design.md, section 2.

    Example:
        >>> w = torch.eye(3, requires_grad=True)
        >>> spectral_penalty([w], [torch.tensor([1.0, 0.0, 0.0])]).item()
        0.0
    """
    check_matrices("spectral_penalty", weights)
    check_no_transform("spectral_penalty", weights)
    check_vectors("spectral_penalty", weights, v)
    check_no_transform("spectral_penalty", v, "v")
    exponent = check_exponent("spectral_penalty", exponent)
    target = check_target("spectral_penalty", target)
    layouts = [Layout()] * len(weights)
    value, _, _, v_new, _ = torch.ops.spectral_ops.spectral_penalty(
        list(weights),
        flatten(v),
        zero_exponents(weights, layouts),
        pack(layouts),
        [target] * len(weights),
        [1.0] * len(weights),
        exponent,
    )
    commit(v, v_new)
    return value


def spectral_penalty_ref(w: Tensor, v: Tensor, exponent: float = 2.0, target: float = 1.0) -> tuple[Tensor, Tensor]:
    """(R, the next v) for a stack of matrices (parts, m, n) in plain torch; autograd gives the gradient at fixed u."""
    sigma, u, v_new = power_iteration_ref(w.detach(), v)
    sigma_of_w = torch.linalg.vector_norm(torch.einsum("pmn,pm->pn", w.to(v.dtype), u), dim=1)
    # Where W v = 0, u is 0 and so is the gradient.
    return ((torch.where(sigma == 0, 0.0, sigma_of_w) ** exponent - target**exponent) ** 2).sum(), v_new


def vector_penalty_ref(x: Tensor, kind: Kind, exponent: float, target: float) -> Tensor:
    """The term of vector parameters (parts, n) in plain torch; autograd gives the gradient."""
    if kind == Kind.BIAS:
        return (x.square().sum(dim=1) ** exponent).sum()
    if kind == Kind.SHIFT:
        return (x.square() ** exponent).sum()
    return ((x.abs() ** exponent - target**exponent) ** 2).sum()


def vector_gradient_ref(x: Tensor, kind: Kind, exponent: float, target: float) -> Tensor:
    """The gradient of `vector_penalty_ref`, by hand: ops also run where autograd is off (inference, dispatch modes)."""
    if kind == Kind.BIAS:
        return 2 * exponent * x.square().sum(dim=1, keepdim=True) ** (exponent - 1) * x
    if kind == Kind.SHIFT:
        return 2 * exponent * x.square() ** (exponent - 1) * x
    size = x.abs()
    return 2 * exponent * size ** (exponent - 1) * (size**exponent - target**exponent) * x.sign()


# ---- the registered ops ----


def slope(sigma: Tensor, exponent: float, target: Tensor | float) -> Tensor:
    """d/ds (s^k - t^k)^2; 0 at s = 0, where u and v do not exist."""
    return torch.where(sigma == 0, 0.0, 2 * exponent * sigma ** (exponent - 1) * (sigma**exponent - target**exponent))


def _as_vectors(w: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    return as_matrices(w.detach(), layout).reshape(layout.parts, -1).to(dtype)


def penalty_ref(
    weights: Sequence[Tensor],
    v: Tensor,
    exponents: Tensor,
    layouts: Sequence[Layout],
    targets: Sequence[float],
    scales: Sequence[float],
    exponent: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The registered op in plain torch: R, sigma, flat u, flat v, exponents."""
    sigma, u, v_new, exponents_new = steps_ref(weights, v, exponents, layouts, 1)
    value = v.new_zeros(())
    start = 0
    for w, layout, target, scale in zip(weights, layouts, targets, scales, strict=True):
        if not layout.is_matrix:
            value = value + scale * vector_penalty_ref(_as_vectors(w, layout, v.dtype), layout.kind, exponent, target)
            continue
        parts, m, n = sizes(w.shape, layout)
        if m > 0 and n > 0:  # a matrix without rows or columns counts for nothing
            value = value + scale * ((sigma[start : start + parts] ** exponent - target**exponent) ** 2).sum()
        start += parts
    return value, sigma, u, v_new, exponents_new


def gradient_ref(
    w: Tensor, layout: Layout, sigma: Tensor, u: Tensor, v: Tensor, exponent: float, target: float
) -> Tensor:
    """dR/dW in the vector dtype, of the shape `as_matrices(w, layout)` has; u and v flat."""
    view = as_matrices(w, layout)
    if not layout.is_matrix:
        x = _as_vectors(w, layout, v.dtype)
        return vector_gradient_ref(x, layout.kind, exponent, target).view(view.shape)
    parts, m, n = sizes(w.shape, layout)
    left = slope(sigma, exponent, target)[:, None] * u.view(parts, m)
    maps = linear_map(w, layout, v.dtype)
    gradient = maps.gradient(left, v.view(parts, n))
    return gradient.view(view.shape) if isinstance(maps, Matrices) else as_matrices(gradient, layout)


def gradients_ref(
    weights: Sequence[Tensor],
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    layouts: Sequence[Layout],
    targets: Sequence[float],
    scales: Sequence[float],
    exponent: float,
) -> list[Tensor]:
    """scale * dR/dW for every weight, each of the shape its layout is read in."""
    out = []
    at_sigma = at_u = at_v = 0
    for w, layout, target, scale in zip(weights, layouts, targets, scales, strict=True):
        parts, m, n = sizes(w.shape, layout) if layout.is_matrix else (0, 0, 0)
        gradient = gradient_ref(
            w,
            layout,
            sigma[at_sigma : at_sigma + parts],
            u[at_u : at_u + parts * m],
            v[at_v : at_v + parts * n],
            exponent,
            target,
        )
        out.append(scale * gradient)
        at_sigma, at_u, at_v = at_sigma + parts, at_u + parts * m, at_v + parts * n
    return out


def _penalty(
    weights: list[Tensor],
    v: Tensor,
    exponents: Tensor,
    layouts: str,
    targets: list[float],
    scales: list[float],
    exponent: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend = backends.choose(v.device, backends.op_name("spectral_penalty", has_operators(layouts)), v.dtype)
    if backend == "reference":
        return penalty_ref(weights, v, exponents, unpack(layouts), targets, scales, exponent)
    table = layer_table(layouts, targets, scales, weights)
    state = table.empty_state(weights, v, exponents)
    assert state.u is not None
    launcher = table.launcher(backend, v.device)
    if launcher is not None:
        value = launcher.step(weights, (), state, exponent)
    else:
        value, work = v.new_empty(()), table.native.at(weights)
        work.table.step(
            work.weights,
            [],
            v.data_ptr(),
            state.v_out.data_ptr(),
            exponents.data_ptr(),
            state.exponents_out.data_ptr(),
            state.sigma.data_ptr(),
            state.u.data_ptr(),
            value.data_ptr(),
            exponent,
            1.0,
            1.0,
            1,
            torch.get_num_threads(),
        )
    return value, state.sigma, state.u, state.v_out, state.exponents_out


def _penalty_fake(
    weights: list[Tensor], v: Tensor, exponents: Tensor, layouts: str, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    matrices, rows, _ = counts(weights, unpack(layouts))
    return v.new_empty(()), v.new_empty(matrices), v.new_empty(rows), torch.empty_like(v), torch.empty_like(exponents)


def _penalty_backward(
    upstream: Tensor,
    weights: list[Tensor],
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    layouts: str,
    targets: list[float],
    scales: list[float],
    exponent: float,
) -> list[Tensor]:
    out = _penalty_backward_fake(upstream, weights)
    backend = backends.choose(v.device, backends.op_name("spectral_penalty", has_operators(layouts)), v.dtype)
    table = layer_table(layouts, targets, scales, weights)
    launcher = table.launcher(backend, v.device)
    if launcher is not None:
        launcher.backward(weights, out, sigma, u, v, exponent, upstream)
        return out
    if backend == "reference":
        kinds = unpack(layouts)
        gradients = gradients_ref(weights, sigma, u, v, kinds, targets, scales, exponent)
        for store, gradient, layout in zip(out, gradients, kinds, strict=True):
            as_matrices(store, layout).copy_(upstream * gradient)
        return out
    work = table.native.at(weights, out)
    work.table.backward(
        work.weights,
        work.gradients,
        sigma.data_ptr(),
        u.data_ptr(),
        v.data_ptr(),
        exponent,
        upstream.item(),
        False,
        torch.get_num_threads(),
    )
    return out


def _penalty_backward_fake(upstream: Tensor, weights: list[Tensor], *others: Any) -> list[Tensor]:
    # preserve_format gives an expanded weight a dense gradient, as autograd's own accumulation does.
    return [torch.empty_like(w) for w in weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights, _, _, ctx.layouts, ctx.targets, ctx.scales, ctx.exponent = inputs
    _, sigma, u, v_new, exponents_new = output
    ctx.mark_non_differentiable(sigma, u, v_new, exponents_new)
    ctx.save_for_backward(*weights, sigma, u, v_new)


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    check_upstream("spectral_penalty", upstream)
    *weights, sigma, u, v_new = ctx.saved_tensors
    gradients = torch.ops.spectral_ops.spectral_penalty_backward(
        upstream, weights, sigma, u, v_new, ctx.layouts, ctx.targets, ctx.scales, ctx.exponent
    )
    return gradients, None, None, None, None, None, None


define(
    "spectral_penalty(Tensor[] weights, Tensor v, Tensor exponents, str layouts, float[] targets, float[] scales,"
    " float exponent) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _penalty,
    fake=_penalty_fake,
)
define(
    "spectral_penalty_backward(Tensor upstream, Tensor[] weights, Tensor sigma, Tensor u, Tensor v, str layouts,"
    " float[] targets, float[] scales, float exponent) -> Tensor[]",
    _penalty_backward,
    fake=_penalty_backward_fake,
)
torch.library.register_autograd(
    "spectral_ops::spectral_penalty", _differentiate, setup_context=_setup_context, lib=LIBRARY
)


def refuse_second_derivative(*_: Any) -> None:
    raise RuntimeError(
        "spectral_penalty: expected one differentiation, got a second one through its gradient. Take the penalty out "
        "of what is differentiated twice: accumulate_grad_ after backward."
    )


# Without it torch would take the second derivative for zero, with a warning.
torch.library.register_autograd("spectral_ops::spectral_penalty_backward", refuse_second_derivative, lib=LIBRARY)
