"""Matrices whose products leave float32 where sigma does not: the sums of strips do so before the norm, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectral_ops import SpectralAdamW, SpectralRegularizer, power_iteration, spectral_penalty


@pytest.mark.parametrize(("m", "n", "element"), [(2511, 1, 4e17), (2511, 3, 2e17)])
def test_power_iteration_from_no_exponent(backend: str, m: int, n: int, element: float) -> None:
    """W'W v is 4e38 and more, beyond float32. Sums of 2511 equal terms, by whoever: roundings of one sign."""
    v = torch.full((n,), n**-0.5)
    sigma, u, _ = power_iteration([torch.full((m, n), element)], [v])
    assert abs(sigma.item() / (element * (m * n) ** 0.5) - 1) <= 1e-4
    assert abs(v.norm().item() - 1) <= 1e-5 and abs(u[0].norm().item() - 1) <= 1e-4


def test_the_gradient_is_finite(backend: str) -> None:
    w = torch.full((2511, 2), 3e17, requires_grad=True)
    spectral_penalty([w], [torch.full((2,), 2**-0.5)], exponent=1.0).backward()
    sigma = 3e17 * 5022**0.5
    assert w.grad is not None
    assert torch.allclose(w.grad, torch.full_like(w, 2 * (sigma - 1) / 5022**0.5), rtol=1e-5)


@pytest.mark.parametrize("sigma", [5e19, 1.2e20, 2e20, 1e21])
def test_the_regularizer_goes_on(sigma: float) -> None:
    """The exponent it knows is of sigma before it grew; a v of infinities would stay for ever."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 2000, bias=False)
    reg = SpectralRegularizer(layer.named_parameters(), strength=1e-3)
    before = reg.sigmas()["weight"].item()
    factor = sigma / before
    with torch.no_grad():
        layer.weight.mul_(factor)
    for _ in range(2):
        reg.accumulate_grad_()
        assert abs(reg.sigmas()["weight"].item() / sigma - 1) <= 1e-3
    with torch.no_grad():
        layer.weight.div_(factor)
    reg.accumulate_grad_()
    assert abs(reg.sigmas()["weight"].item() / before - 1) <= 1e-3


def test_the_optimizer_goes_on() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 2000, bias=False)
    optimizer = SpectralAdamW(layer.parameters(), lr=0.0, weight_decay=0.0, model=layer, strength=0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    before = optimizer.sigmas()["weight"].item()
    with torch.no_grad():
        layer.weight.mul_(1.2e20 / before)
    for _ in range(2):
        optimizer.step()
        assert abs(optimizer.sigmas()["weight"].item() / 1.2e20 - 1) <= 1e-3
