"""Warm steps: what holds for every matrix of the zoo, the ways out of W v = 0 and of NaN."""

from __future__ import annotations

import functools
from typing import NamedTuple

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
    WITHOUT_SIGMA,
    Case,
    eps,
    error,
    gaussian,
    relative_error,
    roundings,
    same_bits,
    slack,
    step_in_float64,
    unit,
    unscaled,
    zoo,
)
from torch import Tensor

from spectral_ops import power_iteration, use_backend
from spectral_ops.ops.layout import Layout, pack, vector_dtype

STEPS = 6


class Step(NamedTuple):
    sigma: float
    u: Tensor
    v_before: Tensor
    v: Tensor


@functools.cache
def walk(case: Case, dtype: torch.dtype, backend: str) -> list[Step]:
    """STEPS single steps from the case's start vector."""
    w, v = case.matrix(dtype), case.v(dtype)
    steps = []
    for _ in range(STEPS):
        before = v.clone()
        sigma, (u,), _ = power_iteration([w], [v])
        steps.append(Step(sigma.item(), u, before, v.clone()))
    assert same_bits(w, case.matrix(dtype)), "the weight was changed"
    return steps


def turns(w: Tensor, v: Tensor) -> float:
    """By how much an error of ||W|| in y = W v turns u: ||W|| / ||y||."""
    w, _ = unscaled(w)
    return (w.norm() / (w @ v.double()).norm()).item()


# ---- properties of the step, for every matrix ----


@pytest.mark.parametrize(("case", "dtype"), zoo(without=EMPTY))
def test_sigma_is_never_above_sigma_1(backend: str, case: Case, dtype: torch.dtype) -> None:
    limit = case.truth(dtype).sigma + slack(dtype, roundings(case.matrix(dtype)), case.truth(dtype).sigma)
    for step in walk(case, dtype, backend):
        assert 0 <= step.sigma <= limit


@pytest.mark.parametrize(("case", "dtype"), zoo(without=EMPTY))
def test_sigma_never_falls_for_a_fixed_matrix(backend: str, case: Case, dtype: torch.dtype) -> None:
    sigmas = [step.sigma for step in walk(case, dtype, backend)]
    allowed = slack(dtype, roundings(case.matrix(dtype)), case.truth(dtype).sigma)  # measured: 1.9 roundings
    for before, after in zip(sigmas, sigmas[1:], strict=False):
        assert before - after <= allowed


@pytest.mark.parametrize(("case", "dtype"), zoo(without=EMPTY))
def test_u_and_v_are_unit_vectors(backend: str, case: Case, dtype: torch.dtype) -> None:
    # Measured: native 0.5 eps, in float64 12 by the 65536 terms of the check itself; reference 5.5 and 21.
    allowed = (60 if dtype == F64 else 12) * eps(dtype)
    for step in walk(case, dtype, backend):
        assert error(step.v.double().norm(), 1.0) <= allowed
        assert error(step.u.double().norm(), 1.0 if step.sigma > 0 else 0.0) <= allowed


@pytest.mark.parametrize(("case", "dtype"), zoo(without=WITHOUT_SIGMA))
def test_sigma_times_v_is_w_transposed_u(backend: str, case: Case, dtype: torch.dtype) -> None:
    w, _ = unscaled(case.matrix(dtype))
    for step in walk(case, dtype, backend):
        if step.sigma == 0:
            assert case.name in BLIND and step.u.abs().max() == 0
            continue
        z = w.T @ step.u.double()
        # Direction, and so free of sigma's own rounding where that is subnormal. Relative to z, as z is what is summed.
        allowed = (roundings(w) + roundings(w.T)) * eps(dtype) * w.norm().item() / z.norm().item()
        assert relative_error(step.v, z / z.norm()) <= allowed


@pytest.mark.parametrize(("case", "dtype"), zoo(without=(*WITHOUT_SIGMA, *BLIND)))
def test_one_step_is_the_formula(backend: str, case: Case, dtype: torch.dtype) -> None:
    w = case.matrix(dtype)
    first = walk(case, dtype, backend)[0]
    sigma, u, v = step_in_float64(w, first.v_before)
    turned = eps(dtype) * turns(w, first.v_before)
    allowed = roundings(w.T) + roundings(w)
    assert relative_error(first.u, u) <= allowed * turned
    assert relative_error(first.v, v) <= allowed * turned * (case.truth(dtype).sigma / sigma.item())
    assert error(torch.tensor(first.sigma, dtype=F64), sigma) <= slack(dtype, allowed, case.truth(dtype).sigma) + (
        allowed * turned * case.truth(dtype).sigma
    )


