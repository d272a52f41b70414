"""Layers as linear maps: against the dense matrix of torch's own module for every combination of their settings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conv_samples import BASE, PATCHES, SAMPLES, UP, ConvSample, accepted, combinations
from helpers import BF16, F32, F64, error, gaussian, relative_error, same_bits
from torch import Tensor

from spectral_ops.ops.layout import Kind, Layout, as_matrices, has_operators, pack, sizes, unpack
from spectral_ops.ops.linear_map import Convolutions, Matrices, linear_map

FAMILIES = [(dims, transposed) for dims in (1, 2, 3) for transposed in (False, True)]
FAMILY_IDS = [f"{'transposed' if transposed else 'conv'}{dims}d" for dims, transposed in FAMILIES]
# Sums of at most 100 products of numbers of about 1, in float64. Measured: 2e-15.
ROUNDING = 1e-13


def convolutions(sample: ConvSample, w: Tensor) -> Convolutions:
    return Convolutions(w, sample.groups, sample.operator)


def reshaped(sample: ConvSample, w: Tensor) -> Tensor:
    """Its weight as (groups, shape[0] / groups, the rest); of a transposed layer that is the adjoint's matrix."""
    layout = Layout(parts=sample.groups)
    return as_matrices(w, layout).reshape(sizes(w.shape, layout))


@pytest.mark.parametrize(("dims", "transposed"), FAMILIES, ids=FAMILY_IDS)
def test_every_combination_is_the_matrix_of_torchs_module(dims: int, transposed: bool) -> None:
    """Map, adjoint, gradient, sizes, and that groups are blocks: no channel of one reaches another."""
    checked = 0
    for sample in combinations(dims, transposed):
        if not accepted(sample):
            continue
        w = sample.weight().requires_grad_()
        whole = sample.whole(w)
        maps = convolutions(sample, w.detach())
        assert maps.operator.output_size(sample.kernel) == sample.output_size(), sample
        assert (maps.parts * maps.m, maps.parts * maps.n) == tuple(whole.shape), sample
        u = gaussian(f"u{sample}", maps.parts, maps.m)
        v = gaussian(f"v{sample}", maps.parts, maps.n)
        (expected,) = torch.autograd.grad(u.flatten() @ whole @ v.flatten(), w)
        whole = whole.detach()
        assert error(maps.apply(v), (whole @ v.flatten()).view(u.shape)) <= ROUNDING, sample
        assert error(maps.adjoint(u), (whole.T @ u.flatten()).view(v.shape)) <= ROUNDING, sample
        assert error(maps.gradient(u, v), expected) <= 10 * ROUNDING, sample  # sums over all positions
        checked += 1
    assert checked >= {1: 200, 2: 100, 3: 30}[dims]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_is_matrix_where_the_norm_is_that_of_the_weight(dims: int, transposed: bool) -> None:
    found = {True: 0, False: 0}
    for sample in combinations(dims, transposed):
        if not accepted(sample):
            continue
        yes = sample.operator.is_matrix(sample.kernel)
        found[yes] += 1
        if yes:
            w = sample.weight()
            norms = torch.linalg.matrix_norm(torch.stack(sample.dense(w)), 2)
            assert relative_error(torch.linalg.matrix_norm(reshaped(sample, w), 2), norms) <= 1e-13, sample
    assert min(found.values()) >= 8, found


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (PATCHES, True),
        (replace(PATCHES, stride=(3, 4)), True),  # gaps
        (replace(PATCHES, padding=1), True),  # some windows over the border, one inside
        (replace(PATCHES, stride=(2, 2)), False),  # overlap
        (replace(PATCHES, dilation=2), False),  # they interlock: the reach counts
        (replace(PATCHES, size=(2, 3), padding=1), False),  # none inside
        (replace(PATCHES, padding_mode="circular", padding=(2, 3)), False),  # wrapped around: everything twice
        (replace(PATCHES, padding_mode="circular"), True),
        (replace(BASE, kernel=(1, 1), padding=0), True),
        (BASE, False),
        (replace(UP, kernel=(2, 2), padding=0, output_padding=0), True),
        (UP, False),
        # A window inside would be the second of one: the output, all padding, is zero.
        (ConvSample((1,), (1,), dilation=4, padding=1, output_padding=3, transposed=True), False),
    ],
    ids=str,
)
def test_is_matrix_by_name(sample: ConvSample, expected: bool) -> None:
    assert sample.operator.is_matrix(sample.kernel) is expected


