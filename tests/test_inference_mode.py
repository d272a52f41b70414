"""Calls under torch.inference_mode() and outside share tables: what one has allocated the other writes to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer, power_iteration, spectral_norm
from spectral_ops.ops import layer_table


def vector(n: int) -> Tensor:
    return torch.ones(n) / n**0.5


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "power_iteration": lambda w: power_iteration([w], [vector(w.shape[1])], n_iter=2)[0],
    "spectral_norm": spectral_norm,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_first_call_inside(backend: str, name: str) -> None:
    """Tables of ops are shared by all weights of the same shape. Sizes that no other test has: the table is new."""
    call = CALLS[name]
    first, second = torch.randn(7, 19), torch.randn(7, 19)
    with torch.inference_mode():
        inside = call(first)
    assert call(second).isfinite().all()
    assert torch.equal(call(first), inside)


def test_a_regularizer_first_called_inside(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5))
    reg = SpectralRegularizer(model, strength=1e-3)
    check_inside_then_outside(model, reg)


def test_a_regularizer_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the blocks of the CUDA kernels, whose first launch failed: what it left is cleared outside."""
    monkeypatch.setattr(layer_table, "EMULATE_CONV", True)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5))
    reg = SpectralRegularizer(model, strength=1e-3, conv="operator", input_size=(2, 6, 6))
    check_inside_then_outside(model, reg, failing=True)


def check_inside_then_outside(model: nn.Module, reg: SpectralRegularizer, failing: bool = False) -> None:
    with torch.inference_mode():
        inside = reg(advance=False)
    if failing:
        (group,) = [group for group in reg._groups if group.table.has_operators]
        group.table.conv_cuda._running = True  # as if it had
    for p in model.parameters():
        p.data = p.data.clone()  # elsewhere: addresses are written anew
    reg.strength = 2e-3
    value = reg(advance=False)
    value.backward()
    assert torch.allclose(value, 2 * inside)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
