"""R and its gradient: the formula for every matrix of the zoo, autograd in float64, the edges, the oracle itself."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    BF16,
    BLIND,
    DTYPES,
    EMPTY,
    F16,
    F32,
    F64,
    NAMES,
    SMALLEST,
    WITHOUT_SIGMA,
    Case,
    eps,
    error,
    gaussian,
    relative_error,
    same_bits,
    step_in_float64,
    svd,
    unit,
    unscaled,
    with_values,
    zoo,
)
from torch import Tensor

from spectral_ops import power_iteration, spectral_penalty
from spectral_ops.ops.layout import Kind, Layout, pack, vector_dtype
from spectral_ops.ops.spectral_penalty import (
    spectral_penalty_ref,
    vector_gradient_ref,
    vector_penalty_ref,
)

POWERS_AND_TARGETS = [(2.0, 1.0), (1.0, 1.0), (1.5, 0.5), (3.0, 2.0), (2.0, 0.0)]
# sigma^4, or 4 sigma^3, is beyond float32: the value is inf there and the gradient not worth asking for.
BEYOND_FLOAT32 = ("scale_1e18", "scale_1e9", "rows_1e-18_to_1e18", "largest_diagonal", "largest_dense")


# The oracle of one stack takes its second norm without scaling: where it is the square of a tiny number, it is zero.
TINY = ("smallest_normal", "subnormal")


def slope(sigma: float, exponent: float, target: float) -> float:
    return 2 * exponent * sigma ** (exponent - 1) * (sigma**exponent - target**exponent) if sigma else 0.0


def steepness(sigma: float, exponent: float, target: float) -> float:
    """The size of the two terms of the slope, whose difference is taken: what its rounding is relative to."""
    return 2 * exponent * sigma ** (exponent - 1) * (sigma**exponent + target**exponent) if sigma else 0.0


def rounded_once(x: Tensor, truth: Tensor, dtype: torch.dtype, allowed: float) -> bool:
    """Whether x (dtype) is truth rounded to dtype, where truth itself is known up to `allowed`; False for NaN."""
    x, truth = x.double(), truth.double()
    info = torch.finfo(dtype)
    spacing = torch.clamp(truth.abs() * info.eps, min=SMALLEST[dtype])
    near = (x - truth).abs() <= 0.5 * spacing * (1 + 1e-3) + allowed
    over = (x == truth.sign() * math.inf) & (truth.abs() + allowed >= info.max * (1 + info.eps / 4))
    return bool((near | over).all())


def penalty(w: Tensor, v: Tensor, exponent: float, target: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R, sigma, u and the next v by the registered op."""
    exponents = torch.zeros(1, dtype=torch.int32)
    value, sigma, u, v_new, _ = torch.ops.spectral_ops.spectral_penalty(
        [w], v, exponents, pack([Layout()]), [target], [1.0], exponent
    )
    return value, sigma, u, v_new


# ---- the value ----


@pytest.mark.parametrize(("case", "dtype"), zoo(without=EMPTY))
def test_value_is_the_formula_at_the_sigma_of_the_step(backend: str, case: Case, dtype: torch.dtype) -> None:
    w, v, other = case.matrix(dtype), case.v(dtype), case.v(dtype)
    sigma, _, _ = power_iteration([w], [other])
    value = spectral_penalty([w], [v])
    assert value.shape == () and value.dtype == vector_dtype(dtype)
    assert same_bits(v, other), "v is not that of the same step"
    s = sigma.item()
    if s > torch.finfo(value.dtype).max ** 0.25:
        assert value.item() == math.inf
        return
    # Measured: 1.8 roundings (native takes sigma before its own rounding, reference rounds every operation).
    assert error(value, (s**2 - 1) ** 2) <= 6 * eps(dtype) * (s**2 + 1) ** 2


