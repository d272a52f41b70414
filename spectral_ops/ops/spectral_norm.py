"""sigma_1 to a tolerance, of many matrices at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.checks import check_matrices, check_no_transform, check_positive_int, check_tol, check_upstream
from spectral_ops.ops.layer_table import layer_table
from spectral_ops.ops.layout import Layout, as_matrices, has_operators, pack, sizes, unpack, vector_dtype
from spectral_ops.ops.linear_map import LinearMap, Matrices, linear_map
from spectral_ops.ops.power_iteration import another_unit_vector, counts, exponents_of
from spectral_ops.ops.registry import LIBRARY, define, warn

# Reads of a matrix after which the iteration gives up. A random 65536 x 65536 matrix, whose top singular values lie as
# close as those of trained layers hardly ever do, needs about 150 for 1e-6.
MAX_ITER = 256


@overload
def spectral_norm(
    w: Tensor | Sequence[Tensor], *, tol: float = ..., max_iter: int = ...,
    return_bound: Literal[False] = ..., return_vectors: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def spectral_norm(
    w: Tensor | Sequence[Tensor], *, tol: float = ..., max_iter: int = ...,
    return_bound: Literal[True], return_vectors: Literal[False] = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def spectral_norm(
    w: Tensor, *, tol: float = ..., max_iter: int = ...,
    return_bound: Literal[False] = ..., return_vectors: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def spectral_norm(
    w: Tensor, *, tol: float = ..., max_iter: int = ...,
    return_bound: Literal[True], return_vectors: Literal[True],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def spectral_norm(
    w: Sequence[Tensor], *, tol: float = ..., max_iter: int = ...,
    return_bound: Literal[False] = ..., return_vectors: Literal[True],
) -> tuple[Tensor, list[Tensor], list[Tensor]]: ...  # fmt: skip
@overload
def spectral_norm(
    w: Sequence[Tensor], *, tol: float = ..., max_iter: int = ...,
    return_bound: Literal[True], return_vectors: Literal[True],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]: ...  # fmt: skip
@overload
def spectral_norm(
    w: Tensor | Sequence[Tensor], *, tol: float = ..., max_iter: int = ...,
    return_bound: bool = ..., return_vectors: bool = ...,
) -> Any: ...  # fmt: skip
def spectral_norm(
    w: Tensor | Sequence[Tensor],
    *,
    tol: float = 1e-6,
    max_iter: int = MAX_ITER,
    return_bound: bool = False,
    return_vectors: bool = False,
) -> Any:
    """The largest singular value of a matrix, or of every matrix of a list, converged; differentiable.

    Equivalent to `torch.linalg.matrix_norm(w, 2)`, or `torch.stack([torch.linalg.matrix_norm(w, 2) for w in list])`,
    without the full SVD behind it.

    Args:
        w: a matrix (m, n), or a list of matrices, float32, bfloat16, float16 (or all float64), any strides, one device.
            More dimensions are read as (shape[0], the rest).
        tol: relative error of sigma at which the iteration stops, judged by the residual. float32 resolves about 1e-7.
        max_iter: reads of a matrix at most; a RuntimeWarning says when they did not suffice.
        return_bound: append the bound.
        return_vectors: append u and v.

    Returns:
        sigma: 0-d for a matrix, (L,) for a list; float32, or float64 for float64 weights. Never above sigma_1 beyond
            rounding.
        bound (return_bound): like sigma, from the residual: sigma_1 <= sigma + bound where the iteration, from a fixed
            random vector, has found the top singular value, and no certificate that it has. The error is smaller then,
            about the square of bound / sigma where the top value stands apart. Among values within tol of one another
            it may have stopped at a lower one: at tol of 1e-2 and more at a few per cent below the top of a Gaussian
            matrix, by default at 1 where one of a thousand singular values is 1 + 3e-6 and the others are 1.
        u (m,), v (n,) (return_vectors), or lists of them: unit vectors with w' u = sigma v. No gradient flows through
            them.
        A zero matrix has sigma = 0, u = 0; one with an infinity or NaN has sigma = NaN and such a
            gradient; an empty one has sigma = 0.

    Gradient: u v', that of a simple largest singular value; a subgradient where it is repeated. Not differentiable
        twice.

    Raises:
        TypeError, ValueError: a weight of the wrong type, dtype, shape or device; a tol outside of 0 < tol < 1;
            max_iter below 1.
        NotImplementedError: a weight under forward-mode differentiation or a transform of torch.func (grad, vjp,
            jacrev, vmap), gradients in batches.

    Source: Lanczos on w'w with full reorthogonalisation, Golub and Van Loan, Matrix Computations, 4th ed., 10.1-10.4.

    Example:
        >>> spectral_norm(torch.diag(torch.tensor([3.0, 1.0]))).item()
        3.0
    """
    single = isinstance(w, Tensor)
    weights: list[Tensor] = [w] if isinstance(w, Tensor) else list(w) if isinstance(w, (list, tuple)) else w  # type: ignore[assignment]
    check_matrices("spectral_norm", weights, "w", single=single)
    check_no_transform("spectral_norm", weights, "w", single=single)
    tol = check_tol("spectral_norm", tol)
    max_iter = check_positive_int("spectral_norm", "max_iter", max_iter)
    layouts = pack([Layout()] * len(weights))
    sigma, bound, u, v, _ = torch.ops.spectral_ops.spectral_norm(weights, layouts, tol, max_iter)
    us = u.split([x.shape[0] for x in weights])
    vs = v.split([math.prod(x.shape[1:]) for x in weights])
    out: list[Any] = [sigma[0] if single else sigma]
    if return_bound:
        out.append(bound[0] if single else bound)
    if return_vectors:
        out += [us[0], vs[0]] if single else [list(us), list(vs)]
    return out[0] if len(out) == 1 else tuple(out)


def _product_dtype(w: Tensor) -> torch.dtype:
    """Of the oracle's products. The error of torch's float32 sums over rows on a CPU grows with their length: 8e-5 of
    sigma for a million. On most GPUs float64 is slow."""
    return torch.float64 if w.device.type == "cpu" else vector_dtype(w.dtype)


def spectral_norm_ref(
    w: Tensor | LinearMap, tol: float = 1e-6, max_iter: int = MAX_ITER, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """(sigma, bound, u, v, converged) of one matrix (m, n), or of a LinearMap of one part, on any device.

    dtype: of what is returned; the vector dtype of w if not given. Syncs with the host at every step.
    """
    if isinstance(w, Tensor):
        dtype = dtype or vector_dtype(w.dtype)
        w = Matrices(w.detach().to(_product_dtype(w))[None])
    dtype = dtype or w.w.dtype
    sigma, bound, u, v, converged = _lanczos(w, tol, max_iter)
    bound = bound.to(dtype) + 4 * torch.finfo(dtype).eps * sigma.to(dtype)
    return sigma.to(dtype), bound, u.to(dtype), v.to(dtype), converged


def _lanczos(maps: LinearMap, tol: float, max_iter: int) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """The same in the dtype of the map's elements, its bound without rounding."""
    elements, m, n = maps.w, maps.m, maps.n
    dtype = elements.dtype
    q = another_unit_vector(elements.new_zeros(1, n))[0] if n > 1 else elements.new_ones(n)
    largest = maps.largest()[0] if elements.numel() else elements.new_zeros(())
    if not largest.isfinite() or largest == 0:
        value = elements.new_zeros(()) if largest == 0 else elements.new_full((), float("nan"))
        return value, value.clone(), elements.new_zeros(m), q, True
    power = torch.frexp(largest).exponent
    maps = maps.scaled(-power[None])  # exact; elements of about 1
    basis: list[Tensor] = []
    diagonal: list[float] = []  # of the matrix projected on the basis, which is tridiagonal
    beside: list[float] = []
    converged = False
    for k in range(max_iter):
        basis.append(q)
        z = maps.adjoint(maps.apply(q[None]))[0]
        columns = torch.stack(basis, dim=1)
        diagonal.append(0.0)
        for _ in range(2):  # twice is enough (Parlett, 6.9)
            h = columns.T @ z
            z = z - columns @ h
            diagonal[k] += h[k].item()
        beta = torch.linalg.vector_norm(z).item()
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        theta = values[-1].item()
        converged = beta * abs(vectors[-1, -1].item()) <= 2 * tol * theta
        # What is left of z when the space is invariant is rounding.
        converged = converged or beta <= 4 * torch.finfo(dtype).eps * max(diagonal) or k + 1 == n
        if converged or k + 1 == max_iter:
            break
        beside.append(beta)
        q = z / beta
    x = torch.stack(basis, dim=1) @ vectors[:, -1].to(elements)
    x = x / torch.linalg.vector_norm(x)
    y = maps.apply(x[None])[0]
    z = maps.adjoint(y[None])[0]
    y_norm, z_norm = torch.linalg.vector_norm(y), torch.linalg.vector_norm(z)
    if y_norm == 0 or z_norm == 0:  # a convolution whose windows see nothing but padding
        return y_norm * 0, y_norm * 0, torch.zeros_like(y), x, True
    sigma = z_norm / y_norm
    rest = torch.linalg.vector_norm(z - y_norm.square() * x)
    bound = ((y_norm.square() + rest).sqrt() - sigma).clamp(min=0)
    return torch.ldexp(sigma, power), torch.ldexp(bound, power), y / y_norm, z / z_norm, converged


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    middle, side = torch.tensor(diagonal, dtype=torch.float64), torch.tensor(beside, dtype=torch.float64)
    return torch.diag(middle) + torch.diag(side, 1) + torch.diag(side, -1)


