"""The norm of a conv layer: against dense SVDs and exact Fourier results, its bounds, vectors, gradient and errors."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import conv_samples
import pytest
import torch
from conv_samples import BASE, PATCHES, SAMPLES, UP, ConvSample, matrices, samples
from helpers import BF16, DTYPES, F32, F64, NAMES, eps, error, gaussian, relative_error, same_bits
from layout_samples import channels_last, spread, transposed
from torch import Tensor

from spectral_ops import spectral_norm
from spectral_ops.ops.conv_spectral_norm import conv_norm_bound, conv_spectral_norm
from spectral_ops.ops.layout import vector_dtype

conv_backend = conv_samples.conv_backend

TOL = 1e-6
# Of sigma, in eps of its dtype. Measured over the samples: 1.4 (native, float64), 1.3 (reference, float32).
ROUNDINGS = 8


class Norm(NamedTuple):
    sigma: Tensor
    bound: Tensor
    u: Tensor
    v: Tensor


def norm(sample: ConvSample, w: Tensor, **how: Any) -> Norm:
    return Norm(*conv_spectral_norm(w, sample.size, **sample.arguments, return_bound=True, return_vectors=True, **how))


@functools.cache
def found(sample: ConvSample, dtype: torch.dtype, backend: str) -> Norm:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all of them converge
        return norm(sample, sample.weight(dtype))


def largest(blocks: list[Tensor]) -> Tensor:
    """The norm of a block-diagonal matrix; differentiable."""
    return torch.stack([torch.linalg.matrix_norm(block, 2) for block in blocks]).amax()


def truth(sample: ConvSample, dtype: torch.dtype) -> float:
    return largest(matrices(sample, dtype)).item()


# ---- the value ----


@pytest.mark.parametrize(("sample", "dtype"), samples())
def test_sigma_is_the_largest_singular_value_and_not_above(
    conv_backend: str, sample: ConvSample, dtype: torch.dtype
) -> None:
    """Of the weight as rounded to its dtype."""
    sigma, expected = found(sample, dtype, conv_backend).sigma, truth(sample, dtype)
    assert sigma.shape == () and sigma.dtype == vector_dtype(dtype)
    assert sigma.item() - expected <= ROUNDINGS * eps(dtype) * expected
    assert expected - sigma.item() <= (TOL + ROUNDINGS * eps(dtype)) * expected  # measured: 0.2 TOL


@pytest.mark.parametrize(("sample", "dtype"), samples())
def test_bound_holds_over_all_groups(conv_backend: str, sample: ConvSample, dtype: torch.dtype) -> None:
    one, expected = found(sample, dtype, conv_backend), truth(sample, dtype)
    assert one.bound.shape == () and one.bound.dtype == vector_dtype(dtype) and one.bound >= 0
    assert expected - one.sigma.double().item() - one.bound.double().item() <= eps(dtype) * expected
    assert one.bound.item() <= 1e-5 * expected  # of use; measured 1.5e-6


@pytest.mark.parametrize(("sample", "dtype"), samples())
def test_vectors_are_a_unit_pair_of_one_group(conv_backend: str, sample: ConvSample, dtype: torch.dtype) -> None:
    _, _, u, v = found(sample, dtype, conv_backend)
    assert u.shape == (sample.outputs, *sample.output_size()) and v.shape == (sample.inputs, *sample.size)
    for x in (u, v):
        assert error(x.double().norm(), 1.0) <= 8 * eps(dtype)  # measured 1
        assert sum(bool(part.any()) for part in x.chunk(sample.groups)) == 1
    whole, sigma = torch.block_diag(*matrices(sample, dtype)), truth(sample, dtype)
    u, v = u.double().flatten(), v.double().flatten()
    # v is taken from u, so that only sigma and rounding differ. Measured: 1.6e-7 (reference, float32).
    assert relative_error(whole.T @ u, sigma * v) <= TOL + 2 * ROUNDINGS * eps(dtype)
    # u is not taken from v: there is the residual, which stops the iteration at 2 TOL. Measured: 1.3e-6.
    assert relative_error(whole @ v, sigma * u) <= 3 * TOL


def transfer_matrices(sample: ConvSample, w: Tensor) -> Tensor:
    """(*frequencies, out, in) of a circular layer of stride 1 that keeps the size (Sedghi et al., ICLR 2019)."""
    taps = w.new_zeros(*w.shape[:2], *sample.size)
    for place in torch.cartesian_prod(*(torch.arange(k) for k in sample.kernel)).view(-1, len(sample.kernel)).tolist():
        where = tuple(t * d % n for t, d, n in zip(place, sample.operator.dilation, sample.size, strict=True))
        taps[(..., *where)] += w[(..., *place)]
    dims = tuple(range(2, w.ndim))
    return torch.fft.fftn(taps, dim=dims).permute(*dims, 0, 1)


@pytest.mark.parametrize(
    "sample",
    [
        ConvSample((32,), (5,), 8, 6, padding="same", padding_mode="circular"),
        ConvSample((16, 12), (3, 3), 6, 8, padding=1, padding_mode="circular"),
        ConvSample((9, 10), (4, 2), 6, 4, padding="same", dilation=(1, 3), padding_mode="circular"),
        ConvSample((4, 5, 6), (3, 2, 3), 2, 3, padding="same", padding_mode="circular"),
        ConvSample((4,), (4,), 3, 3, padding="same", dilation=2, padding_mode="circular"),  # two taps in one place
    ],
    ids=str,
)
def test_circular_layers_have_the_norms_of_their_frequencies(conv_backend: str, sample: ConvSample) -> None:
    """Exact, and far beyond what a dense matrix could check."""
    w = sample.weight()
    exact = torch.linalg.matrix_norm(transfer_matrices(sample, w), 2).max().item()
    assert abs(norm(sample, w).sigma.item() - exact) <= 1e-6 * exact
    assert abs(norm(sample, w, tol=1e-12).sigma.item() - exact) <= 1e-11 * exact


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_patch_embedding_is_its_reshaped_weight(conv_backend: str, dtype: torch.dtype) -> None:
    w = PATCHES.weight(dtype)
    assert relative_error(norm(PATCHES, w).sigma, spectral_norm(w)) <= 2 * TOL


def test_the_reshaped_weight_is_a_bound_from_both_sides(conv_backend: str) -> None:
    """reshape <= operator where a window lies inside, operator <= sqrt(prod k) reshape where no input is read again."""
    below = above = 0
    for sample in SAMPLES:
        reshaped = largest([part.flatten(1) for part in sample.weight().chunk(sample.groups)]).item()
        sigma, op = found(sample, F64, conv_backend).sigma.item(), sample.operator
        coarse, fine = op.grids(sample.kernel)
        reach = [d * (k - 1) + 1 for d, k in zip(op.dilation, sample.kernel, strict=True)]
        starts = [[o * s - b for o in range(c)] for c, s, b in zip(coarse, op.stride, op.before, strict=True)]
        if all(any(0 <= q <= n - r for q in qs) for qs, n, r in zip(starts, fine, reach, strict=True)):
            below += 1
            assert reshaped <= sigma * (1 + 2 * TOL), sample
        if not op.circular or all(c * s <= n for c, s, n in zip(coarse, op.stride, fine, strict=True)):
            above += 1
            assert sigma <= math.sqrt(math.prod(sample.kernel)) * reshaped * (1 + 1e-12), sample
    assert below >= 20 and above >= 25


# ---- the gradient ----

SMOOTH = [BASE, UP, SAMPLES[2], SAMPLES[3], replace(BASE, inputs=4, groups=2, padding_mode="circular"), SAMPLES[-2]]


@pytest.mark.parametrize("sample", SMOOTH, ids=str)
def test_gradcheck(conv_backend: str, sample: ConvSample) -> None:
    def f(w: Tensor) -> Tensor:
        return conv_spectral_norm(w, sample.size, **sample.arguments, tol=1e-12)

    assert torch.autograd.gradcheck(f, [sample.weight().requires_grad_()], eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("sample", "dtype"), samples())
def test_gradient_is_autograds_through_the_svd(conv_backend: str, sample: ConvSample, dtype: torch.dtype) -> None:
    w = sample.weight(dtype).requires_grad_()
    sigma, bound, u, v = norm(sample, w)
    assert sigma.requires_grad and not (bound.requires_grad or u.requires_grad or v.requires_grad)
    (gradient,) = torch.autograd.grad(3 * sigma, w)
    assert gradient.dtype == dtype
    # The correlation of v with the u that was returned, rounded once; a sum over all positions. Measured 1.6 eps.
    double = w.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(3 * (sample.run(double, v[None])[0] * u.double()).sum(), double)
    assert relative_error(gradient, expected) <= 0.5 * torch.finfo(dtype).eps + 8 * eps(dtype)
    values = torch.cat([torch.linalg.svdvals(block) for block in matrices(sample, dtype)]).sort(descending=True).values
    if values[0] - values[1] >= 1e-2 * values[0]:  # simple: the SVD has one gradient
        (expected,) = torch.autograd.grad(3 * largest(sample.dense(double)), double)
        # Vectors turn by the residual over the gap: 2e-4 at most. Measured 4.8e-7 beyond the rounding of the dtype.
        assert relative_error(gradient, expected) <= 2e-4 + 0.5 * torch.finfo(dtype).eps


def test_the_gradient_is_of_one_group_where_groups_tie(conv_backend: str) -> None:
    """amax would share it out, and the gradient would not be that of the vectors returned."""
    sample = replace(BASE, inputs=4, groups=2)
    w = sample.weight()[:2].repeat(2, 1, 1, 1).requires_grad_()
    sigma, _, u, _ = norm(sample, w)
    (gradient,) = torch.autograd.grad(sigma, w)
    for part, left in zip(gradient.chunk(2), u.chunk(2), strict=True):
        assert bool(part.any()) == bool(left.any())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
@pytest.mark.parametrize("place", [channels_last, transposed, spread], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sample", [BASE, UP, replace(BASE, inputs=4, groups=2)], ids=str)
def test_weights_lie_anywhere(
    conv_backend: str, sample: ConvSample, place: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    plain, w = sample.weight(dtype).requires_grad_(), place(sample.weight(dtype)).requires_grad_()
    assert w.stride() != plain.stride()
    sigma = conv_spectral_norm(w, sample.size, **sample.arguments)
    assert relative_error(sigma, found(sample, dtype, conv_backend).sigma) <= ROUNDINGS * eps(dtype)
    sigma.backward()
    conv_spectral_norm(plain, sample.size, **sample.arguments).backward()
    assert w.grad is not None and plain.grad is not None
    assert w.grad.stride() == torch.empty_like(w).stride()
    # Vectors of two orders of sums, which the gap may turn. Measured 1.5e-7, bfloat16 the same bits.
    assert relative_error(w.grad, plain.grad) <= 1e-5 + torch.finfo(dtype).eps


# ---- edges ----


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("sample", [BASE, UP, replace(BASE, inputs=4, groups=2)], ids=str)
def test_zero(conv_backend: str, sample: ConvSample, dtype: torch.dtype) -> None:
    w = torch.zeros(sample.shape, dtype=dtype, requires_grad=True)
    sigma, bound, u, v = norm(sample, w)
    sigma.backward()
    assert sigma.item() == 0 and bound.item() == 0 and not u.any() and error(v.double().norm(), 1.0) <= 8 * eps(dtype)
    assert w.grad is not None and not w.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("sample", [BASE, UP, replace(BASE, inputs=4, groups=2)], ids=str)
def test_not_finite_is_nan(conv_backend: str, sample: ConvSample, dtype: torch.dtype, bad: float) -> None:
    w = sample.weight(dtype)
    w[0, -1, 0, -1] = bad
    sigma, bound, u, v = norm(sample, w.requires_grad_())
    sigma.backward()
    assert w.grad is not None and w.grad.isnan().any()
    assert sigma.isnan() and bound.isnan() and error(v.double().norm(), 1.0) <= 8 * eps(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=NAMES.get)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("sample", [BASE, UP, SAMPLES[3]], ids=str)
def test_tiny_and_huge_weights(conv_backend: str, sample: ConvSample, dtype: torch.dtype, scale: float) -> None:
    w = (scale * sample.weight()).to(dtype).requires_grad_()
    sigma, bound, u, v = norm(sample, w)
    expected = largest(sample.dense(w.detach()))
    assert relative_error(sigma, expected) <= TOL + ROUNDINGS * eps(dtype)
    assert 0 <= bound <= 1e-5 * expected
    sigma.backward()
    assert w.grad is not None
    size = (sample.run(w.detach() / scale, v[None])[0] * u.double()).sum().item()  # <gradient, W> is sigma
    assert abs((w.grad.double() * w.detach().double() / scale).sum().item() - size) <= 4 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize(("dtype", "scale"), [(F32, 2.0**-133), (BF16, 2.0**-128), (F64, 2.0**-1030)])
@pytest.mark.parametrize("sample", [BASE, UP], ids=str)
def test_subnormal_weights(conv_backend: str, sample: ConvSample, dtype: torch.dtype, scale: float) -> None:
    """A factor that makes them 1 is beyond the type: 2^133 is none of float32's."""
    w = (sample.weight() * scale).to(dtype)
    sigma, bound, u, v = norm(sample, w)
    expected = largest(sample.dense(w.double() / scale))  # torch's own SVD loses such numbers
    info = torch.finfo(vector_dtype(dtype))
    assert abs(sigma.double().item() / scale - expected) <= TOL * expected + info.tiny * info.eps / scale
    for x in (u, v):
        assert abs(x.double().norm().item() - 1) <= 8 * eps(dtype)


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (4, 0, 3, 3), (0, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_layers_without_channels_have_norm_zero(conv_backend: str, shape: tuple[int, ...], transpose: bool) -> None:
    w = torch.zeros(shape, requires_grad=True)
    outputs, inputs = (shape[1], shape[0]) if transpose else (shape[0], shape[1])
    sigma, bound, u, v = conv_spectral_norm(w, (6, 5), transposed=transpose, return_bound=True, return_vectors=True)
    size = (8, 7) if transpose else (4, 3)
    assert sigma.item() == bound.item() == 0 and u.shape == (outputs, *size) and v.shape == (inputs, 6, 5)
    sigma.backward()
    assert w.grad is not None and w.grad.shape == shape


# ---- the call ----


def test_the_forms_of_the_result(conv_backend: str) -> None:
    w = gaussian("forms", 4, 3, 3)
    alone = conv_spectral_norm(w, 9)
    assert isinstance(alone, Tensor) and same_bits(alone, conv_spectral_norm(w, [9]))
    assert len(conv_spectral_norm(w, (9,), return_bound=True)) == 2
    sigma, u, v = conv_spectral_norm(w, torch.Size([9]), return_vectors=True)
    assert same_bits(sigma, alone) and u.shape == (4, 7) and v.shape == (3, 9)


def test_unconverged_is_warned_of_and_still_a_lower_bound(conv_backend: str) -> None:
    w = gaussian("hard", 8, 8, 3, 3)
    converged = conv_spectral_norm(w, (12, 12), padding=1)
    with pytest.warns(RuntimeWarning, match=r"had not converged to tol=1e-12 after 3 reads"):
        sigma = conv_spectral_norm(w, (12, 12), padding=1, tol=1e-12, max_iter=3)
    assert 0.8 * converged <= sigma < converged  # measured 0.93


def test_one_graph_under_compile(conv_backend: str) -> None:
    def f(w: Tensor) -> Tensor:
        sigma, bound, u, v = norm(replace(BASE, inputs=4, groups=2), w)
        return sigma * 2 + bound + u.sum() + v.sum()

    w = replace(BASE, inputs=4, groups=2).weight(F32).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(w), f(w)) <= 8 * eps(F32)
    (expected,), (gradient,) = torch.autograd.grad(f(w), w), torch.autograd.grad(compiled(w), w)
    assert relative_error(gradient, expected) <= 8 * eps(F32)