@pytest.mark.parametrize(("exponent", "target"), POWERS_AND_TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 30.0])
def test_exponent_and_target(backend: str, dtype: torch.dtype, exponent: float, target: float, scale: float) -> None:
    w = (scale * gaussian("exponent", 12, 8) / 6).to(dtype)
    v = unit("exponent", 8).to(vector_dtype(dtype))
    s = step_in_float64(w, v)[0].item()
    value = spectral_penalty([w], [v], exponent=exponent, target=target)
    # The difference may cancel; each of its terms is good to 2k roundings of sigma. Measured 12, for k = 3.
    terms = (s**exponent + target**exponent) ** 2
    assert error(value, (s**exponent - target**exponent) ** 2) <= 30 * eps(dtype) * terms


def test_a_list_is_the_sum_of_its_matrices(backend: str) -> None:
    weights = [gaussian(str(i), 3 + i, 9 - i).to(dtype) for i, dtype in enumerate((F32, BF16, F16, F32))]
    starts = [unit(str(i), w.shape[1]).float() for i, w in enumerate(weights)]
    together, alone = [x.clone() for x in starts], [x.clone() for x in starts]
    value = spectral_penalty(weights, together)
    parts = [spectral_penalty([w], [v]) for w, v in zip(weights, alone, strict=True)]
    assert error(value, sum(part.double() for part in parts)) <= 4 * eps(F32) * value.item()
    for x, y in zip(together, alone, strict=True):
        assert same_bits(x, y)


# ---- the gradient ----


@pytest.mark.parametrize(("case", "dtype"), zoo(without=EMPTY))
def test_gradient_has_rank_one_and_the_norm_of_the_slope(backend: str, case: Case, dtype: torch.dtype) -> None:
    if case.name in BEYOND_FLOAT32 and (dtype in (F32, BF16) or case.name.startswith("largest")):
        w, v = case.matrix(dtype).requires_grad_(), case.v(dtype)
        spectral_penalty([w], [v]).backward()
        assert v.isfinite().all(), "the value may leave its range, v may not"
        return
    w = case.matrix(dtype).requires_grad_()
    value, sigma, u, v = penalty(w, case.v(dtype), 2.0, 1.0)
    value.backward()
    assert w.grad is not None and w.grad.dtype == dtype
    s = sigma.item()
    direction = u.double()[:, None] * v.double()
    # Measured: about 1 rounding of the two terms of the slope. A subnormal sigma is no better than its last place.
    rounding = 6 * eps(dtype) + (SMALLEST[vector_dtype(dtype)] / s if s else 0.0)
    allowed = rounding * steepness(s, 2, 1)
    truth = slope(s, 2, 1) * direction
    last_place = SMALLEST[vector_dtype(dtype)]
    assert rounded_once(w.grad, truth, dtype, allowed * direction.abs().max().item() + last_place)
    if dtype in (F32, F64) and s:
        scaled, power = unscaled(w.grad)
        # The norm of the difference bounds that of every singular value but the first.
        rest = scaled - torch.ldexp(slope(s, 2, 1) * direction, -power)
        limit = torch.ldexp(torch.tensor(allowed + last_place * w.numel() ** 0.5, dtype=F64), -power)
        assert rest.norm() <= 2 * limit
        # u and v are unit vectors up to 21 eps (65536 rows, float64).
        size = torch.ldexp(torch.tensor(abs(slope(s, 2, 1)), dtype=F64), -power)
        assert (scaled.norm() - size).abs() <= 2 * limit + 40 * eps(dtype) * size
    if case.name in WITHOUT_SIGMA:
        assert w.grad.count_nonzero() == 0 and value.item() == 1.0


