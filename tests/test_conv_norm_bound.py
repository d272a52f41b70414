"""The upper bound of a conv layer's norm: above it for any layer, and the least over unfoldings counted by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import conv_samples
import pytest
import torch
from conv_samples import BASE, PATCHES, SAMPLES, UP, ConvSample, accepted, combinations, matrices, samples
from helpers import BF16, DTYPES, F32, F64, NAMES, eps, relative_error, same_bits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layout_samples import channels_last, spread, transposed
from torch import Tensor

from spectral_ops import spectral_norm, use_backend
from spectral_ops.ops.conv_spectral_norm import ConvNormBound, _counts, conv_norm_bound
from spectral_ops.ops.layout import vector_dtype

conv_backend = conv_samples.conv_backend

# Of the norms, which are sigma plus its residual bound: that may be loose by as much. Measured 1.5e-6.
LOOSE = 1e-5


def bound_of(sample: ConvSample, w: Tensor) -> ConvNormBound:
    return conv_norm_bound(w, sample.size, **sample.arguments)


def truth(sample: ConvSample, dtype: torch.dtype) -> float:
    return max(torch.linalg.matrix_norm(block, 2).item() for block in matrices(sample, dtype))


def counts_by_hand(sample: ConvSample, dim: int) -> tuple[int, int]:
    """With the kernel dimension in the columns, in the rows: loops over positions and taps."""
    operator = sample.operator
    coarse, fine = (grid[dim] for grid in operator.grids(sample.kernel))
    reads: dict[tuple[int, int], int] = {}
    for o, t in itertools.product(range(coarse), range(sample.kernel[dim])):
        q = o * operator.stride[dim] + t * operator.dilation[dim] - operator.before[dim]
        if operator.circular or 0 <= q < fine:
            reads[o, t] = q % fine
    seen, taken = [0] * fine, [0] * coarse
    for (o, t), q in reads.items():
        seen[q] += 1
        taken[o] += sum(reads.get((p, t)) == q for p in range(coarse))
    return max(seen), max(taken)


def by_hand(sample: ConvSample, w: Tensor) -> list[list[tuple[float, float, float, tuple[int, ...]]]]:
    """(bound, norm, factor, rows) of every unfolding of every group, by dense SVDs."""
    dims = range(len(sample.kernel))
    out = []
    for part in w.double().chunk(sample.groups):
        each = []
        for rows in itertools.chain(*(itertools.combinations(dims, count) for count in range(len(dims) + 1))):
            columns = [i for i in dims if i not in rows]
            order = [0, *(2 + i for i in rows), 1, *(2 + i for i in columns)]
            matrix = part.permute(order).flatten(0, len(rows)).flatten(1)
            factor = math.sqrt(math.prod(counts_by_hand(sample, i)[i in rows] for i in dims))
            norm = torch.linalg.matrix_norm(matrix, 2).item()
            each.append((factor * norm, norm, factor, rows))
        out.append(each)
    return out


# ---- a bound ----


@pytest.mark.parametrize(("sample", "dtype"), samples())
def test_it_is_one(conv_backend: str, sample: ConvSample, dtype: torch.dtype) -> None:
    found = bound_of(sample, sample.weight(dtype))
    assert found.bound.shape == found.norm.shape == () and found.bound.dtype == vector_dtype(dtype)
    assert found.bound.item() >= truth(sample, dtype) * (1 - 2 * eps(dtype))
    assert relative_error(found.bound, found.factor * found.norm.detach().double()) <= eps(dtype)


@st.composite
def layers(draw: st.DrawFn) -> ConvSample:
    """Mostly odd ones: inputs smaller than the padding or the kernel, outputs longer than the input, gaps, groups."""
    dims = draw(st.sampled_from([1, 1, 1, 2, 2, 3]))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(dims))

    groups, transposed = draw(st.integers(1, 2)), draw(st.booleans())
    channels = (groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)))
    size = each(1, 9) if dims == 1 else each(1, 5) if dims == 2 else each(1, 3)
    kernel = each(1, 5 - dims)
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "circular"]))
    layer = (each(1, 3), each(0, 4), each(1, 2), groups, mode, transposed)
    return ConvSample(size, kernel, *channels, *layer, draw(st.integers(0, 1)) if transposed else 0)


def check_any(sample: ConvSample) -> None:
    assume(accepted(sample))
    w = sample.weight()
    largest = max(torch.linalg.matrix_norm(block, 2).item() for block in sample.dense(w))
    for backend in ("reference", "native"):
        with use_backend(backend):
            assert bound_of(sample, w).bound.item() >= largest * (1 - 4 * eps(F64))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layers())
def test_it_is_one_for_any_layer(sample: ConvSample) -> None:
    check_any(sample)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, derandomize=True)
@given(layers())
def test_it_is_one_for_any_layer_at_length(sample: ConvSample) -> None:
    check_any(sample)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_it_is_the_least_over_unfoldings_and_the_largest_over_groups(conv_backend: str, sample: ConvSample) -> None:
    w = sample.weight()
    found, expected = bound_of(sample, w), max(min(each) for each in by_hand(sample, w))
    assert expected[0] * (1 - 1e-9) <= found.bound.item() <= expected[0] * (1 + LOOSE)
    # Which unfolding, up to ties.
    same = [x for each in by_hand(sample, w) for x in each if x[3] == found.rows and x[2] == found.factor]
    assert any(abs(found.norm.item() - norm) <= LOOSE * norm for _, norm, _, _ in same)


@pytest.mark.parametrize(
    ("sample", "counts"),
    [
        (ConvSample((9,), (3,), padding=1), (3, 3)),
        (ConvSample((9,), (3,), padding=1, stride=2), (2, 3)),  # an input is seen by two windows
        (ConvSample((9,), (3,), padding=1, stride=3), (1, 3)),
        (ConvSample((9,), (3,), stride=2, dilation=2), (3, 3)),  # dilation lines the taps up
        (ConvSample((2,), (5,), padding=2), (2, 2)),  # no window has more than two taps inside
        (ConvSample((9,), (3,), padding=1, padding_mode="circular"), (3, 3)),
        (ConvSample((4,), (3,), padding=4, padding_mode="circular"), (8, 9)),  # ten outputs of four inputs
        (ConvSample((5,), (3,), stride=2, padding=1, transposed=True), (2, 3)),
        (ConvSample((2,), (2,), stride=1, padding=1, transposed=True), (2, 1)),  # one output, seen twice
    ],
    ids=str,
)
def test_counts(sample: ConvSample, counts: tuple[int, int]) -> None:
    assert _counts(sample.operator, sample.kernel, 0) == counts


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_counts_are_those_by_hand(dims: int, transposed: bool) -> None:
    for sample in combinations(dims, transposed):
        if sample.groups == 1 and accepted(sample):
            for dim in range(dims):
                assert _counts(sample.operator, sample.kernel, dim) == counts_by_hand(sample, dim), sample


def test_the_factor_is_never_more_than_the_root_of_the_kernel_where_nothing_is_read_again() -> None:
    for sample in SAMPLES:
        coarse, fine = sample.operator.grids(sample.kernel)
        again = [c * s > n for c, s, n in zip(coarse, sample.operator.stride, fine, strict=True)]
        if not (sample.operator.circular and any(again)):
            found = bound_of(sample, sample.weight())
            assert found.factor <= math.sqrt(math.prod(sample.kernel)), sample


# ---- where it is exact, and where sqrt(prod k) times the reshaped weight would be none ----


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_patch_embedding_is_its_reshaped_weight(conv_backend: str, dtype: torch.dtype) -> None:
    w = PATCHES.weight(dtype)
    found = bound_of(PATCHES, w)
    assert found.rows == () and found.factor == 1
    assert relative_error(found.bound, spectral_norm(w)) <= LOOSE


def test_a_circular_output_longer_than_its_input_may_be_above_the_root(conv_backend: str) -> None:
    """By hand: every output of a constant is 3/2, there are 10, and sqrt(3) ||(1, 1, 1)|| is 3."""
    sample = ConvSample((4,), (3,), 1, 1, padding=4, padding_mode="circular")
    w = torch.ones(1, 1, 3, dtype=F64)
    norm = torch.linalg.matrix_norm(sample.whole(w), 2).item()
    assert norm >= 1.5 * math.sqrt(10) > 3
    assert norm <= bound_of(sample, w).bound.item() <= math.sqrt(3) * math.sqrt(8) * (1 + LOOSE)


# ---- the gradient, and weights of all sorts ----


@pytest.mark.parametrize("sample", [BASE, UP, SAMPLES[2], PATCHES], ids=str)
def test_gradcheck(conv_backend: str, sample: ConvSample) -> None:
    def f(w: Tensor) -> Tensor:
        return bound_of(sample, w).bound

    # The residual bound, a constant to autograd, moves with the weight: 1e-6 of the norm at most.
    assert torch.autograd.gradcheck(f, [sample.weight().requires_grad_()], eps=1e-4, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
@pytest.mark.parametrize("place", [channels_last, transposed, spread], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sample", [BASE, UP], ids=str)
def test_weights_lie_anywhere(
    conv_backend: str, sample: ConvSample, place: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    plain = sample.weight(dtype)
    w = place(plain).requires_grad_()
    found = bound_of(sample, w)
    assert same_bits(found.bound.detach(), bound_of(sample, plain).bound)  # unfolding copies
    found.bound.backward()
    assert w.grad is not None and w.grad.dtype == dtype and w.grad.any()


@pytest.mark.parametrize("sample", [BASE, UP, SAMPLES[2]], ids=str)
def test_zero_and_not_finite(conv_backend: str, sample: ConvSample) -> None:
    w = torch.zeros(sample.shape, requires_grad=True)
    found = bound_of(sample, w)
    found.bound.backward()
    assert found.bound.item() == 0 and w.grad is not None and not w.grad.any()
    for bad in (math.nan, math.inf):
        w = sample.weight(F32)
        w[-1, 0, 0] = bad
        assert bound_of(sample, w).bound.isnan()


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=NAMES.get)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_weights(conv_backend: str, dtype: torch.dtype, scale: float) -> None:
    w = (scale * BASE.weight()).to(dtype)
    norm = torch.linalg.matrix_norm(BASE.whole(w), 2).item()
    assert norm * (1 - 2 * eps(dtype)) <= bound_of(BASE, w).bound.item() <= 3 * norm


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (4, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("how", [{}, {"transposed": True}], ids=str)
def test_layers_without_channels_have_norm_zero(conv_backend: str, shape: tuple[int, ...], how: dict[str, Any]) -> None:
    assert conv_norm_bound(torch.zeros(shape), (6, 5), **how).bound.item() == 0
