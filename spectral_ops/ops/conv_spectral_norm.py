"""The norm of a conv layer as the linear map it is, converged; and an upper bound of it without iterating on inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_ops.ops.checks import check_no_transform, check_positive_int, check_tol, check_weight
from spectral_ops.ops.conv_operator import ConvOperator, conv_operator
from spectral_ops.ops.layout import Kind, Layout, pack
from spectral_ops.ops.spectral_norm import MAX_ITER

BOUND_TOL = 1e-6  # of the norms in conv_norm_bound; float32 resolves about 1e-7


def conv_spectral_norm(
    weight: Tensor,
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    tol: float = 1e-6,
    max_iter: int = MAX_ITER,
    return_bound: bool = False,
    return_vectors: bool = False,
) -> Any:
    """The largest singular value of what a conv layer does to an input of a given size; differentiable.

    Equivalent to

        x = torch.eye(in_channels * math.prod(input_size)).view(-1, in_channels, *input_size)
        y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)  # a column of the map a row
        torch.linalg.matrix_norm(y.flatten(1), 2)

    and the same for the other conv layers, without that matrix. The arguments are those of torch's layers.

    Args:
        weight: (out_channels, in_channels / groups, *kernel) with 1 to 3 kernel sizes, of a transposed layer
            (in_channels, out_channels / groups, *kernel); float32, bfloat16, float16 or float64, any strides.
        input_size: of the input, one number per spatial dimension, in elements; or one for all.
        stride, dilation: one number per spatial dimension, or one for all.
        padding: the same; or 'same' or 'valid'.
        groups: each maps its own channels, so that the norm is the largest of theirs; all in one call of the op.
        padding_mode: 'zeros' or 'circular'.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed one.
        tol: relative error of sigma at which the iteration stops, judged by the residual. float32 resolves about 1e-7.
        max_iter: applications of the map and its adjoint at most; a RuntimeWarning says when they did not suffice.
        return_bound: append the bound.
        return_vectors: append u and v.

    Returns:
        sigma: 0-d; float32, or float64 for a float64 weight. Never above the norm beyond rounding.
        bound (return_bound): 0-d, over all groups, from the residuals: the norm is at most sigma + bound where the
            iteration has found the top singular values, and no certificate that it has, as in `spectral_norm`.
        u (out_channels, *output_size), v (in_channels, *input_size) (return_vectors): unit vectors of the whole layer,
            the map's adjoint takes u to sigma v; zero outside of the group of the largest norm. No gradient.
        A zero weight has sigma = 0, u = 0; one with an infinity or NaN has sigma = NaN and such a
            gradient; an empty one has sigma = 0.

    Gradient: the correlation of v with u, d(u . conv(v))/dweight: that of a simple largest singular value, a
        subgradient where it is repeated.

    Raises:
        TypeError, ValueError: a weight of the wrong type, dtype or shape; arguments that torch's layers refuse, or with
            which they give no output from this input; tol not between 0 and 1; max_iter below 1.
        NotImplementedError: padding_mode 'reflect' or 'replicate'; a weight under forward-mode differentiation
            or a transform of torch.func, gradients in batches.

    Source: Ryu et al., Plug-and-Play Methods Provably Converge, ICML 2019, arXiv 1905.05406 (power iteration
        with the convolution and its adjoint); Lanczos in its place, see `spectral_norm`.

    Example:
        >>> weight = torch.tensor([[[1.0, 2.0, 1.0]]])
        >>> round(conv_spectral_norm(weight, 8, padding=1, padding_mode="circular").item(), 4)
        4.0
    """
    check_weight("conv_spectral_norm", "weight", weight)
    check_no_transform("conv_spectral_norm", [weight], "weight", single=True)
    operator = conv_operator(
        "conv_spectral_norm",
        weight.shape,
        input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        output_padding=output_padding,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
    )
    tol = check_tol("conv_spectral_norm", tol)
    max_iter = check_positive_int("conv_spectral_norm", "max_iter", max_iter)
    groups = int(groups)
    layouts = pack([Layout(Kind.MATRIX, groups, operator=operator)])
    sigmas, bounds, us, vs, _ = torch.ops.spectral_ops.spectral_norm([weight], layouts, tol, max_iter)
    # One group, not amax: that shares the gradient out among groups that tie, and u and v are of one.
    winner = sigmas.argmax()
    sigma = sigmas.gather(0, winner[None])[0]
    out: list[Any] = [sigma]
    if return_bound:
        out.append((sigmas.detach() + bounds).amax() - sigma.detach())
    if return_vectors:
        others = torch.arange(groups, device=weight.device) != winner
        first, second = weight.shape[0], weight.shape[1] * groups  # channels
        outputs, inputs = (second, first) if transposed else (first, second)
        for flat, channels, size in (
            (us, outputs, operator.output_size(weight.shape[2:])),
            (vs, inputs, operator.input_size),
        ):
            each = flat.view(groups, channels // groups * math.prod(size))
            out.append(each.masked_fill(others[:, None], 0.0).view(channels, *size))
    return out[0] if len(out) == 1 else tuple(out)


class ConvNormBound(NamedTuple):
    """An upper bound of a conv layer's norm: factor * norm, the norm that of its weight unfolded into a matrix."""

    bound: Tensor  # 0-d, differentiable
    norm: Tensor  # 0-d
    factor: float
    rows: tuple[int, ...]  # the kernel dimensions, from 0, that lie in the rows of that matrix


