"""The oracle of a warm step against the SVD, and the zoo of matrices that its tests and the kernels' go through."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    EMPTY,
    F64,
    ZOO,
    Case,
    eps,
    error,
    gaussian,
    roundings,
    same_bits,
    slack,
    step_in_float64,
    unit,
    with_values,
    zoo,
)

from spectral_ops.ops.layout import Layout, vector_dtype
from spectral_ops.ops.power_iteration import another_unit_vector, power_iteration_ref, steps_ref


@pytest.mark.parametrize(("case", "dtype"), zoo(without=(*EMPTY, "zero")))
def test_oracle_fixed_point_is_the_top_singular_triple(case: Case, dtype: torch.dtype) -> None:
    truth = case.truth(dtype)
    w, v = case.matrix(dtype)[None], truth.v.to(vector_dtype(dtype))[None]
    sigma, u, v_new = power_iteration_ref(w, v)
    # In float64 the truth has roundings of its own. Vectors turn by rounding over the gap; measured 32 eps.
    assert error(sigma[0], truth.sigma) <= slack(dtype, 2 * roundings(w[0]), truth.sigma)
    allowed = 8 * (roundings(w[0]) + roundings(w[0].T)) * eps(dtype)
    assert error(v_new[0], truth.v) <= allowed
    assert error(u[0], truth.u) <= allowed


def test_oracle_treats_a_stack_as_its_matrices() -> None:
    stack, v = gaussian("stack", 5, 7, 6), torch.stack([unit(str(i), 6) for i in range(5)])
    stack[2], stack[3, 1, 1] = 0, float("nan")
    sigma, u, v_new = power_iteration_ref(stack, v)
    for i in range(5):
        one = power_iteration_ref(stack[i : i + 1], v[i : i + 1])
        for whole, single in zip((sigma, u, v_new), one, strict=True):
            assert torch.allclose(whole[i], single[0], rtol=1e-14, atol=0, equal_nan=True)
    assert sigma[2] == 0 and sigma[3].isnan() and same_bits(v_new[3], v[3])


def test_oracle_of_lists_cuts_the_flat_vectors_in_order() -> None:
    weights = [gaussian("first", 4, 6), gaussian("bias", 5), gaussian("second", 6, 4)]
    layouts = [Layout(), Layout(kind=1), Layout(parts=2)]
    v = torch.cat([unit("1", 6), unit("2", 4), unit("3", 4)])
    sigma, u, v_new, exponents = steps_ref(weights, v, torch.zeros(3, dtype=torch.int32), layouts, 1)
    matrices = [weights[0], weights[2][:3], weights[2][3:]]
    expected = [step_in_float64(w, x) for w, x in zip(matrices, v.split([6, 4, 4]), strict=True)]
    assert error(sigma, torch.stack([e[0] for e in expected])) <= 1e-14
    assert error(u, torch.cat([e[1] for e in expected])) <= 1e-14
    assert error(v_new, torch.cat([e[2] for e in expected])) <= 1e-14
    assert exponents.tolist() == [torch.frexp(e[0]).exponent.item() - 1 for e in expected]


def test_the_other_unit_vector_is_a_fixed_function_of_the_column_and_of_v0() -> None:
    # Written down once: a change of the hash would change every run that ever met W v = 0.
    v = torch.zeros(1, 4, dtype=F64)
    v[0, 0] = 1.0
    first = another_unit_vector(v)
    assert same_bits(first, another_unit_vector(v + torch.tensor([0.0, 1.0, 2.0, 3.0])))
    assert error(first @ first.T, torch.ones(1, 1)) <= 1e-15
    expected = torch.tensor([[hash32(j, 0x3F800000) for j in range(4)]], dtype=F64)
    assert error(first, expected / expected.norm()) <= 1e-15
    assert same_bits(another_unit_vector(torch.tensor([[0.25]])), torch.tensor([[-0.25]]))


def hash32(j: int, seed: int) -> float:
    """lowbias32 in Python's integers, on [-1, 1)."""
    mask = 0xFFFFFFFF
    x = (j * 0x9E3779B9 + seed) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    x ^= x >> 16
    return (x >> 8) * 2.0**-23 - 1.0


def test_the_zoo_is_what_it_says() -> None:
    """A case that lost its property would leave tests that pass and say nothing."""
    values = {case.name: case.truth(F64).values for case in ZOO if F64 in case.dtypes and case.name not in EMPTY}
    assert error(values["repeated_top"][:3], torch.full((3,), 2.0)) <= 1e-14
    assert error(values["gap_1e-6"][0] - values["gap_1e-6"][1], 1e-6) <= 1e-14
    assert values["rank_one"][1] <= 1e-15 and values["graded"][12] <= 1.1e-12
    assert values["hilbert"][11] <= 1e-15 and error(values["orthogonal"], torch.ones(16)) <= 1e-14
    assert error(values["skew"][::2][:7], values["skew"][1::2]) <= 1e-13  # in pairs
    assert error(with_values("x", 8, 5, [3, 2]).T @ with_values("x", 8, 5, [3, 2]), 0.0) == float("inf")
    for case in ZOO:
        for dtype in case.dtypes:
            w = case.matrix(dtype)
            assert w.dtype == dtype and w.isfinite().all()
            assert case.truth(dtype).sigma <= torch.finfo(vector_dtype(dtype)).max
            if case.name in ("start_orthogonal", "centred"):
                assert (w.double() @ case.v(dtype).double()).abs().max() == 0
            if case.name == "subnormal":
                assert 0 < w.double().abs().max() < torch.finfo(dtype).tiny
            if case.name == "largest_diagonal":
                assert case.truth(dtype).sigma == torch.finfo(dtype).max