# From 2^-100 to 2^100: native leaves its middle range at 2^24, float32 its own at 2^63 (squares) and 2^31 (z).
POWERS = (-100, -40, -5, 0, 5, 40, 100)


@pytest.mark.parametrize(("case", "dtype"), zoo(without=WITHOUT_SIGMA))
def test_sigma_scales_exactly_with_powers_of_two(backend: str, case: Case, dtype: torch.dtype) -> None:
    w, v = case.matrix(dtype), case.v(dtype)
    normal = torch.finfo(vector_dtype(dtype))
    found = []
    for power in POWERS:
        c = -(2.0**power)
        scaled = (w.double() * c).to(dtype)
        if not torch.equal(scaled.double() / c, w.double()):
            continue  # out of the dtype's range; how many are in is asserted below
        sigma, _, _ = power_iteration([scaled], [v.clone()], n_iter=2)
        if normal.tiny <= sigma.item() <= normal.max:
            found.append(sigma.item() / abs(c))
    assert len(found) >= {"subnormal": 1}.get(case.name, 2 if dtype == F16 else 3)
    if backend == "triton":
        # What is read twice, because its range was left, is summed in other panels the second time.
        assert max(abs(x - found[0]) for x in found) <= 4 * eps(dtype) * found[0]
    else:
        assert found == [found[0]] * len(found)


@pytest.mark.parametrize(
    ("case", "dtype"), zoo(without=(*WITHOUT_SIGMA, *BLIND, "largest_diagonal"), dtypes=(F32, F64))
)
def test_sigma_scales_with_any_factor(backend: str, case: Case, dtype: torch.dtype) -> None:
    w, v = case.matrix(dtype), case.v(dtype)
    sigma, _, _ = power_iteration([w * -0.37], [v])
    # Two sums, and the rounding of -0.37 W, which turns y as any other error of eps ||W|| does.
    allowed = slack(dtype, 4 * roundings(w) * turns(w, case.v(dtype)), 0.37 * case.truth(dtype).sigma)
    assert abs(sigma.item() - 0.37 * walk(case, dtype, backend)[0].sigma) <= allowed


@pytest.mark.parametrize(("case", "dtype"), zoo(without=WITHOUT_SIGMA))
def test_sigma_converges_at_least_at_its_rate(backend: str, case: Case, dtype: torch.dtype) -> None:
    """With a = (v . v_1)^2 at the start, s after N steps is at least sigma_1 a^(1/4N), whatever the others are.

    s^2 is the ratio of the last two of the 2N + 1 moments sum_i a_i sigma_i^(2j). These are log-convex, so this ratio
    is the largest of all and at least their geometric mean.
    """
    truth, steps = case.truth(dtype), 12
    v = walk(case, dtype, backend)[0].v.clone() if case.name in BLIND else case.v(dtype)  # a blind step finds a start
    a = (v.double() @ truth.v).item() ** 2
    assert a > 1e-9
    sigma, _, _ = power_iteration([case.matrix(dtype)], [v], n_iter=steps)
    allowed = slack(dtype, roundings(case.matrix(dtype)), truth.sigma)
    assert truth.sigma * a ** (1 / (4 * steps)) - sigma.item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_steps_of_one_call_are_those_of_many_calls(backend: str, dtype: torch.dtype) -> None:
    weights = [gaussian("a", 9, 40).to(dtype), gaussian("b", 30, 7).to(dtype)]
    one, many = ([unit(str(w.shape), w.shape[1]).to(vector_dtype(dtype)) for w in weights] for _ in range(2))
    sigma, u, v = power_iteration(weights, one, n_iter=3)
    for _ in range(3):
        sigma_many, u_many, _ = power_iteration(weights, many)
    assert v[0] is one[0] and v[1] is one[1]
    assert same_bits(sigma, sigma_many)
    for x, y in zip([*u, *v], [*u_many, *many], strict=True):
        assert same_bits(x, y)


