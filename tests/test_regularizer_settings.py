"""What may be set or given: exponents, numbers of NumPy, plain tensors; and a table that always prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same_bits
from regularizer_truth import Mlp, gradients, refuses
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from spectral_ops import SpectralAdamW, SpectralRegularizer


def test_an_exponent_is_checked_when_it_is_set(backend: str) -> None:
    reg = SpectralRegularizer(nn.Linear(4, 4), strength=1.0)
    for wrong in (-1.0, 0.5, float("nan")):
        message = (
            f"SpectralRegularizer: expected exponent to be finite and at least 1, got {wrong}. 2.0 is the paper's."
        )
        with refuses(ValueError, message):
            reg.exponent = wrong
    with refuses(TypeError, "SpectralRegularizer: expected exponent to be a number, got str. 2.0 is the paper's."):
        reg.exponent = "2"  # type: ignore[assignment]
    assert reg.exponent == 2.0
    at_two = reg(advance=False).item()
    reg.exponent = 1
    assert reg.exponent == 1.0 and reg(advance=False).item() != at_two


# ---- NumPy's numbers ----

NUMBERS = [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int64(2), np.uint8(2)]


@pytest.mark.parametrize("number", NUMBERS, ids=[type(number).__name__ for number in NUMBERS])
def test_numbers_of_numpy(number: Any, backend: str) -> None:
    model = Mlp()
    expected = SpectralRegularizer(model, strength=float(number), target=float(number))(advance=False)
    reg = SpectralRegularizer(model, strength=number, target=number)
    assert type(reg.strength) is float and reg(advance=False).item() == expected.item()
    reg.strength = 1.0
    reg.strength = number
    assert type(reg.strength) is float and reg(advance=False).item() == expected.item()
    by_pattern = SpectralRegularizer(model, strength={"*": number}, target={"*weight": number})
    assert {type(entry.strength) for entry in by_pattern.entries} == {float}
    reg.accumulate_grad_()


@pytest.mark.parametrize("strength", [True, np.bool_(True), 1j, "1"])
def test_what_is_no_number(strength: Any) -> None:
    message = (
        "SpectralRegularizer: expected strength to be a number, a 0-d tensor or a mapping, got "
        f"{type(strength).__name__}. Pass a float such as 1e-3."
    )
    with refuses(TypeError, message):
        SpectralRegularizer(nn.Linear(2, 2), strength=strength)


# ---- plain tensors ----


def test_leaf_tensors_are_parameters(backend: str) -> None:
    w = torch.randn(4, 3)
    plain, parameter = w.clone().requires_grad_(), nn.Parameter(w.clone())
    values = []
    for p in (plain, parameter):
        reg = SpectralRegularizer([("weight", p)], strength=0.5)
        reg().backward()
        values.append([reg.accumulate_grad_(), p.grad, reg.sigmas()["weight"]])
    assert all(same_bits(x.detach(), y.detach()) for x, y in zip(*values, strict=True))
    other = torch.randn(3, 3, requires_grad=True)
    reg = SpectralRegularizer([("weight", plain), ("other", other)], strength=0.5)
    plain.grad = None
    plain.requires_grad_(False)  # frozen, as a parameter is
    reg.accumulate_grad_()
    assert plain.grad is None and other.grad is not None


def test_an_optimizer_of_leaf_tensors(backend: str) -> None:
    w = torch.randn(4, 3)
    found: list[Tensor] = []
    for p in (w.clone().requires_grad_(), nn.Parameter(w.clone())):
        optimizer = SpectralAdamW([p], strength=0.1, lr=0.1)
        for _ in range(3):
            p.grad = torch.ones(4, 3)
            optimizer.step()
        found.append(p.detach())
    assert same_bits(*found)


# ---- gradients that are refused ----


@pytest.mark.parametrize("spoil", ["sparse", "expanded", "double"])
def test_a_gradient_that_is_refused_leaves_no_other(spoil: str, backend: str) -> None:
    """AdamW would decay the weights that a step, which failed, gave a gradient of zeros."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reg = SpectralRegularizer(model, strength=1.0)
    zeros = torch.zeros(4, 4)
    if spoil == "double":
        if not hasattr(Tensor, "grad_dtype"):  # torch 2.10
            pytest.skip("torch lets no gradient have another type here")
        model[1].weight.grad_dtype = None  # type: ignore[union-attr]
    model[1].weight.grad = {"sparse": zeros.to_sparse(), "expanded": zeros[:1].expand(4, 4), "double": zeros.double()}[
        spoil
    ]
    with pytest.raises((TypeError, ValueError), match="expected the gradient of 1.weight"):
        reg.accumulate_grad_()
    assert list(gradients(model)) == ["1.weight"]


# ---- the table ----


def parametrized(model: Mlp) -> None:
    parametrize.register_parametrization(model.first, "weight", nn.Identity())


def deleted(model: Mlp) -> None:
    del model.first.weight


@pytest.mark.parametrize("change", [parametrized, deleted])
def test_the_table_prints_without_a_parameter(change: Callable[[Mlp], None], backend: str) -> None:
    model = Mlp()
    reg = SpectralRegularizer(model, strength=1.0)
    change(model)
    line = next(line for line in repr(reg).splitlines() if line.startswith("first.weight"))
    assert line.endswith("nn.Linear weight; gone: removed or parametrized since")


def test_the_table_prints_where_no_number_can_be_read(backend: str) -> None:
    reg = SpectralRegularizer(nn.Linear(2, 2), strength=torch.tensor(0.5))
    assert str(reg).startswith("SpectralRegularizer(strength=0.5, ")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert str(reg).startswith("SpectralRegularizer(strength=a tensor, ")
    reg.strength = torch.tensor(0.5, device="meta")
    assert str(reg).startswith("SpectralRegularizer(strength=a tensor, ")


def test_a_grad_scale_may_be_a_number_of_numpy() -> None:
    layers = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, scale in zip(layers, (4.0, np.float32(4)), strict=True):
        SpectralRegularizer(layer, strength=1.0).accumulate_grad_(grad_scale=scale)
    assert torch.equal(layers[0].weight.grad, layers[1].weight.grad)