# ---- the registered op: weights -> sigma, bound, flat u, flat v, exponents ----


def _norm_ref(
    weights: Sequence[Tensor], layouts: Sequence[Layout], tol: float, max_iter: int
) -> tuple[list[Tensor], int]:
    results = []
    for w, layout in zip(weights, layouts, strict=True):
        maps, dtype = linear_map(w, layout, _product_dtype(w)), vector_dtype(w.dtype)
        results += [spectral_norm_ref(maps.part(i), tol, max_iter, dtype) for i in range(maps.parts)]
    sigma, bound = torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])
    u, v = torch.cat([r[2] for r in results]), torch.cat([r[3] for r in results])
    exponents = exponents_of(sigma, torch.zeros_like(sigma, dtype=torch.int32))
    return [sigma, bound, u, v, exponents], sum(not r[4] for r in results)


def _spectral_norm(
    weights: list[Tensor], layouts: str, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kinds = unpack(layouts)
    op = backends.op_name("spectral_norm", has_operators(layouts))
    backend = backends.choose(weights[0].device, op, vector_dtype(weights[0].dtype))
    if backend == "reference":
        out, unconverged = _norm_ref(weights, kinds, tol, max_iter)
    else:
        ones = [1.0] * len(weights)
        table = layer_table(layouts, ones, ones, weights)
        out = list(_spectral_norm_fake(weights, layouts))
        if backend == "triton":
            from spectral_ops.ops.triton_norm import Norms, converge

            unconverged = converge(table.triton, weights, Norms(*out), tol, max_iter)
        else:
            work = table.native.at(weights)
            unconverged = work.table.spectral_norm(
                work.weights, *(x.data_ptr() for x in out), tol, max_iter, torch.get_num_threads()
            )
    if unconverged:
        warn(
            f"spectral_norm: {unconverged} of {out[0].numel()} matrices had not converged to tol={tol} after "
            f"{max_iter} reads. "
            "Their values are lower bounds: see return_bound, or raise max_iter."
        )
    return tuple(out)  # type: ignore[return-value]


def _spectral_norm_fake(
    weights: list[Tensor], layouts: str, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = weights[0]
    matrices, rows, columns = counts(weights, unpack(layouts))
    dtype = vector_dtype(w.dtype)
    new = [w.new_empty(size, dtype=dtype) for size in (matrices, matrices, rows, columns)]
    return *new, w.new_empty(matrices, dtype=torch.int32)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights, layouts, _, _ = inputs
    sigma, bound, u, v, exponents = output
    ctx.mark_non_differentiable(bound, u, v, exponents)
    # Where sigma is NaN u is 0, and whoever looks for NaN in gradients would see none. The mask and not sigma, which
    # may be changed in place. The weights, of which backward reads how they lie and no more, so that its result depends
    # on them: else a second derivative would be zero, where it is refused.
    ctx.save_for_backward(*weights, sigma.detach().isnan(), u, v)
    ctx.layouts = layouts


def _spectral_norm_backward(
    upstream: Tensor, weights: list[Tensor], u: Tensor, v: Tensor, layouts: str
) -> list[Tensor]:
    gradients = _spectral_norm_backward_fake(upstream, weights)
    at_sigma = at_u = at_v = 0
    for w, gradient, layout in zip(weights, gradients, unpack(layouts), strict=True):
        parts, m, n = sizes(w.shape, layout)
        left = u[at_u : at_u + parts * m].view(parts, m) * upstream[at_sigma : at_sigma + parts, None]
        outer = linear_map(w, layout, v.dtype).gradient(left, v[at_v : at_v + parts * n].view(parts, n))
        if layout.operator is None:
            view = as_matrices(gradient, layout)
            view.copy_(outer.view(view.shape))
        else:
            gradient.copy_(outer)
        at_sigma, at_u, at_v = at_sigma + parts, at_u + parts * m, at_v + parts * n
    return gradients


def _spectral_norm_backward_fake(upstream: Tensor, weights: list[Tensor], *others: Any) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    check_upstream("spectral_norm", upstream)
    *weights, bad, u, v = ctx.saved_tensors
    upstream = upstream.masked_fill(bad, float("nan"))
    gradients = torch.ops.spectral_ops.spectral_norm_backward(upstream, weights, u, v, ctx.layouts)
    return gradients, None, None, None


def _refuse_second_derivative(*_: Any) -> None:
    raise RuntimeError(
        "spectral_norm: expected one differentiation, got a second one through its gradient. Detach sigma where it is "
        "differentiated twice, or take torch.linalg.matrix_norm(w, 2) of the matrix."
    )


define(
    "spectral_norm(Tensor[] weights, str layouts, float tol, int max_iter) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    _spectral_norm,
    fake=_spectral_norm_fake,
)
define(
    "spectral_norm_backward(Tensor upstream, Tensor[] weights, Tensor u, Tensor v, str layouts) -> Tensor[]",
    _spectral_norm_backward,
    fake=_spectral_norm_backward_fake,
)
torch.library.register_autograd(
    "spectral_ops::spectral_norm", _differentiate, setup_context=_setup_context, lib=LIBRARY
)
# u and v would count as constants: a second derivative of sigma^2 would lack a term, without a word.
torch.library.register_autograd("spectral_ops::spectral_norm_backward", _refuse_second_derivative, lib=LIBRARY)


def converged_vectors(
    weights: Sequence[Tensor], layouts: Sequence[Layout], tol: float, max_iter: int = MAX_ITER
) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma, flat v, exponents) of parameters read by `layouts`: the state a warm iteration starts from."""
    weights = [w.detach() for w in weights]
    if all(not layout.is_matrix for layout in layouts):
        empty = weights[0].new_empty(0, dtype=vector_dtype(weights[0].dtype))
        return empty, empty.clone(), empty.to(torch.int32)
    matrices = [(w, layout) for w, layout in zip(weights, layouts, strict=True) if layout.is_matrix]
    sigma, _, _, v, exponents = torch.ops.spectral_ops.spectral_norm(
        [w for w, _ in matrices], pack([layout for _, layout in matrices]), tol, max_iter
    )
    return sigma, v, exponents
