"""The registered ops on conv operators: one warm step, the penalty and its gradient, against dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import conv_samples
import pytest
import torch
from conv_samples import BASE, MIXED, OPS, SAMPLES, UP, ConvSample, Problem, matrices, samples
from helpers import BF16, DTYPES, F16, F32, F64, NAMES, eps, error, gaussian, relative_error, same_bits, step_in_float64
from layout_samples import channels_last, spread, transposed
from torch import Tensor

from spectral_ops import use_backend
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Layout, vector_dtype

conv_backend = conv_samples.conv_backend

POWERS_AND_TARGETS = [(2.0, 1.0), (1.0, 1.0), (1.5, 0.5), (3.0, 2.0), (2.0, 0.0)]
# In eps. Measured over the samples, in both backends: sigma 1.6, u and v 0.4, R 3.5, gradients 6 (of four times that).
ROUNDINGS = 8


def rounded_once(x: Tensor, truth: Tensor, allowed: float) -> bool:
    """Whether x is truth rounded to the dtype of x, where truth is known up to `allowed`; False for NaN."""
    info = torch.finfo(x.dtype)
    spacing = torch.clamp(truth.abs() * info.eps, min=info.tiny * info.eps)
    return x.shape == truth.shape and bool(((x.double() - truth).abs() <= 0.5 * spacing * 1.001 + allowed).all())


def steepness(truth: list[Tensor], problem: Problem, exponent: float) -> float:
    """The largest of the terms whose difference is a slope: what its rounding is relative to."""
    top, target = max(s.item() for s in truth), max(problem.targets)
    return max(problem.scales) * 2 * exponent * top ** (exponent - 1) * (top**exponent + target**exponent)


# ---- one step ----


@pytest.mark.parametrize(("sample", "dtype"), samples())
def test_a_step_is_that_of_the_dense_matrix(conv_backend: str, sample: ConvSample, dtype: torch.dtype) -> None:
    problem = Problem([sample], dtype)
    sigma, u, v, exponents = problem.steps()
    assert sigma.dtype == u.dtype == v.dtype == vector_dtype(dtype) and exponents.dtype == torch.int32
    us, vs, starts = (x.view(sample.groups, -1) for x in (u, v, problem.v))
    for i, block in enumerate(matrices(sample, dtype)):
        s, left, right = step_in_float64(block, starts[i])
        # y is small where v happens to be almost orthogonal to the rows, and its rounding is not.
        turned = ROUNDINGS * eps(dtype) * (block.norm() / (block @ starts[i].double()).norm()).item()
        assert relative_error(sigma[i], s) <= ROUNDINGS * eps(dtype)
        assert relative_error(us[i], left) <= turned and relative_error(vs[i], right) <= turned
        assert all(error(x[i].double().norm(), 1.0) <= 8 * eps(dtype) for x in (us, vs))
    assert exponents.tolist() == (torch.frexp(sigma).exponent - 1).tolist()
    for x, y in zip(OPS.spectral_penalty(*problem.arguments())[1:4], (sigma, u, v), strict=True):
        assert same_bits(x, y), "the penalty's step is another"


@pytest.mark.parametrize(("sample", "dtype"), samples(dtypes=(F32, BF16, F64)))
def test_sigma_never_falls_and_is_never_above_sigma_1(
    conv_backend: str, sample: ConvSample, dtype: torch.dtype
) -> None:
    problem = Problem([sample], dtype)
    truth = torch.stack([torch.linalg.matrix_norm(block, 2) for block in matrices(sample, dtype)])
    before = torch.zeros(sample.groups, dtype=F64)
    for _ in range(12):
        sigma, _, problem.v, problem.exponents = problem.steps()
        assert (sigma.double() - truth <= ROUNDINGS * eps(dtype) * truth).all()
        assert (before - sigma.double() <= ROUNDINGS * eps(dtype) * truth).all()
        before = sigma.double()
    assert (before >= 0.9 * truth).all()  # it does converge; measured 0.94


def test_steps_of_one_call_are_those_of_many(conv_backend: str) -> None:
    one, many = Problem(MIXED, F32), Problem(MIXED, F32)
    together = one.steps(3)
    for _ in range(3):
        single = many.steps()
        _, _, many.v, many.exponents = single
    assert all(same_bits(x, y) for x, y in zip(together[:3], single[:3], strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=NAMES.get)
def test_a_list_gives_what_each_gives_alone(conv_backend: str, dtype: torch.dtype) -> None:
    together = Problem(MIXED, dtype).steps()
    alone = [Problem([layer], dtype).steps() for layer in MIXED]
    for x, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(x, torch.cat(parts))


# ---- the penalty and its gradient ----


@pytest.mark.parametrize(("sample", "dtype"), samples())
def test_value_and_gradient_are_those_of_the_dense_matrix(
    conv_backend: str, sample: ConvSample, dtype: torch.dtype
) -> None:
    """At fixed u, away from convergence, where v is no singular vector yet."""
    problem = Problem([sample], dtype)
    problem.weights[0].requires_grad_()
    value, *_ = OPS.spectral_penalty(*problem.arguments())
    (gradient,) = torch.autograd.grad(-2.0 * value, problem.weights)
    expected, (slope,), sigmas = problem.truth()
    assert gradient.dtype == dtype and gradient.stride() == problem.weights[0].stride()
    terms = sum((s.item() ** 2 + problem.targets[0] ** 2) ** 2 for s in sigmas)
    assert error(value, expected) <= ROUNDINGS * eps(dtype) * terms
    assert rounded_once(gradient, -2.0 * slope, 4 * ROUNDINGS * eps(dtype) * steepness(sigmas, problem, 2.0))
    assert slope.abs().max() >= 0.05, "a gradient of nothing shows nothing"


@pytest.mark.parametrize(("exponent", "target"), POWERS_AND_TARGETS)
def test_exponent_target_and_share_of_every_layer(conv_backend: str, exponent: float, target: float) -> None:
    problem = Problem(MIXED, F64)
    problem.targets[1:3] = [target] * 2
    for w in problem.weights:
        w.requires_grad_()
    value, *_ = OPS.spectral_penalty(*problem.arguments(exponent))
    expected, gradients, sigmas = problem.truth(exponent)
    assert relative_error(value, expected) <= 1e-14  # measured 1.4e-15
    for x, y in zip(torch.autograd.grad(value, problem.weights), gradients, strict=True):
        assert error(x, y) <= 1e-14 * steepness(sigmas, problem, exponent)  # measured 3e-16


@pytest.mark.parametrize("sample", [BASE, UP, SAMPLES[2], SAMPLES[3]], ids=str)
def test_gradcheck_at_converged_v(conv_backend: str, sample: ConvSample) -> None:
    """At a singular vector the dependence of u on W vanishes to first order: finite differences see the gradient."""
    problem = Problem([sample], F64)
    problem.v = OPS.spectral_norm(problem.weights, problem.layouts, 1e-13, 256)[3]

    def f(w: Tensor) -> Tensor:
        return OPS.spectral_penalty([w], *problem.arguments()[1:])[0]

    assert torch.autograd.gradcheck(f, [problem.weights[0].requires_grad_()], eps=1e-6, atol=1e-6, rtol=1e-5)


PLACES: list[Callable[[Tensor], Tensor]] = [torch.clone, channels_last, transposed, spread]


@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
def test_weights_and_gradients_lie_anywhere(
    conv_backend: str, place: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    layers = [BASE, UP, replace(BASE, inputs=4, groups=2)]
    plain, placed = Problem(layers, dtype), Problem(layers, dtype)
    placed.weights = [place(w) for w in placed.weights]
    into = [place(torch.zeros_like(w)) for w in plain.weights]
    strides = [x.stride() for x in into]
    dense = [torch.zeros_like(w) for w in plain.weights]
    value, sigma = placed.accumulate(into, 0.5)
    expected, s = plain.accumulate(dense, 0.5)
    assert relative_error(value, expected) <= ROUNDINGS * eps(dtype)
    assert relative_error(sigma, s) <= ROUNDINGS * eps(dtype)
    assert [x.stride() for x in into] == strides
    for x, y, w in zip(into, dense, placed.weights, strict=True):
        assert relative_error(x, y) <= ROUNDINGS * eps(dtype) + torch.finfo(dtype).eps
        w.requires_grad_()
    OPS.spectral_penalty(*placed.arguments())[0].backward()
    for w in placed.weights:
        assert w.grad is not None and w.grad.stride() == torch.empty_like(w).stride() and w.grad.isfinite().all()


def test_a_second_derivative_is_refused(conv_backend: str) -> None:
    problem = Problem([BASE], F64)
    w = problem.weights[0].requires_grad_()
    (gradient,) = torch.autograd.grad(OPS.spectral_penalty(*problem.arguments())[0], w, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one differentiation, got a second one"):
        gradient.sum().backward()


# ---- added into gradients ----


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "with_loss_scale"])
def test_strength_times_scale_times_gradient_is_added(conv_backend: str, dtype: torch.dtype, scaled: bool) -> None:
    problem = Problem(MIXED, dtype)
    before = [gaussian(f"g{i}", *w.shape).to(dtype) for i, w in enumerate(problem.weights)]
    gradients = [x.clone() for x in before]
    expected, slopes, sigmas = problem.truth()
    _, _, v, exponents = problem.steps()
    value, sigma = problem.accumulate(gradients, 0.3, *([torch.tensor(8.0), torch.zeros(())] if scaled else []))
    assert error(value, 0.3 * expected) <= ROUNDINGS * eps(dtype) * expected.item()
    assert error(sigma, torch.stack(sigmas)) <= ROUNDINGS * eps(dtype) * max(sigmas).item()
    assert same_bits(problem.v, v) and torch.equal(problem.exponents, exponents)
    factor = 2.4 if scaled else 0.3
    for x, y, slope in zip(gradients, before, slopes, strict=True):
        allowed = 4 * ROUNDINGS * eps(dtype) * (factor * steepness(sigmas, problem, 2.0) + y.abs().max().item())
        assert rounded_once(x, y.double() + factor * slope, allowed)
        assert not torch.equal(x, y)


@pytest.mark.parametrize(("scale", "stale"), [(2.0**100, 0), (2.0**-100, 0), (2.0**-72, 0), (2.0**27, 90), (1.0, -90)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
def test_the_two_forms_agree_at_the_ends_of_the_range(
    conv_backend: str, dtype: torch.dtype, scale: float, stale: int
) -> None:
    """Vectors are scaled there, and in both grids of a layer; an exponent may be out of date."""
    problem = Problem(MIXED, dtype)
    problem.weights = [(scale * w).requires_grad_() for w in problem.weights]
    problem.exponents += stale
    problem.targets = [0.0 if scale > 1 else scale * t for t in problem.targets]
    (arguments, kept), exponent = (problem.arguments(1.0), problem.exponents.clone()), torch.tensor(1.0, dtype=F64)
    value, *_ = OPS.spectral_penalty(*arguments)
    slopes = torch.autograd.grad(value, problem.weights)
    gradients = [torch.zeros_like(w, requires_grad=False) for w in problem.weights]
    weights, sigma = [w.detach() for w in problem.weights], torch.zeros_like(kept, dtype=problem.v.dtype)
    settings = (problem.layouts, problem.targets, problem.scales, 1.0, exponent, None, None)
    OPS.accumulate_grad_(gradients, weights, problem.v, problem.exponents, sigma, *settings)
    for layer, x, y in zip(MIXED, gradients, slopes, strict=True):
        assert y.abs().max() >= scale / 64, "a gradient of nothing shows nothing"
        assert (x.double() - y.double()).norm() <= ROUNDINGS * eps(dtype) * y.double().norm(), layer


@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=NAMES.get)
def test_found_inf_changes_nothing(conv_backend: str, dtype: torch.dtype) -> None:
    problem = Problem(MIXED, dtype)
    gradients = [gaussian(f"g{i}", *w.shape).to(dtype) for i, w in enumerate(problem.weights)]
    gradients[1][0] = math.inf
    kept = [x.clone() for x in (*gradients, *problem.weights, problem.v, problem.exponents)]
    value, sigma = problem.accumulate(gradients, 0.3, torch.tensor(8.0), torch.ones(()))
    after = [*gradients, *problem.weights, problem.v, problem.exponents]
    assert all(torch.equal(x, y) for x, y in zip(after, kept, strict=True)) and (sigma == -1).all()
    assert error(value, 0.3 * problem.truth()[0]) <= ROUNDINGS * eps(dtype) * value.item()


def test_dtypes_may_differ_within_a_call(conv_backend: str) -> None:
    problem = Problem(MIXED, [F32, BF16, F16, F32, BF16, F32, F16])
    gradients = [torch.zeros(w.shape, dtype=F32) for w in problem.weights]
    _, slopes, sigmas = problem.truth()
    problem.accumulate(gradients, 1.0)
    for x, slope in zip(gradients, slopes, strict=True):
        assert rounded_once(x, slope, 4 * ROUNDINGS * eps(F32) * steepness(sigmas, problem, 2.0))


# ---- where there is no direction ----


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_zero_has_no_gradient_and_another_v(conv_backend: str, dtype: torch.dtype) -> None:
    problem = Problem(MIXED, dtype)
    for i in (0, 2, 3):
        problem.weights[i].zero_()
    for w in problem.weights:
        w.requires_grad_()
    value, sigma, u, v, _ = OPS.spectral_penalty(*problem.arguments())
    gradients = torch.autograd.grad(value, problem.weights)
    with use_backend("reference"):
        expected = OPS.spectral_penalty(*problem.arguments())[3]
    at = number = 0
    for i, layer in enumerate(MIXED):
        n = layer.vectors(dtype).shape[1]
        for _ in range(layer.groups):
            before, after = problem.v[at : at + n], v[at : at + n]
            assert error(after.double().norm(), 1.0) <= 16 * eps(dtype)
            if i in (0, 2, 3):
                assert sigma[number].item() == 0 and relative_error(after, before) >= 0.1
                assert error(after, expected[at : at + n]) <= 2 * eps(dtype), "the backends differ"
            at, number = at + n, number + 1
        assert gradients[i].isfinite().all() and bool(gradients[i].any()) != (i in (0, 2, 3))


def test_v_that_the_layer_does_not_see_recovers(conv_backend: str) -> None:
    """A stride of 2 with a kernel of 1 reads every other input: W v = 0 for a v on the others, exactly."""
    sample = ConvSample((8,), (1,), 1, 2, stride=2)
    problem = Problem([sample], F32)
    problem.v = torch.tensor([0.0, 0.5] * 4)
    problem.weights[0].requires_grad_()
    value, sigma, u, problem.v, _ = OPS.spectral_penalty(*problem.arguments())
    (gradient,) = torch.autograd.grad(value, problem.weights)
    assert sigma.item() == 0 and not u.any() and not gradient.any()
    assert error(value, problem.targets[0] ** 4) <= 4 * eps(F32)
    sigma, *_ = problem.steps()
    assert relative_error(sigma, torch.linalg.vector_norm(problem.weights[0].double())[None]) <= 8 * eps(F32)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("layer", range(4))
def test_not_finite_shows_in_r_and_v_survives(conv_backend: str, dtype: torch.dtype, bad: float, layer: int) -> None:
    layers = MIXED[:4]
    problem, clean = Problem(layers, dtype), Problem(layers, dtype)
    problem.weights[layer][-1, -1, -1] = bad  # of the last group
    for w in problem.weights:
        w.requires_grad_()
    value, sigma, _, v, _ = OPS.spectral_penalty(*problem.arguments())
    gradients = torch.autograd.grad(value, problem.weights)
    _, expected, _, v_clean, _ = OPS.spectral_penalty(*clean.arguments())
    assert not value.isfinite()
    spoilt = sum(sample.groups for sample in layers[: layer + 1]) - 1
    others = [i for i in range(len(sigma)) if i != spoilt]
    assert sigma[spoilt].isnan() and torch.equal(sigma[others], expected[others])
    start = sum(sample.vectors(dtype).numel() for sample in layers[: layer + 1])
    own = slice(start - layers[layer].vectors(dtype).shape[1], start)
    assert same_bits(v[own], problem.v[own])
    assert torch.equal(v[: own.start], v_clean[: own.start]) and torch.equal(v[own.stop :], v_clean[own.stop :])
    for i, gradient in enumerate(gradients):
        last = gradient.chunk(layers[i].groups)[-1]
        assert not last.isfinite().any() if i == layer else last.isfinite().all()


# ---- as torch sees them ----


@pytest.mark.parametrize("dtype", [BF16, F64], ids=NAMES.get)
@pytest.mark.parametrize("op", ["power_iteration", "spectral_penalty", "backward", "spectral_norm", "accumulate_grad_"])
def test_opcheck(conv_backend: str, op: str, dtype: torch.dtype) -> None:
    problem = Problem([replace(BASE, size=(3, 3)), SAMPLES[2], UP], dtype)
    weights, v, exponents, layouts, targets, scales, _ = problem.arguments()
    if op == "power_iteration":
        torch.library.opcheck(OPS.power_iteration, (weights, v, exponents, layouts, 2))
    elif op == "spectral_norm":
        torch.library.opcheck(OPS.spectral_norm, ([w.requires_grad_() for w in weights], layouts, 1e-6, 256))
    elif op == "accumulate_grad_":
        gradients, sigma = [torch.zeros_like(w) for w in weights], torch.zeros(len(exponents), dtype=v.dtype)
        settings = (layouts, targets, scales, 2.0, torch.tensor(0.1), torch.tensor(8.0), torch.tensor(0.0))
        torch.library.opcheck(OPS.accumulate_grad_, (gradients, weights, v, exponents, sigma, *settings))
    elif op == "backward":
        value, sigma, u, v, _ = OPS.spectral_penalty(*problem.arguments())
        settings = (torch.ones_like(value), weights, sigma, u, v, layouts, targets, scales, 2.0)
        torch.library.opcheck(OPS.spectral_penalty_backward, settings)
    else:
        for w in weights:
            w.requires_grad_()
        torch.library.opcheck(OPS.spectral_penalty, problem.arguments())


def test_one_graph_under_compile(conv_backend: str) -> None:
    eager, graph = Problem(MIXED, F32), Problem(MIXED, F32)

    def f(weights: list[Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
        value, _, _, v_new, _ = OPS.spectral_penalty(weights, v, *eager.arguments()[2:])
        return 0.1 * value, v_new

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for problem in (eager, graph):
        for w in problem.weights:
            w.requires_grad_()
    for _ in range(2):
        (expected, eager.v), (found, graph.v) = f(eager.weights, eager.v), compiled(graph.weights, graph.v)
        assert same_bits(found.detach(), expected.detach()) and same_bits(graph.v, eager.v)
        gradients = torch.autograd.grad(expected, eager.weights), torch.autograd.grad(found, graph.weights)
        assert all(same_bits(x, y) for x, y in zip(*gradients, strict=True))


def test_layers_with_and_without_operators_in_one_call_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        LayerTable([Layout(), BASE.layout], [1.0] * 2, [1.0] * 2)
    text = "LayerTable: expected conv operators alone or none in one call, got both. Call once for each."
    assert str(caught.value) == text