@pytest.mark.parametrize(("exponent", "target"), POWERS_AND_TARGETS)
@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (1, 5), (5, 1), (8, 2, 3)], ids=str)
def test_gradient_is_autograds_at_fixed_u(backend: str, exponent: float, target: float, shape: tuple[int, ...]) -> None:
    """Away from convergence, where v is not yet a singular vector and the gradient is not that of sigma_1."""
    w = gaussian("fixed_u", *shape).requires_grad_()
    n = math.prod(shape[1:])
    v = unit("fixed_u", n)
    _, u, _ = step_in_float64(w.detach().flatten(1), v)
    sigma = torch.linalg.vector_norm(w.flatten(1).T @ u)
    (expected,) = torch.autograd.grad((sigma**exponent - target**exponent) ** 2, w)
    (found,) = torch.autograd.grad(spectral_penalty([w], [v], exponent=exponent, target=target), w)
    assert relative_error(found, expected) <= 1e-13  # measured 1.3e-15
    if min(shape[0], n) > 1:
        truth = svd(w.flatten(1))
        at_sigma_1 = slope(truth.sigma, exponent, target) * truth.u[:, None] * truth.v
        assert relative_error(found.flatten(1), at_sigma_1) >= 0.1, "v had converged: the test shows nothing"


@pytest.mark.parametrize(("exponent", "target"), POWERS_AND_TARGETS)
def test_gradcheck_at_converged_v(backend: str, exponent: float, target: float) -> None:
    """At a singular vector the dependence of u on W vanishes to first order: finite differences see u v'."""
    weights = [with_values("check1", 6, 5, [2.5, 1.2, 0.7, 0.3, 0.1]), gaussian("check2", 4, 2, 2)]
    converged = [svd(w.flatten(1)).v for w in weights]

    def f(*w: Tensor) -> Tensor:
        return spectral_penalty(list(w), [v.clone() for v in converged], exponent=exponent, target=target)

    assert torch.autograd.gradcheck(f, [w.requires_grad_() for w in weights], eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=NAMES.get)
def test_low_precision_gradient_is_no_worse_than_torchs(backend: str, dtype: torch.dtype) -> None:
    w = (gaussian("low", 60, 40) / 5).to(dtype)
    v = unit("low", 40).float()
    s, u, v_new = step_in_float64(w, v)
    truth = slope(s.item(), 2, 1) * u[:, None] * v_new
    textbook = w.clone().requires_grad_()
    with torch.no_grad():
        y = torch.nn.functional.normalize(w @ v.to(dtype), dim=0)
    ((torch.linalg.vector_norm(textbook.T @ y) ** 2 - 1) ** 2).backward()
    ours = w.clone().requires_grad_()
    spectral_penalty([ours], [v]).backward()
    assert ours.grad is not None and textbook.grad is not None
    # k = 1. Measured: bf16 1.5e-3 against 9.1e-3, fp16 2.0e-4 against 1.2e-3; ours is one rounding to the dtype.
    assert relative_error(ours.grad, truth) <= relative_error(textbook.grad, truth) + 1e-6
    assert relative_error(ours.grad, truth) <= 0.5 * torch.finfo(dtype).eps


def test_gradient_lies_as_its_weight_does(backend: str) -> None:
    """Autograd accumulates without a copy then; an expanded weight gets a dense one."""
    dense = gaussian("lies", 6, 4, 3, 3)
    for w in (dense.contiguous(memory_format=torch.channels_last), dense.movedim(0, -1).contiguous().movedim(-1, 0)):
        w = w.detach().requires_grad_()
        spectral_penalty([w], [unit("lies", 36)]).backward()
        assert w.grad is not None and w.grad.stride() == w.stride()
    row = gaussian("row", 1, 5).requires_grad_()
    spectral_penalty([row.expand(4, 5)], [unit("row", 5)]).backward()
    by_hand = row.detach().expand(4, 5).clone().requires_grad_()
    spectral_penalty([by_hand], [unit("row", 5)]).backward()
    assert row.grad is not None and by_hand.grad is not None
    assert relative_error(row.grad, by_hand.grad.sum(dim=0, keepdim=True)) <= 1e-14