def test_grids_are_those_of_the_convolution_either_way() -> None:
    assert BASE.operator.grids(BASE.kernel) == ((6, 5), (6, 5))
    down = replace(BASE, stride=2)
    assert down.operator.grids(down.kernel) == ((3, 3), (6, 5))
    assert UP.operator.grids(UP.kernel) == ((4, 3), (8, 6))


# ---- the interface that the oracle iterates on ----


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_scaled_and_parts(sample: ConvSample) -> None:
    maps = convolutions(sample, sample.weight())
    exponents = torch.arange(sample.groups, dtype=torch.int32) - 3
    v, scaled = sample.vectors(F64), maps.scaled(exponents)
    # Powers of two change no digit.
    assert same_bits(scaled.apply(v), torch.ldexp(maps.apply(v), exponents[:, None]))
    assert same_bits(scaled.largest(), torch.ldexp(maps.largest(), exponents))
    assert error(maps.largest(), torch.stack([x.abs().max() for x in sample.weight().chunk(sample.groups)])) == 0
    for i in range(sample.groups):
        part = maps.part(i)
        assert part.parts == 1 and error(part.apply(v[i : i + 1]), maps.apply(v)[i : i + 1]) <= ROUNDING


def test_matrices_are_matrices() -> None:
    w, v, u = gaussian("w", 3, 5, 4), gaussian("v", 3, 4), gaussian("u", 3, 5)
    maps = Matrices(w)
    assert (maps.parts, maps.m, maps.n) == (3, 5, 4)
    for i in range(3):
        assert error(maps.apply(v)[i], w[i] @ v[i]) <= ROUNDING
        assert error(maps.adjoint(u)[i], w[i].T @ u[i]) <= ROUNDING
        assert error(maps.gradient(u, v)[i], torch.outer(u[i], v[i])) <= ROUNDING
        assert error(maps.part(i).apply(v[i : i + 1])[0], w[i] @ v[i]) <= ROUNDING
    assert error(maps.largest(), w.abs().amax(dim=(1, 2))) == 0


def test_linear_map_follows_the_layout() -> None:
    w = BASE.weight(BF16).requires_grad_()
    maps = linear_map(w, BASE.layout, F32)
    assert isinstance(maps, Convolutions) and maps.w.dtype == F32 and not maps.w.requires_grad
    plain = linear_map(w, Layout(), F32)
    assert isinstance(plain, Matrices) and plain.w.shape == (1, 4, 27)


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (4, 0, 3, 3)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_without_channels_is_a_map_without_rows_or_columns(shape: tuple[int, ...], transposed: bool) -> None:
    operator = (UP if transposed else BASE).operator
    maps = Convolutions(torch.zeros(shape, dtype=F64), 1, operator)
    assert (maps.m == 0) != (maps.n == 0)
    gradient = maps.gradient(torch.zeros(1, maps.m, dtype=F64), torch.zeros(1, maps.n, dtype=F64))
    assert gradient.shape == shape


# ---- layouts that hold an operator ----


def test_sizes_of_an_operator_are_its_outputs_and_inputs() -> None:
    for sample in SAMPLES:
        outputs, inputs = sample.outputs // sample.groups, sample.inputs // sample.groups
        expected = (sample.groups, outputs * math.prod(sample.output_size()), inputs * math.prod(sample.size))
        assert sizes(sample.shape, sample.layout) == expected


def test_pack_and_unpack() -> None:
    plain = [Layout(), Layout(Kind.BIAS, 3), Layout(Kind.MATRIX, 2, 1, 0)]
    layouts = [plain[0], *(sample.layout for sample in SAMPLES), *plain[1:]]
    assert unpack(pack(layouts)) == layouts
    assert unpack(pack([])) == []
    assert has_operators(pack([BASE.layout, UP.layout]))
    assert not has_operators(pack(plain)) and not has_operators(pack([]))