def test_what_is_returned(backend: str) -> None:
    conv = gaussian("conv", 6, 2, 3, 3).float().requires_grad_()
    matrix = gaussian("matrix", 4, 5).bfloat16()
    v = [unit("conv", 18).float(), unit("matrix", 5).float()]
    expected = [step_in_float64(w.detach().flatten(1), x) for w, x in zip((conv, matrix), v, strict=True)]
    sigma, u, _ = power_iteration([conv, matrix], v)
    assert sigma.shape == (2,) and sigma.dtype == F32 and not sigma.requires_grad
    assert [x.shape for x in u] == [(6,), (4,)] and not u[0].requires_grad
    for i, (s, left, right) in enumerate(expected):
        assert error(sigma[i], s) <= slack(F32, 8, s.item())
        assert relative_error(u[i], left) <= 8 * eps(F32) and relative_error(v[i], right) <= 8 * eps(F32)


# ---- low precision: no worse than plain torch in the same dtype ----


@pytest.mark.parametrize("dtype", [BF16, F16], ids=NAMES.get)
@pytest.mark.parametrize("shape", [(5, 4), (64, 48), (300, 200), (1000, 17)], ids=str)
def test_no_worse_than_torch_in_the_same_dtype(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    w = (gaussian("yardstick", *shape) / shape[0] ** 0.5).to(dtype)
    v = unit("yardstick", shape[1]).float()
    truth, _, truth_v = step_in_float64(w, v)
    y = w @ v.to(dtype)
    z = w.T @ y
    err_torch = error(z.norm() / y.norm(), truth)
    err_torch_v = relative_error(z / z.norm(), truth_v)
    sigma, _, _ = power_iteration([w], [v])
    # k = 1: we sum in float32. eps: what float32 itself leaves, measured 1e-7 of sigma, 5e-7 of v; torch 2e-4 and more.
    assert error(sigma[0], truth) <= err_torch + 1e-6 * truth.item()
    assert relative_error(v, truth_v) <= err_torch_v + 1e-6
    assert err_torch_v >= 20 * relative_error(v, truth_v), "the yardstick is not of low precision"


# ---- W v = 0 ----


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("n", [1, 2, 7, 5000], ids=["one_column", "two", "seven", "column_blocks"])
def test_a_zero_matrix_gives_zero_and_another_unit_vector(backend: str, dtype: torch.dtype, n: int) -> None:
    w = torch.zeros(4, n, dtype=dtype)
    start = unit("zero", n).to(vector_dtype(dtype))
    results = []
    for _ in range(2):
        v = start.clone()
        sigma, (u,), _ = power_iteration([w], [v])
        assert sigma.item() == 0 and same_bits(u, torch.zeros_like(u))
        results.append(v)
    assert same_bits(*results)
    assert error(v.double().norm(), 1.0) <= (80 if dtype == F64 else 8) * eps(dtype)  # float64: 34, of 5000 terms
    assert relative_error(v, start) >= 0.1, "v is what it was"
    with use_backend("reference"):
        power_iteration([w], [start])
    assert error(v, start) <= 2 * eps(dtype), "the backends differ"
    power_iteration([w], [v])
    assert relative_error(v, start) >= 0.1, "a second zero step led nowhere new"


@pytest.mark.parametrize(("case", "dtype"), zoo(only=("start_orthogonal", "centred")))
def test_a_v_orthogonal_to_the_rows_recovers_at_the_next_step(backend: str, case: Case, dtype: torch.dtype) -> None:
    first, second = walk(case, dtype, backend)[:2]
    assert first.sigma == 0 and first.u.abs().max() == 0
    assert second.sigma >= 0.3 * case.truth(dtype).sigma


@pytest.mark.parametrize(("case", "dtype"), zoo(only=("centred_inexact",)))
def test_a_v_orthogonal_up_to_rounding_recovers(backend: str, case: Case, dtype: torch.dtype) -> None:
    assert walk(case, dtype, backend)[1].sigma >= 0.3 * case.truth(dtype).sigma


def test_z_zero_where_y_is_not(backend: str) -> None:
    """The smallest numbers: y does not vanish, but without another exponent its products with W would."""
    w = torch.full((3, 4), 2.0**-149)
    sigma, _, v = power_iteration([w], [torch.full((4,), 0.5)])
    assert error(sigma[0], 12**0.5 * 2.0**-149) <= 2.0**-149
    assert error(v[0], torch.full((4,), 0.5, dtype=F64)) <= 2 * eps(F32)


# ---- not finite ----


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [(0, 0), (69, 4999), (35, 4998)], ids=["first", "last", "middle"])
def test_a_matrix_that_is_not_finite_leaves_v_alone(
    backend: str, dtype: torch.dtype, bad: float, place: tuple[int, int]
) -> None:
    w, other = gaussian("finite", 70, 5000).to(dtype), gaussian("other", 6, 5).to(dtype)
    spoilt = w.clone()
    spoilt[place] = bad
    start = [unit("finite", 5000).to(vector_dtype(dtype)), unit("other", 5).to(vector_dtype(dtype))]
    start[0][place[1]] = 0  # inf * 0
    expected = [x.clone() for x in start]
    sigma_expected, u_expected, _ = power_iteration([w, other], expected)
    v = [x.clone() for x in start]
    sigma, u, _ = power_iteration([spoilt, other], v)
    assert sigma[0].isnan() and u[0].isnan().all()
    assert same_bits(v[0], start[0])
    assert same_bits(sigma[1], sigma_expected[1]) and same_bits(v[1], expected[1]) and same_bits(u[1], u_expected[1])
    v[1].copy_(start[1])
    sigma, u, _ = power_iteration([w, other], v)  # the next clean step
    assert same_bits(sigma, sigma_expected)
    for x, y in zip([*v, *u], [*expected, *u_expected], strict=True):
        assert same_bits(x, y)


