"""Parameters read in every layout, against matrices cut out by other means; vector parameters; lists of both."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BF16, DTYPES, F16, F32, F64, NAMES, eps, error, gaussian, relative_error, same_bits, unit
from layout_samples import (
    SAMPLES,
    Sample,
    channels_last,
    penalty_in_float64,
    samples,
    spread,
    transposed,
    vector_penalty_in_float64,
    window,
)
from torch import Tensor

from spectral_ops.ops.layer_table import layer_table
from spectral_ops.ops.layout import Kind, Layout, as_matrices, pack, sizes, unpack, vector_dtype

EXPONENTS = (1.0, 1.5, 2.0, 3.0)
VECTOR_KINDS = (Kind.BIAS, Kind.SCALE, Kind.SHIFT)


def penalty(
    weights: list[Tensor], layouts: list[Layout], v: Tensor, targets: list[float], scales: list[float], exponent: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = sum(layout.parts for layout in layouts if layout.is_matrix)
    exponents = torch.zeros(count, dtype=torch.int32)
    return torch.ops.spectral_ops.spectral_penalty(weights, v, exponents, pack(layouts), targets, scales, exponent)


# ---- reading ----


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_as_matrices_is_a_view_of_the_matrices(sample: Sample) -> None:
    w = sample.tensor(F32)
    expected = sample.matrices(w)
    view = as_matrices(w, sample.layout)
    parts, m, n = sizes(w.shape, sample.layout)
    assert (parts, m, n) == (len(expected), *expected[0].shape)
    assert view.shape[:2] == (parts, m) and math.prod(view.shape[2:]) == n
    assert view.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    for part, matrix in zip(view, expected, strict=True):
        assert torch.equal(part.reshape(m, n), matrix)


def test_layouts_survive_packing() -> None:
    layouts = [sample.layout for sample in SAMPLES] + [Layout(kind, 3) for kind in VECTOR_KINDS]
    assert unpack(pack(layouts)) == layouts


def test_sizes_of_vectors() -> None:
    assert sizes((12,), Layout(Kind.BIAS, 3)) == (3, 1, 4)
    assert sizes((4, 5), Layout(Kind.SCALE)) == (1, 1, 20)
    assert sizes((0,), Layout(Kind.SHIFT)) == (1, 1, 0)


# ---- the step and its gradient, in every layout ----


@pytest.mark.parametrize(("sample", "dtype"), samples())
def test_every_layout_gives_its_matrices_penalty_and_gradient(backend: str, sample: Sample, dtype: torch.dtype) -> None:
    w = sample.tensor(dtype)
    vectors = sample.vectors(dtype)
    w64 = w.detach().double().requires_grad_()
    truth, sigmas, after = penalty_in_float64(sample.matrices(w64), vectors, 1.5, 0.4)
    (expected,) = torch.autograd.grad(truth, w64) if truth.requires_grad else (torch.zeros_like(w64),)
    w.requires_grad_()
    value, sigma, u, v_new, _ = penalty([w], [sample.layout], torch.cat(vectors), [0.4], [1.0], 1.5)
    value.backward()
    # y and z are sums of up to 9001 terms of random sign: measured 9 roundings (column_blocks), either backend.
    rounding = 32 * eps(dtype)
    assert relative_error(sigma, torch.stack(sigmas)) <= rounding
    assert relative_error(v_new, torch.cat(after)) <= rounding
    assert (
        error(torch.linalg.vector_norm(u.double().view(len(after), -1), dim=1), (torch.stack(sigmas) > 0).double())
        <= 1e-6
    )
    terms = (torch.stack(sigmas) ** 1.5 + 0.4**1.5) ** 2
    assert error(value, truth.detach()) <= 2 * rounding * terms.sum().item()
    assert w.grad is not None and w.grad.dtype == dtype and w.grad.shape == w.shape
    # The slope may cancel; the size of its two terms is what rounding is relative to. Then one rounding to the dtype.
    steepest = (3 * torch.stack(sigmas) ** 0.5 * (torch.stack(sigmas) ** 1.5 + 0.4**1.5)).max().item()
    assert (
        error(w.grad, expected) <= 2 * rounding * steepest + 0.5 * torch.finfo(dtype).eps * expected.abs().max().item()
        if w.numel()
        else True
    )


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.name in ("spread_columns", "window")], ids=lambda s: s.name)
def test_the_gaps_of_a_strided_weight_are_not_read(backend: str, sample: Sample) -> None:
    w = sample.tensor(F32)
    store = w._base
    assert store is not None and store.isnan().any()
    value, sigma, _, v_new, _ = penalty([w], [sample.layout], torch.cat(sample.vectors(F32)), [1.0], [1.0], 2.0)
    assert value.isfinite() and sigma.isfinite().all() and v_new.isfinite().all()


@pytest.mark.parametrize("place", [transposed, channels_last, spread, window], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_strides_change_nothing_but_rounding(backend: str, dtype: torch.dtype, place) -> None:
    dense = gaussian("dense", 20, 6, 5, 4).to(dtype)
    v = unit("dense", 120).to(vector_dtype(dtype))
    results = []
    for w in (dense, place(dense)):
        value, sigma, u, v_new, _ = penalty([w], [Layout()], v, [1.0], [1.0], 2.0)
        results.append((value, sigma, u, v_new))
    for x, y in zip(*results, strict=True):
        assert relative_error(x, y) <= 16 * eps(dtype)
    if place in (transposed, channels_last):  # the order of columns in memory is not that of v: it matters
        wrong = penalty([place(dense).as_strided(dense.shape, dense.stride())], [Layout()], v, [1.0], [1.0], 2.0)
        assert relative_error(wrong[3], results[0][3]) >= 0.3


@pytest.mark.parametrize("name", ["conv_groups_channels_last", "packed_columns", "transposed_conv_groups", "depthwise"])
def test_parts_do_not_mix(backend: str, name: str) -> None:
    """NaN in one part shows in its sigma and gradient and nowhere else."""
    sample = next(s for s in SAMPLES if s.name == name)
    w, vectors = sample.tensor(F32), sample.vectors(F32)
    _, clean, _, v_clean, _ = penalty([w], [sample.layout], torch.cat(vectors), [1.0], [1.0], 2.0)
    as_matrices(w, sample.layout)[1].fill_(math.nan)
    w.requires_grad_()
    value, sigma, _, v_new, _ = penalty([w], [sample.layout], torch.cat(vectors), [1.0], [1.0], 2.0)
    value.backward()
    others = [part for part in range(sample.layout.parts) if part != 1]
    assert value.isnan() and sigma[1].isnan() and same_bits(sigma[others], clean[others])
    per_part, per_part_clean = v_new.view(sample.layout.parts, -1), v_clean.view(sample.layout.parts, -1)
    assert same_bits(per_part[1], vectors[1]) and same_bits(per_part[others], per_part_clean[others])
    assert w.grad is not None
    gradient = as_matrices(w.grad, sample.layout)
    assert gradient[1].isnan().all() and gradient[others].isfinite().all()


# ---- vectors ----


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("kind", VECTOR_KINDS, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    ("shape", "parts", "place"),
    [((1,), 1, torch.clone), ((37,), 1, torch.clone), ((12,), 3, torch.clone), ((40,), 1, spread),
     ((5, 8), 1, transposed), ((6, 4), 2, transposed)],
    ids=["one", "dense", "three_parts", "strided", "two_dims_transposed", "parts_transposed"],
)  # fmt: skip
def test_vectors_are_the_formula(
    backend: str, kind: Kind, exponent: float, dtype: torch.dtype, shape: tuple[int, ...], parts: int, place
) -> None:
    values = gaussian(f"{shape}", *shape)
    values.view(-1)[0] = 0 if values.numel() > 1 else 0.6  # |x| is not smooth there; the penalty is, for k > 1
    x = place((0.8 * values).to(dtype))
    x64 = x.detach().double().requires_grad_()
    truth = 0.7 * vector_penalty_in_float64(x64, kind, parts, exponent, 0.9)
    (expected,) = torch.autograd.grad(truth, x64)
    x.requires_grad_()
    none = torch.empty(0, dtype=vector_dtype(dtype))
    value, sigma, u, v_new, _ = penalty([x], [Layout(kind, parts)], none, [0.9], [0.7], exponent)
    (gradient,) = torch.autograd.grad(-2 * value, x)
    assert sigma.numel() == u.numel() == v_new.numel() == 0
    # Sums of 40 terms, powers in float32 (reference); the value measured 0.1 roundings of the size of its largest
    # intermediate. |x|^k - t^k cancels near the target.
    biggest = (x64.abs().max().item() + 1) ** (2 * exponent) * x.numel() ** (exponent if kind == Kind.BIAS else 1)
    assert error(value, truth.detach()) <= 8 * eps(dtype) * biggest
    allowed = 16 * eps(dtype) * exponent * biggest
    assert error(gradient, -2 * expected) <= allowed + 0.5 * torch.finfo(dtype).eps * (2 * expected).abs().max().item()
    assert gradient.dtype == dtype


@pytest.mark.parametrize("kind", VECTOR_KINDS, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_vector_that_is_not_finite_shows(backend: str, kind: Kind, bad: float) -> None:
    x = torch.tensor([1.0, bad, 0.5], requires_grad=True)
    value, *_ = penalty([x], [Layout(kind)], torch.empty(0), [1.0], [1.0], 2.0)
    value.backward()
    assert not value.isfinite()
    assert x.grad is not None and not x.grad[1].isfinite()


@pytest.mark.parametrize("kind", VECTOR_KINDS, ids=lambda kind: kind.name.lower())
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_vectors_at_rest(backend: str, kind: Kind, exponent: float) -> None:
    """Zero biases and shifts, scales of one, and empty ones: no value, no gradient, no NaN."""
    at_rest = torch.full((5,), 1.0 if kind == Kind.SCALE else 0.0, requires_grad=True)
    empty = torch.zeros(0, requires_grad=True)
    value, *_ = penalty([at_rest, empty], [Layout(kind)] * 2, torch.empty(0), [1.0, 1.0], [1.0, 1.0], exponent)
    value.backward()
    assert value.item() == 0
    assert at_rest.grad is not None and at_rest.grad.tolist() == [0.0] * 5
    assert empty.grad is not None and empty.grad.shape == (0,)


# ---- lists ----


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=NAMES.get)
def test_a_list_of_everything(backend: str, dtype: torch.dtype) -> None:
    """Every layout at once, vectors between them, a target and a scale for each: none takes its neighbour's."""
    chosen = [s for s in SAMPLES if s.tensor(F32).numel() < 100000]
    tensors = [s.tensor(dtype).requires_grad_() for s in chosen]
    layouts = [s.layout for s in chosen]
    vectors = [s.vectors(dtype) for s in chosen]
    targets = [0.1 + 0.05 * i for i in range(len(chosen))]
    scales = [1.0 + 0.1 * i for i in range(len(chosen))]
    truth, expected = [], []
    for i, s in enumerate(chosen):
        w64 = tensors[i].detach().double().requires_grad_()
        part, _, _ = penalty_in_float64(s.matrices(w64), vectors[i], 2.0, targets[i])
        truth.append(scales[i] * part)
        expected.append(torch.autograd.grad(truth[-1], w64)[0] if part.requires_grad else torch.zeros_like(w64))
    for i, kind in enumerate(VECTOR_KINDS):
        x = (1.2 * gaussian(kind.name, 6)).to(dtype)
        x64 = x.double().requires_grad_()
        term = (2.0 + i) * vector_penalty_in_float64(x64, kind, 2, 2.0, 0.5)
        place = 3 * i
        truth.insert(place, term)
        expected.insert(place, torch.autograd.grad(term, x64)[0])
        tensors.insert(place, x.requires_grad_())
        layouts.insert(place, Layout(kind, 2))
        targets.insert(place, 0.5)
        scales.insert(place, 2.0 + i)
    v = torch.cat([x for group in vectors for x in group])
    value, *_ = penalty(tensors, layouts, v, targets, scales, 2.0)
    value.backward()
    assert error(value, sum(truth).detach()) <= 16 * eps(dtype) * sum(t.item() for t in truth)
    for tensor, gradient in zip(tensors, expected, strict=True):
        assert tensor.grad is not None
        # Measured 13 roundings of the largest element (native, float64; 7 reference), and one to the dtype.
        assert relative_error(tensor.grad, gradient) <= 64 * eps(dtype) + 0.5 * torch.finfo(dtype).eps


def test_a_table_is_that_of_the_weights_looks_wherever_it_holds_a_workspace() -> None:
    """On a device, of which meta tensors have the looks; in turns, so that the last call's is compared."""
    packed, ones = pack([Layout()] * 2), [1.0] * 2
    small, large = ([torch.empty(m, 3, device="meta") for m in rows] for rows in ((4, 5), (4, 6)))
    halves = [w.bfloat16() for w in small]
    tables = [layer_table(packed, ones, ones, weights) for weights in (small, large, halves, small, small, large)]
    assert tables[0] is tables[3] is tables[4] and tables[1] is tables[5]
    assert len({id(table) for table in tables}) == 3
    assert all(table.of_one_shape for table in tables)
    other = layer_table(packed, [1.0, 2.0], ones, small)
    assert other is not tables[0] and other.targets == [1.0, 2.0]
