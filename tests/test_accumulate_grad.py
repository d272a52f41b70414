"""strength * dR/dtheta added into gradients: which memory, which numbers, rounded how often, and when not at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import BF16, F16, F32, F64, NAMES, eps, error, gaussian, relative_error, same_bits, step_in_float64, unit
from layout_samples import (
    SAMPLES,
    Sample,
    channels_last,
    penalty_in_float64,
    spread,
    transposed,
    vector_penalty_in_float64,
    window,
)
from torch import Tensor

from spectral_ops.ops.accumulate_grad import accumulate_grad, accumulate_grad_ref
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout, pack
from spectral_ops.ops.spectral_penalty import penalty_ref

STRENGTH, SCALE, TARGET, EXPONENT = 0.03, 1.7, 0.4, 1.5
# (weight, gradient): what trainers hold. float64 stays with float64.
DTYPE_PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (F32, F16), (F64, F64)]


class State:
    """v, exponents and sigma of parameters, and one call of the op on them."""

    def __init__(self, weights: list[Tensor], layouts: list[Layout], v: Tensor) -> None:
        count = sum(layout.parts for layout in layouts if layout.is_matrix)
        self.weights, self.layouts, self.v = weights, layouts, v.clone()
        self.exponents = torch.zeros(count, dtype=torch.int32)
        self.sigma = torch.full((count,), -1.0, dtype=v.dtype)
        self.table = LayerTable(layouts, [TARGET] * len(layouts), [SCALE] * len(layouts))

    def add(
        self,
        gradients: list[Tensor],
        strength: float | Tensor = STRENGTH,
        grad_scale: float | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor:
        state = (self.v, self.exponents, self.sigma, self.table)
        return accumulate_grad(gradients, self.weights, *state, EXPONENT, strength, grad_scale, found_inf)

    def bits(self) -> list[Tensor]:
        return [x.clone() for x in (self.v, self.exponents, self.sigma)]


def one(w: Tensor, v: Tensor) -> State:
    return State([w], [Layout()], v)


def added_in_float64(sample: Sample, w: Tensor, vectors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """STRENGTH * SCALE * dR/dW, R, sigmas."""
    w64 = w.detach().double().requires_grad_()
    truth, sigmas, _ = penalty_in_float64(sample.matrices(w64), vectors, EXPONENT, TARGET)
    (gradient,) = torch.autograd.grad(truth, w64) if truth.requires_grad else (torch.zeros_like(w64),)
    return STRENGTH * SCALE * gradient, SCALE * truth.detach(), torch.stack(sigmas)


# ---- which numbers, in which memory ----


def placements(sample: Sample) -> list[Callable[[Tensor], Tensor]]:
    """Where the gradient may lie: as the weight does, plainly, with gaps, the other way round."""
    places = [torch.clone, transposed, spread, window]
    if len(sample.shape) == 4:
        places.append(channels_last)
    return places


@pytest.mark.parametrize(
    ("sample", "place"),
    [pytest.param(s, p, id=f"{s.name}-into_{p.__name__}") for s in SAMPLES for p in placements(s)],
)
def test_added_to_the_right_elements_and_to_no_other(
    backend: str, sample: Sample, place: Callable[[Tensor], Tensor]
) -> None:
    """Every weight layout x every gradient layout; the gaps of a gradient hold NaN before and after."""
    w, vectors = sample.tensor(F32), sample.vectors(F32)
    start = gaussian(sample.name + "g", *w.shape).float()
    gradient = place(start)
    surroundings = gradient._base.isnan().sum() if gradient._base is not None and place in (spread, window) else None
    expected, value_expected, sigmas = added_in_float64(sample, w, vectors)
    state = State([w], [sample.layout], torch.cat(vectors))
    kept = w.clone()
    value = state.add([gradient])
    assert torch.equal(w, kept), "the weight was changed"
    steepest = 3 * sigmas**0.5 * (sigmas**1.5 + TARGET**1.5)
    # y and z of up to 9001 terms, and the rounding of the start: measured 6 roundings, either backend.
    rounding = 32 * eps(F32) * STRENGTH * SCALE * (steepest.max().item() if steepest.numel() else 0.0)
    assert (
        error(gradient, start.double() + expected) <= rounding + 2 * eps(F32) * start.abs().max().item()
        if w.numel()
        else True
    )
    assert (
        error(value, STRENGTH * value_expected)
        <= 64 * eps(F32) * STRENGTH * SCALE * (sigmas**1.5 + TARGET**1.5).square().sum().item()
    )
    assert relative_error(state.sigma, sigmas) <= 32 * eps(F32)
    if surroundings is not None:
        assert gradient._base is not None and gradient._base.isnan().sum() == surroundings


@pytest.mark.parametrize(("dtype", "gradient_dtype"), DTYPE_PAIRS, ids=lambda d: NAMES[d])
@pytest.mark.parametrize(
    "name", ["linear", "strips", "transposed_strips", "conv_groups_channels_last", "packed_columns"]
)
@pytest.mark.parametrize("place", [torch.clone, transposed, spread], ids=lambda p: p.__name__)
def test_dtypes(
    backend: str, name: str, dtype: torch.dtype, gradient_dtype: torch.dtype, place: Callable[[Tensor], Tensor]
) -> None:
    sample = next(s for s in SAMPLES if s.name == name)
    w, vectors = sample.tensor(dtype), sample.vectors(dtype)
    start = (0.1 * gaussian(name + "g", *w.shape)).to(gradient_dtype)
    gradient = place(start)
    expected, _, _ = added_in_float64(sample, w, vectors)
    State([w], [sample.layout], torch.cat(vectors)).add([gradient])
    total = start.double() + expected
    # One rounding to the gradient's dtype; before it, what the test above measures.
    allowed = (
        0.5 * torch.finfo(gradient_dtype).eps * total.abs().max().item() + 64 * eps(dtype) * expected.abs().max().item()
    )
    assert error(gradient, total) <= allowed + 2 * eps(dtype) * total.abs().max().item()
    assert relative_error(gradient, start.double()) >= 1e-3, "nothing was added"


@pytest.mark.parametrize("kind", [Kind.BIAS, Kind.SCALE, Kind.SHIFT], ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize(("dtype", "gradient_dtype"), DTYPE_PAIRS, ids=lambda d: NAMES[d])
@pytest.mark.parametrize("place", [torch.clone, spread, transposed], ids=lambda p: p.__name__)
def test_vectors(
    backend: str, kind: Kind, dtype: torch.dtype, gradient_dtype: torch.dtype, place: Callable[[Tensor], Tensor]
) -> None:
    x = (0.7 * gaussian("vector", 6, 9)).to(dtype)
    start = gaussian("vector_g", 6, 9).to(gradient_dtype)
    gradient = place(start)
    x64 = x.double().requires_grad_()
    truth = vector_penalty_in_float64(x64, kind, 3, EXPONENT, TARGET)
    total = start.double() + STRENGTH * SCALE * torch.autograd.grad(truth, x64)[0]
    state = State([x], [Layout(kind, 3)], torch.empty(0, dtype=F64 if dtype == F64 else F32))
    value = state.add([gradient])
    assert error(value, STRENGTH * SCALE * truth.detach()) <= 16 * eps(dtype) * STRENGTH * SCALE * truth.item()
    allowed = 0.5 * torch.finfo(gradient_dtype).eps + 16 * eps(dtype)
    assert error(gradient, total) <= allowed * total.abs().max().item()


# ---- rounding ----


@pytest.mark.parametrize("dtype", [BF16, F16], ids=NAMES.get)
@pytest.mark.parametrize("n", [1, 4, 16, 256], ids=lambda n: f"{n}_columns")  # tail, tail, whole registers
def test_rounded_once_to_nearest_even(backend: str, dtype: torch.dtype, n: int) -> None:
    """Bit for bit torch's rounding of (float gradient + float added).

    v is 2^-k everywhere, so that the product u_r v_j is exact whether or not it is fused with the addition.
    """
    w = gaussian("once", 300, 1).float().expand(300, n).contiguous()
    v = torch.full((n,), n**-0.5)
    added = torch.zeros(300, n)
    one(w, v).add([added])
    start = gaussian("once_g", 300, n) * 2.0 ** torch.randint(-12, 3, (300, n))
    gradient = start.to(dtype)
    expected = (gradient.float() + added).to(dtype)
    twice = (gradient + added.to(dtype)).to(dtype)
    one(w, v).add([gradient])
    assert same_bits(gradient, expected)
    assert not same_bits(twice, expected), "rounding twice would have passed"


@pytest.mark.parametrize("dtype", [BF16, F16], ids=NAMES.get)
def test_rounded_once_where_the_product_is_not_exact(backend: str, dtype: torch.dtype) -> None:
    """A fused multiply-add may land on the other side of a tie, once in some 2^16 elements, by one place."""
    w, v = gaussian("inexact", 200, 300).float(), unit("inexact", 300).float()
    added = torch.zeros(200, 300)
    one(w, v).add([added])
    gradient = gaussian("inexact_g", 200, 300).to(dtype)
    expected = (gradient.float() + added).to(dtype)
    one(w, v).add([gradient])
    differs = gradient.view(torch.int16).int() - expected.view(torch.int16).int()
    assert differs.abs().max() <= 1 and differs.count_nonzero() <= 20  # measured 5 (native), 0 (reference)


def test_a_small_gradient_is_lost_in_bf16_and_not_in_float32(backend: str) -> None:
    w, v = gaussian("lost", 8, 8).float(), unit("lost", 8).float()
    low, full = torch.ones(8, 8, dtype=BF16), torch.ones(8, 8)
    one(w, v).add([low], strength=1e-6)
    one(w, v).add([full], strength=1e-6)
    assert torch.equal(low, torch.ones(8, 8, dtype=BF16)) and not torch.equal(full, torch.ones(8, 8))


# ---- agreement with the differentiable form ----


@pytest.mark.parametrize("dtype", [F32, F64], ids=NAMES.get)
def test_the_same_as_backward(backend: str, dtype: torch.dtype) -> None:
    weights = [gaussian("m", 20, 30).to(dtype), gaussian("b", 20).to(dtype), gaussian("c", 8, 3, 3, 3).to(dtype)]
    layouts = [Layout(), Layout(Kind.BIAS), Layout(parts=4)]
    v = torch.cat([unit(str(i), n) for i, n in enumerate([30, *[27] * 4])]).to(dtype)
    state = State(weights, layouts, v)
    gradients = [torch.zeros_like(w) for w in weights]
    value = state.add(gradients)
    leaves = [w.clone().requires_grad_() for w in weights]
    out, sigma, _, v_new, exponents = torch.ops.spectral_ops.spectral_penalty(
        leaves, v, torch.zeros(5, dtype=torch.int32), pack(layouts), [TARGET] * 3, [SCALE] * 3, EXPONENT
    )
    (STRENGTH * out).backward()
    assert same_bits(state.v, v_new) and same_bits(state.sigma, sigma) and torch.equal(state.exponents, exponents)
    assert error(value, STRENGTH * out.double().detach()) <= 2 * eps(dtype) * value.item()
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        assert relative_error(gradient, leaf.grad) <= 8 * eps(dtype)


def test_steps_follow_one_another(backend: str) -> None:
    """State in, state out: three calls are three steps of the iteration, and gradients add up."""
    w, v = gaussian("follow", 12, 9), unit("follow", 9)
    state, gradient, total = one(w, v), torch.zeros(12, 9, dtype=F64), torch.zeros(12, 9, dtype=F64)
    for _ in range(3):
        s, u, v = step_in_float64(w, v)
        slope = 2 * EXPONENT * s ** (EXPONENT - 1) * (s**EXPONENT - TARGET**EXPONENT)
        total += STRENGTH * SCALE * slope * u[:, None] * v
        state.add([gradient])
        assert error(state.sigma[0], s) <= 1e-14 and state.exponents.tolist() == [torch.frexp(s).exponent.item() - 1]
        assert relative_error(state.v, v) <= 1e-14
    assert relative_error(gradient, total) <= 1e-13


# ---- strength, loss scale, skipped steps ----


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["floats", "tensors"])
def test_the_loss_scale_multiplies_the_gradient_and_not_the_value(
    backend: str, kind: Callable[[float], object]
) -> None:
    w, v = gaussian("scale", 10, 12).float(), unit("scale", 12).float()
    plain, scaled = torch.zeros(10, 12), torch.zeros(10, 12)
    value = one(w, v).add([plain], kind(STRENGTH))
    value_scaled = one(w, v).add([scaled], kind(STRENGTH), kind(1024.0))
    assert same_bits(value, value_scaled) and same_bits(plain * 1024, scaled)
    assert value.shape == () and value.dtype == F32


def test_no_strength_adds_nothing_and_advances(backend: str) -> None:
    w, v = gaussian("none", 10, 12).float(), unit("none", 12).float()
    gradient = gaussian("g", 10, 12).float()
    kept, state = gradient.clone(), one(w, v)
    assert state.add([gradient], 0.0).item() == 0
    assert same_bits(gradient, kept) and relative_error(state.v, v) >= 0.1


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_leaves_everything_as_it_was(backend: str, found: float) -> None:
    matrix, bias = gaussian("skip", 10, 12).float(), gaussian("bias", 10).float()
    layouts = [Layout(), Layout(Kind.BIAS)]
    gradients = [gaussian("gm", 10, 12).float(), gaussian("gb", 10).float()]
    kept = [g.clone() for g in gradients]
    state = State([matrix, bias], layouts, unit("skip", 12).float())
    before = state.bits()
    value = state.add(gradients, found_inf=torch.tensor(found))
    unchanged = [torch.equal(x, y) for x, y in zip([*state.bits(), *gradients], [*before, *kept], strict=True)]
    assert unchanged == [found != 0] * 5
    plain = State([matrix, bias], layouts, unit("skip", 12).float())
    assert same_bits(value, plain.add([torch.zeros_like(g) for g in gradients])), "the value is reported all the same"


# ---- edges ----


@pytest.mark.parametrize("gradient_dtype", [F32, BF16], ids=NAMES.get)
def test_zero_and_empty_parameters_leave_gradients_alone(backend: str, gradient_dtype: torch.dtype) -> None:
    weights = [torch.zeros(6, 5), torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(4)]
    layouts = [Layout(), Layout(), Layout(), Layout(Kind.SHIFT)]
    gradients = [gaussian(str(w.shape), *w.shape).to(gradient_dtype) for w in weights]
    kept = [g.clone() for g in gradients]
    state = State(weights, layouts, torch.cat([unit("z", 5), unit("e", 5)]).float())
    start = state.v.clone()
    value = state.add(gradients)
    assert error(value, STRENGTH * SCALE * TARGET**3) <= 1e-8
    assert all(same_bits(x, y) for x, y in zip(gradients, kept, strict=True))
    assert relative_error(state.v[:5], start[:5]) >= 0.1 and same_bits(state.v[5:], start[5:])
    assert state.sigma.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_not_finite_shows_in_value_and_gradient_and_passes(backend: str, bad: float) -> None:
    clean = gaussian("clean", 20, 12).float()
    spoilt, v = clean.clone(), unit("clean", 12).float()
    spoilt[19, 11] = bad
    state, gradient = one(spoilt, v), torch.zeros(20, 12)
    assert state.add([gradient]).isnan() and gradient.isnan().all()
    assert same_bits(state.v, v) and state.sigma.isnan().all()
    state.weights, gradient, expected = [clean], torch.zeros(20, 12), torch.zeros(20, 12)
    state.add([gradient])
    one(clean, v).add([expected])
    assert same_bits(gradient, expected)


# ---- autograd graphs over gradients ----


@pytest.mark.parametrize("registered", [False, True], ids=["eager", "registered"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=NAMES.get)
def test_a_graph_over_a_gradient_is_out_of_date(backend: str, registered: bool, dtype: torch.dtype) -> None:
    """As after p.grad.add_(): what was saved of it is an error at backward, and no wrong number."""
    state = one(gaussian("graph", 6, 8).to(dtype), unit("graph", 8).to(dtype))
    gradient, factor = gaussian("g", 6, 8).to(dtype), torch.tensor(2.0, requires_grad=True)
    y = (gradient * factor).sum()
    before = gradient._version
    if registered:
        numbers = pack(state.layouts), [TARGET], [SCALE], EXPONENT, torch.tensor(STRENGTH), None, None
        torch.ops.spectral_ops.accumulate_grad_(
            [gradient], state.weights, state.v, state.exponents, state.sigma, *numbers
        )
    else:
        state.add([gradient])
    assert gradient._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("leaf", [True, False])
def test_a_gradient_with_a_graph_of_its_own_is_added_to_without_one(backend: str, leaf: bool) -> None:
    """As after backward(create_graph=True)."""
    state = one(gaussian("own", 6, 8).float(), unit("own", 8).float())
    source = torch.ones(6, 8, requires_grad=True)
    gradient = source if leaf else 2 * source
    kept, node = gradient.detach().clone(), gradient.grad_fn
    state.add([gradient])
    assert gradient.grad_fn is node and relative_error(gradient.detach(), kept) >= 1e-3


def test_gradients_made_under_inference_mode(backend: str) -> None:
    """They have no version; torch refuses to write to them outside."""
    state = one(gaussian("inference", 6, 8).float(), unit("inference", 8).float())
    with torch.inference_mode():
        gradient = torch.zeros(6, 8)
        state.add([gradient])
    assert gradient.count_nonzero() == 48


# ---- the table is kept, and follows its tensors ----


def test_the_table_follows_shapes_strides_and_dtypes(backend: str) -> None:
    """One table object, tensors exchanged between calls: the dtype and strides of this call count, not of the first."""
    state = one(gaussian("t", 6, 8).float(), unit("t", 8).float())
    expected = torch.zeros(6, 8)
    one(gaussian("t", 6, 8).float(), unit("t", 8).float()).add([expected])
    for w in (state.weights[0], transposed(state.weights[0]), state.weights[0].double().float()):
        for gradient in (torch.zeros(6, 8), transposed(torch.zeros(6, 8)), torch.zeros(6, 8, dtype=BF16)):
            state.weights = [w]
            state.v = unit("t", 8).float()
            state.add([gradient])
            assert relative_error(gradient, expected) <= (1e-6 if gradient.dtype == F32 else 2**-8)
    state.weights = [state.weights[0].bfloat16()]
    state.v = unit("t", 8).float()
    gradient = torch.zeros(6, 8)
    state.add([gradient])
    assert 1e-5 <= relative_error(gradient, expected) <= 3e-2  # of the rounded weight


# ---- the oracle ----


def test_oracle_is_strength_times_the_gradient_of_its_own_value() -> None:
    weights = [gaussian("w", 5, 7), gaussian("b", 6)]
    layouts = [Layout(), Layout(Kind.SCALE)]
    v, exponents, sigma = unit("w", 7), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=F64)
    for _ in range(300):  # at a singular vector, where finite differences of the value see the gradient
        v = step_in_float64(weights[0], v)[2]
    gradients = [torch.zeros_like(w) for w in weights]
    accumulate_grad_ref(
        gradients, weights, v.clone(), exponents, sigma, layouts, [TARGET] * 2, [SCALE] * 2, 2.0, STRENGTH
    )

    def value(i: int, place: tuple[int, ...], h: float) -> float:
        moved = [w.clone() for w in weights]
        moved[i][place] += h
        return STRENGTH * penalty_ref(moved, v, exponents, layouts, [TARGET] * 2, [SCALE] * 2, 2.0)[0].item()

    for i, place in [(0, (0, 0)), (0, (4, 6)), (0, (2, 3)), (1, (0,)), (1, (5,))]:
        difference = (value(i, place, 1e-5) - value(i, place, -1e-5)) / 2e-5
        assert error(gradients[i][place], difference) <= 1e-8  # of central differences with h = 1e-5; measured 7e-10