# ---- empty ----


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0), (0, 3, 5), (4, 2, 0)], ids=str)
def test_empty_matrices_count_for_nothing(backend: str, shape: tuple[int, ...]) -> None:
    n = torch.zeros(shape)[:1].numel() if shape[0] else torch.zeros(1, *shape[1:]).numel()
    w, empty = gaussian("full", 6, 5).float(), torch.zeros(shape)
    v = [unit("full", 5).float(), unit("empty", n).float(), unit("full", 5).float()]
    kept = v[1].clone()
    sigma, u, _ = power_iteration([w, empty, w], v, n_iter=2)
    assert sigma[1] == 0 and u[1].shape == (shape[0],) and u[1].abs().sum() == 0
    assert same_bits(v[1], kept)
    assert same_bits(sigma[0], sigma[2]) and same_bits(v[0], v[2])
    second = step_in_float64(w, step_in_float64(w, unit("full", 5))[2])
    assert error(sigma[0], second[0]) <= slack(F32, 4, second[0].item())
    sigma, _, _ = power_iteration([empty], [kept])
    assert sigma.tolist() == [0.0]


# ---- the state of exponents ----


@pytest.mark.parametrize("dtype", [F32, F64], ids=NAMES.get)
@pytest.mark.parametrize("scale", [-120, -30, 0, 30, 120], ids=lambda p: f"sigma_2^{p}")
@pytest.mark.parametrize("stale", [-126, -60, -25, 0, 25, 60, 126], ids=lambda p: f"exponent_{p}")
def test_a_wrong_exponent_costs_no_digit(backend: str, dtype: torch.dtype, scale: int, stale: int) -> None:
    w = (gaussian("stale", 40, 30) * 2.0**scale).to(dtype)
    v = unit("stale", 30).to(vector_dtype(dtype))
    exponents = torch.tensor([stale], dtype=torch.int32)
    sigma, u, v_new, after = torch.ops.spectral_ops.power_iteration([w], v, exponents, pack([Layout()]), 1)
    truth, truth_u, truth_v = step_in_float64(w, v)
    assert error(sigma[0], truth) <= slack(dtype, 8, truth.item())
    assert relative_error(u, truth_u) <= 16 * eps(dtype) and relative_error(v_new, truth_v) <= 16 * eps(dtype)
    assert after.tolist() == [torch.frexp(sigma).exponent.item() - 1]
    assert exponents.item() == stale, "an input was changed"