def test_gradient_follows_what_comes_from_above(backend: str) -> None:
    w, frozen = gaussian("up", 6, 4).requires_grad_(), gaussian("frozen", 5, 3)
    (plain,) = torch.autograd.grad(spectral_penalty([w], [unit("up", 4)]), w)
    (scaled,) = torch.autograd.grad(-3 * spectral_penalty([frozen, w], [unit("f", 3), unit("up", 4)]).sqrt() ** 2, w)
    assert relative_error(scaled, -3 * plain) <= 1e-14
    assert not spectral_penalty([frozen], [unit("f", 3)]).requires_grad
    w.grad = torch.ones_like(w)
    spectral_penalty([w], [unit("up", 4)]).backward()
    assert relative_error(w.grad, 1 + plain) <= 1e-14


def test_v_advances_at_every_call_and_carries_no_gradient(backend: str) -> None:
    w = gaussian("advance", 6, 4).requires_grad_()
    with_grad, without, steps = (unit("advance", 4) for _ in range(3))
    for _ in range(3):
        spectral_penalty([w], [with_grad])
        with torch.no_grad():
            spectral_penalty([w], [without])
    power_iteration([w], [steps], n_iter=3)
    assert same_bits(with_grad, without) and same_bits(with_grad, steps)
    assert not with_grad.requires_grad


def test_backward_after_the_next_step_still_sees_its_own_vectors(backend: str) -> None:
    w = gaussian("late", 6, 4).requires_grad_()
    v = unit("late", 4)
    value = spectral_penalty([w], [v])
    (expected,) = torch.autograd.grad(value, w, retain_graph=True)
    spectral_penalty([w], [v])
    (late,) = torch.autograd.grad(value, w)
    assert same_bits(late, expected)


# ---- edges ----


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("exponent", "target"), POWERS_AND_TARGETS)
def test_zero_has_no_gradient(backend: str, dtype: torch.dtype, exponent: float, target: float) -> None:
    w = torch.zeros(4, 6, dtype=dtype, requires_grad=True)
    v = unit("zero", 6).to(vector_dtype(dtype))
    before = v.clone()
    value = spectral_penalty([w], [v], exponent=exponent, target=target)
    value.backward()
    assert error(value, target ** (2 * exponent)) <= 4 * eps(dtype) * target ** (2 * exponent)
    assert w.grad is not None and w.grad.count_nonzero() == 0 and not w.grad.isnan().any()
    assert relative_error(v, before) >= 0.1 and error(v.double().norm(), 1.0) <= 8 * eps(dtype)


@pytest.mark.parametrize(("case", "dtype"), zoo(only=("start_orthogonal", "centred"), dtypes=(F32, BF16)))
def test_v_orthogonal_to_the_rows_has_no_gradient_then_recovers(backend: str, case: Case, dtype: torch.dtype) -> None:
    w, v = case.matrix(dtype).requires_grad_(), case.v(dtype)
    first = spectral_penalty([w], [v])
    (gradient,) = torch.autograd.grad(first, w)
    assert first.item() == 1.0 and gradient.count_nonzero() == 0
    (gradient,) = torch.autograd.grad(spectral_penalty([w], [v]), w)
    assert gradient.isfinite().all() and gradient.count_nonzero() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
def test_not_finite_shows_in_r_and_passes(backend: str, dtype: torch.dtype, bad: float) -> None:
    clean, other = gaussian("clean", 9, 5).to(dtype), gaussian("other", 4, 4).to(dtype)
    spoilt = clean.clone()
    spoilt[8, 2] = bad
    spoilt.requires_grad_()
    v = [unit("clean", 5).to(vector_dtype(dtype)), unit("other", 4).to(vector_dtype(dtype))]
    v[0][2] = 0
    before = v[0].clone()
    value = spectral_penalty([spoilt, other], v)
    value.backward()
    assert not value.isfinite()
    assert spoilt.grad is not None and not spoilt.grad.isfinite().any(), "GradScaler and clipping look at gradients"
    assert same_bits(v[0], before)
    s, _, v_new = step_in_float64(clean, before)
    assert (
        error(spectral_penalty([clean], [v[0]]), (s.item() ** 2 - 1) ** 2) <= 8 * eps(dtype) * (s.item() ** 2 + 1) ** 2
    )
    assert relative_error(v[0], v_new) <= 16 * eps(dtype)


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0)], ids=str)
def test_empty_matrices_count_for_nothing(backend: str, shape: tuple[int, int]) -> None:
    w, empty = gaussian("full", 6, 5), torch.zeros(shape, dtype=F64, requires_grad=True)
    alone = spectral_penalty([w], [unit("full", 5)])
    v = unit("empty", shape[1])
    kept = v.clone()
    value = spectral_penalty([empty, w], [v, unit("full", 5)])
    assert same_bits(value, alone) and same_bits(v, kept)
    nothing = spectral_penalty([empty], [v])
    nothing.backward()
    assert nothing.item() == 0 and empty.grad is not None and empty.grad.shape == shape


