"""A strength in a 0-d tensor: its value is checked where it can be read, and left unread where it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from regularizer_truth import refuses
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spectral_ops import SpectralAdamW, SpectralRegularizer
from spectral_ops.rules import known_value

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
BAD = [-1e-2, math.nan, math.inf]


def regularizer(strength: Tensor | float, device: str = "cpu") -> SpectralRegularizer:
    return SpectralRegularizer(nn.Linear(3, 2).to(device), strength=strength)


def optimizer(strength: Tensor | float, device: str = "cpu") -> SpectralAdamW:
    model = nn.Linear(3, 2).to(device)
    return SpectralAdamW(model.parameters(), model=model, strength=strength)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", BAD)
def test_bad_values_are_refused_at_construction(value: float, device: str) -> None:
    strength = torch.tensor(value, dtype=torch.float64, device=device)
    condition = f"expected strength to be finite and not negative, got {value}."
    with refuses(ValueError, f"SpectralRegularizer: {condition} Pass a float such as 1e-3."):
        regularizer(strength, device)
    with refuses(ValueError, f"SpectralAdamW: {condition} Use a float such as 1e-3."):
        optimizer(strength, device)


@pytest.mark.parametrize("value", BAD)
def test_bad_values_are_refused_by_the_setter(value: float) -> None:
    reg = regularizer(0.5)
    with pytest.raises(ValueError, match=f"strength to be finite and not negative, got {value}"):
        reg.strength = torch.tensor(value, dtype=torch.float64)
    assert reg.strength == 0.5


def test_bad_values_are_refused_in_a_group() -> None:
    model, more = nn.Linear(3, 2), nn.Linear(2, 1)
    groups = [{"params": model.parameters(), "strength": torch.tensor(-1.0)}]
    with pytest.raises(ValueError, match="strength.* to be finite and not negative, got -1"):
        SpectralAdamW(groups, strength=1e-3)
    adamw = SpectralAdamW(model.parameters(), strength=1e-3)
    with pytest.raises(ValueError, match="strength.* to be finite and not negative, got nan"):
        adamw.add_param_group({"params": more.parameters(), "strength": torch.tensor(math.nan)})
    assert len(adamw.param_groups) == 1


@pytest.mark.parametrize("make", [regularizer, optimizer])
def test_good_ones_are_kept_as_they_are(make: Callable[[Tensor], SpectralRegularizer | SpectralAdamW]) -> None:
    for strength in (torch.tensor(0.0), torch.tensor(0.5, dtype=torch.bfloat16), nn.Parameter(torch.tensor(0.5))):
        made = make(strength)
        assert (made.param_groups[0]["strength"] if isinstance(made, SpectralAdamW) else made.strength) is strength


def test_what_cannot_be_read_is_left_unread() -> None:
    reg = regularizer(0.5)
    on_meta = torch.empty((), device="meta")
    reg.strength = on_meta
    assert regularizer(on_meta).strength is on_meta
    assert optimizer(on_meta).param_groups[0]["strength"] is on_meta
    real = torch.tensor(0.5)
    with FakeTensorMode() as mode:
        for strength in (real, mode.from_tensor(real), torch.tensor(0.5)):
            reg.strength = strength
            assert known_value(strength) is None
    reg.strength = strength  # a fake one outside of its mode
    assert known_value(real) == 0.5


def test_a_strength_that_is_set_inside_a_compiled_step() -> None:
    model = nn.Linear(3, 2)
    reg = SpectralRegularizer(model, strength=torch.tensor(0.5))

    def step(strength: Tensor) -> Tensor:
        reg.strength = strength
        return reg(advance=False)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for value in (0.25, 0.75):
        expected = step(torch.tensor(value)).item()
        assert abs(compiled(torch.tensor(value)).item() - expected) <= 1e-6 * expected


def test_strengths_of_vmap() -> None:
    reg = regularizer(1.0)
    with torch.no_grad():
        expected = reg().item()

        def penalty(strength: Tensor) -> Tensor:
            reg.strength = strength
            return reg()

        found = torch.func.vmap(penalty)(torch.tensor([0.25, 0.75]))
    assert (found - expected * torch.tensor([0.25, 0.75])).abs().max().item() <= 1e-6 * expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_strength_that_is_set_during_a_capture() -> None:
    reg = regularizer(0.5, "cuda")
    strength = torch.tensor(0.25, device="cuda")
    reg.accumulate_grad_()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert known_value(strength) is None
        reg.strength = strength
        reg.accumulate_grad_()
    assert known_value(strength) == 0.25