def conv_norm_bound(
    weight: Tensor,
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> ConvNormBound:
    """An upper bound of `conv_spectral_norm` from norms of small matrices: the least over the weight's unfoldings.

    Equivalent to, for a 2-D convolution without groups,

        r, s, t, u = (weight.permute(0, *rows, 1, *columns).reshape(a, b) for each choice of kernel dimensions as rows)
        min(factor * torch.linalg.matrix_norm(x, 2) for factor, x in ...)

    with factors that are sqrt(prod(kernel)) at most (where windows of a circular layer begin at the same place, as they
    do when the output is longer than the input, more: it holds values several times), and less where windows overlap
    less, by stride or because the input is small.

    Args: those of `conv_spectral_norm`.

    Returns:
        ConvNormBound of the group whose bound is the largest. norm is `spectral_norm`'s sigma plus its residual bound,
        so that bound is one up to rounding, and with the proviso made there; float32, or float64 for a float64 weight.
        Where a window lies inside of the input, and of a circular layer (output - 1) * stride < input, it is at most
        sqrt(prod(kernel)) times the norm, and the norm itself, up to that residual, where windows do not overlap.

    Gradient: of bound and norm, that of sigma at the unfolding which attains the least.

    Raises: what `conv_spectral_norm` raises.

    Source: Singla and Feizi, Fantastic Four, ICLR 2021, arXiv 1911.10258 (2-D, stride 1, factor
        sqrt(prod(kernel)) for all four); the factors here are this library's, proved in `_counts`.

    Example:
        >>> weight = torch.tensor([[[1.0, 2.0, 1.0]]])
        >>> round(conv_norm_bound(weight, 8, padding=1).bound.item(), 4)  # sqrt(3 * 6), the norm being 3.88
        4.2426
    """
    check_weight("conv_norm_bound", "weight", weight)
    check_no_transform("conv_norm_bound", [weight], "weight", single=True)
    operator = conv_operator(
        "conv_norm_bound",
        weight.shape,
        input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        output_padding=output_padding,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
    )
    groups, kernel = int(groups), tuple(weight.shape[2:])
    dims = range(len(kernel))
    choices = [rows for count in range(len(kernel) + 1) for rows in itertools.combinations(dims, count)]
    each = [_counts(operator, kernel, i) for i in dims]
    squares = [math.prod(each[i].rows if i in rows else each[i].columns for i in dims) for rows in choices]
    factors = [math.sqrt(square) for square in squares]  # one root of whole numbers, so that 3 x 3 gives 3
    unfolded = [_unfolded(weight, groups, rows) for rows in choices]
    layouts = pack([Layout(Kind.MATRIX, groups, 0, 1)] * len(choices))
    sigmas, residuals, *_ = torch.ops.spectral_ops.spectral_norm(unfolded, layouts, BOUND_TOL, MAX_ITER)
    norms = (sigmas + residuals).view(len(choices), groups)
    bounds = norms * norms.new_tensor(factors)[:, None]
    # Each group by the unfolding that suits it, then the group where that is the largest.
    group = bounds.amin(dim=0).argmax()
    choice = int(bounds[:, group].argmin())
    return ConvNormBound(bounds[choice, group], norms[choice, group], factors[choice], choices[choice])


def _unfolded(weight: Tensor, groups: int, rows: tuple[int, ...]) -> Tensor:
    """(groups, out / groups * kernel in the rows, in / groups * kernel in the columns)."""
    columns = [i for i in range(weight.ndim - 2) if i not in rows]
    m = weight.shape[0] // groups * math.prod(weight.shape[2 + i] for i in rows)
    n = weight.shape[1] * math.prod(weight.shape[2 + i] for i in columns)
    return weight.permute(0, *(2 + i for i in rows), 1, *(2 + i for i in columns)).reshape(groups, m, n)


class _Counts(NamedTuple):
    """Of one spatial dimension, with its kernel in the columns of the unfolding or in its rows."""

    columns: int
    rows: int


def _counts(operator: ConvOperator, kernel: tuple[int, ...], dim: int) -> _Counts:
    """The counts of the bound ||C|| <= ||M|| * the root of the product of one count of every dimension.

    A convolution C takes the fine grid (q) to the coarse one (o) by taps t, q(o, t) = o stride + t dilation - before
    (mod N where circular; else dropped outside of the grid); a transposed one is such a C's adjoint, of the same norm.
    M has rows (a, t_R) and columns (b, t_C), R and C the kernel dimensions in rows and columns. For any y and x,

        y' C x = sum over o, t, a, b of W[a, b, t] y[a, o] x[b, q(o, t)] = sum over q_R, o_C of Y' M X,

        X[b, t_C] = x[b, (q_R, q(o_C, t_C))],
        Y[a, t_R] = the sum of y[a, (o_R, o_C)] over the o_R with q(o_R, t_R) = q_R,

    a vector X and Y for every (q_R, o_C). By Cauchy-Schwarz y' C x <= ||M|| sqrt(sum |X|^2) sqrt(sum |Y|^2). In the
    first sum x[q] appears as often as pairs (o_C, t_C) lead to q_C. In the second, an element of Y that is a sum of
    c(q, t) numbers has a square of at most c times the sum of theirs, so that y[o] counts for the sum of c(q(o, t), t)
    over its taps inside of the grid. Both counts are products over dimensions, and so are their maxima. c is 1 but
    where two windows of a circular layer begin at the same place.
    """
    coarse, fine = operator.grids(kernel)
    n, taps = fine[dim], np.arange(kernel[dim])
    q = np.arange(coarse[dim])[:, None] * operator.stride[dim] + taps * operator.dilation[dim] - operator.before[dim]
    if operator.circular:
        q = q % n
    inside = (q >= 0) & (q < n)  # (coarse, kernel)
    seen = np.bincount(q[inside], minlength=n)
    place = np.where(inside, q * len(taps) + taps, 0)
    together = np.bincount(place[inside], minlength=n * len(taps))
    spread = np.where(inside, together[place], 0).sum(axis=1)
    return _Counts(int(seen.max()), int(spread.max()))