@pytest.mark.parametrize("dtype", [F32, F64], ids=NAMES.get)
def test_value_and_gradient_at_the_target(backend: str, dtype: torch.dtype) -> None:
    w = torch.diag(torch.tensor([1.0, 0.5], dtype=dtype)).requires_grad_()
    value = spectral_penalty([w], [torch.tensor([1.0, 0.0], dtype=dtype)])
    value.backward()
    assert value.item() == 0 and w.grad is not None and w.grad.count_nonzero() == 0


# ---- the oracle ----


@pytest.mark.parametrize(
    ("case", "dtype"), zoo(without=(*WITHOUT_SIGMA, *BLIND, *BEYOND_FLOAT32, *TINY), dtypes=(F32, F64))
)
def test_oracle_at_the_svds_vectors(case: Case, dtype: torch.dtype) -> None:
    truth = case.truth(dtype)
    w = case.matrix(dtype).requires_grad_()
    value, _ = spectral_penalty_ref(w[None], truth.v.to(dtype)[None])
    value.backward()
    s = truth.sigma
    long = 4 + max(w.shape) ** 0.5 / 4  # a random walk over sums of up to 65536 terms; measured 3.2 of these
    assert error(value, (s**2 - 1) ** 2) <= 8 * long * eps(dtype) * (s**2 + 1) ** 2
    expected = slope(s, 2, 1) * truth.u[:, None] * truth.v
    assert w.grad is not None
    assert error(w.grad, expected) <= 8 * long * eps(dtype) * steepness(s, 2, 1)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 3.0])
def test_oracle_of_vectors_by_hand(exponent: float) -> None:
    x = torch.tensor([[0.5, -2.0, 0.0], [1.0, 3.0, -1.0]], dtype=F64)
    k, t = exponent, 0.7
    squares = [0.25 + 4.0, 1.0 + 9.0 + 1.0]
    sizes = [0.5, 2.0, 0.0, 1.0, 3.0, 1.0]
    bias = vector_penalty_ref(x, Kind.BIAS, k, t)
    assert error(bias, sum(q**k for q in squares)) <= 1e-13 * bias.item()
    shift = vector_penalty_ref(x, Kind.SHIFT, k, t)
    assert error(shift, sum(q ** (2 * k) for q in sizes)) <= 1e-13 * shift.item()
    scale = vector_penalty_ref(x, Kind.SCALE, k, t)
    assert error(scale, sum((q**k - t**k) ** 2 for q in sizes)) <= 1e-13 * scale.item()


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("kind", [Kind.BIAS, Kind.SCALE, Kind.SHIFT], ids=lambda kind: kind.name.lower())
def test_oracle_of_the_gradient_of_vectors_is_autograds(kind: Kind, exponent: float) -> None:
    x = torch.tensor([[0.5, -2.0, 0.3], [1.0, 3.0, -1.0]], dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(vector_penalty_ref(x, kind, exponent, 0.7), x)
    assert relative_error(vector_gradient_ref(x.detach(), kind, exponent, 0.7), expected) <= 1e-14


def test_a_second_derivative_is_refused(backend: str) -> None:
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    value = spectral_penalty([w], [torch.nn.functional.normalize(torch.ones(3, dtype=torch.float64), dim=0)])
    (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one differentiation, got a second one"):
        gradient.sum().backward()