W = torch.zeros(4, 3, 3)
BAD_WEIGHTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: [W], "expected weight to be a tensor, got list. Pass the weight itself."),
    (lambda: W.to_sparse(), "expected weight to be a dense tensor, got a sparse_coo one. "
                            "Convert it (to_dense, dequantize)."),
    (lambda: W.to(torch.complex64), "expected weight to be float32, bfloat16, float16 or float64, got "
                                    "torch.complex64. Convert it, or leave it out."),
    (lambda: W.long(), "expected weight to be float32, bfloat16, float16 or float64, got torch.int64. "
                       "Convert it, or leave it out."),
]  # fmt: skip


@pytest.mark.parametrize("function", [conv_spectral_norm, conv_norm_bound])
@pytest.mark.parametrize(("weight", "text"), BAD_WEIGHTS, ids=["list", "sparse", "complex", "integer"])
def test_weights_that_are_none(function: Callable[..., Any], weight: Callable[[], Any], text: str) -> None:
    with pytest.raises(TypeError) as caught:
        function(weight(), 9)
    assert str(caught.value) == f"{function.__name__}: {text}"


@pytest.mark.skipif(not hasattr(torch, "quantize_per_tensor"), reason="this torch has no quantized tensors any more")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*deprecated")
@pytest.mark.parametrize("function", [conv_spectral_norm, conv_norm_bound])
def test_quantized_weights(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: expected weight to be a dense tensor, got a quantized"):
        function(torch.quantize_per_tensor(W, 0.1, 0, torch.qint8), 9)


@pytest.mark.parametrize("function", [conv_spectral_norm, conv_norm_bound])
def test_the_layers_own_errors_name_the_function(function: Callable[..., Any]) -> None:
    """All of them: tests/test_conv_operator.py."""
    with pytest.raises(ValueError, match=rf"^{function.__name__}: expected input_size to hold 1 numbers >= 1, got"):
        function(W, (9, 9))
    with pytest.raises(NotImplementedError, match=rf"^{function.__name__}: expected padding_mode"):
        function(W, 9, padding_mode="reflect")


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ({"tol": "1"}, TypeError, "expected tol to be a number, got str. 1e-6 is the default."),
        ({"tol": True}, TypeError, "expected tol to be a number, got bool. 1e-6 is the default."),
        ({"tol": 0.0}, ValueError, "expected tol between 0 and 1, got 0.0. 1e-6 is the default."),
        ({"tol": math.nan}, ValueError, "expected tol between 0 and 1, got nan. 1e-6 is the default."),
        ({"max_iter": 0}, ValueError,
         "expected max_iter to be at least 1, got 0. Pass a whole number of at least 1."),
        ({"max_iter": 2.0}, TypeError,
         "expected max_iter to be an int, got float. Pass a whole number of at least 1."),
    ],
)  # fmt: skip
def test_errors_of_the_iteration(how: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        conv_spectral_norm(W, 9, **how)
    assert str(caught.value) == f"conv_spectral_norm: {text}"
