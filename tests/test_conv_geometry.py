"""Conv operators of every small geometry: all kernels, strides, dilations and sizes at once, against the plain oracle.

What a layer's grids look like decides which loops its products take (csrc/conv_table.cpp), and some are taken by narrow
grids alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import conv_samples
import pytest
import torch
from conv_samples import OPS, UNSEEN, ConvSample, Problem, accepted, windows
from helpers import F32, F64, NAMES, eps
from torch import Tensor

from spectral_ops import conv_spectral_norm
from spectral_ops.backends import use_backend

conv_backend = conv_samples.conv_backend
MODES = [("zeros", False), ("circular", False), ("zeros", True)]
# Sums of at most 100 products of elements up to one, in two orders, through two products and a division by a norm.
ROUNDINGS = 64


def differences(found: list[Tensor], expected: list[Tensor]) -> Iterator[float]:
    for x, y in zip(found, expected, strict=True):
        yield ((x.double() - y.double()).norm() / (1e-3 + y.double().norm())).item()


@pytest.mark.parametrize("dtype", [F32, F64], ids=NAMES.get)
@pytest.mark.parametrize(("mode", "transposed"), MODES, ids=["zeros", "circular", "transposed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_geometry_is_the_oracles(dims: int, mode: str, transposed: bool, dtype: torch.dtype) -> None:
    layers = [s for s in windows(dims, mode, transposed) if accepted(s)]
    assert len(layers) >= 64
    problem = Problem(layers, dtype)
    problem.targets = [0.0] * len(layers)  # a sigma near its target would have a gradient of rounding alone
    start = problem.v.clone(), problem.exponents.clone()
    found = {}
    for backend in ("native", "reference"):
        problem.v, problem.exponents = start[0].clone(), start[1].clone()
        gradients = [torch.zeros_like(w) for w in problem.weights]
        with use_backend(backend):  # type: ignore[arg-type]
            _, sigma = problem.accumulate(gradients, 1.0)
        sizes = [layer.vectors(dtype).numel() for layer in layers]
        found[backend] = list(sigma.unbind()), list(problem.v.split(sizes)), gradients
    for ours, truth in zip(found["native"], found["reference"], strict=True):
        for layer, difference in zip(layers, differences(ours, truth), strict=True):
            assert difference <= ROUNDINGS * eps(dtype), layer


# ---- windows that see nothing but padding: the zero map, of whatever weight ----


@pytest.mark.parametrize("dtype", [F32, F64], ids=NAMES.get)
@pytest.mark.parametrize("sample", UNSEEN, ids=str)
def test_the_zero_map_counts_as_sigma_zero(conv_backend: str, sample: ConvSample, dtype: torch.dtype) -> None:
    assert not sample.whole(sample.weight()).any()
    problem = Problem([sample], dtype)
    problem.exponents.fill_(3)
    before = problem.v.clone()
    junk = [torch.full((n,), 3.3, dtype=dtype) for n in range(1, 20)]  # what memory that is not written to may hold
    del junk
    w = problem.weights[0].requires_grad_()
    value, sigma, u, v, exponents = OPS.spectral_penalty(*problem.arguments())
    value.backward()
    assert value.item() == pytest.approx(sample.groups * problem.targets[0] ** 4, rel=4 * eps(dtype))
    assert not sigma.any() and not u.any() and not w.grad.any() and (exponents == 3).all()
    for old, new in zip(before.chunk(sample.groups), v.chunk(sample.groups), strict=True):
        assert abs(new.double().norm().item() - 1) <= 8 * eps(dtype) and not torch.equal(new, old)
    with use_backend("reference"):
        assert torch.allclose(v, OPS.spectral_penalty(*problem.arguments())[3], rtol=4 * eps(dtype))
    gradient = torch.ones_like(w)
    problem.weights = [w.detach()]
    added, sigma = problem.accumulate([gradient], 1.0)
    assert added.item() == value.item() and not sigma.any() and (gradient == 1).all()


@pytest.mark.parametrize("sample", UNSEEN, ids=str)
def test_the_zero_map_has_norm_zero(conv_backend: str, sample: ConvSample) -> None:
    w = sample.weight(F32).requires_grad_()
    sigma, bound = conv_spectral_norm(w, sample.size, **sample.arguments, return_bound=True)
    sigma.backward()
    assert sigma.item() == bound.item() == 0 and not w.grad.any()


@pytest.mark.parametrize("sample", UNSEEN, ids=str)
def test_the_zero_map_of_what_is_not_finite_shows(conv_backend: str, sample: ConvSample) -> None:
    problem = Problem([sample], F32)
    problem.weights[0].flatten()[-1] = torch.inf
    value, sigma, _, v, _ = OPS.spectral_penalty(*problem.arguments())
    last = slice(-(len(problem.v) // sample.groups), None)
    assert value.isnan() and sigma[-1].isnan() and torch.equal(v[last], problem.v[last])
