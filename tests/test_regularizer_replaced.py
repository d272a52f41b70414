"""SpectralRegularizer follows parameters that are cast, assigned, swapped or copied, and refuses what it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64
from regularizer_truth import Mlp, Net, assert_close, bits, gradients, load_converged, refuses, truth, weights
from torch import nn
from torch.nn.utils import parametrize

from spectral_ops import SpectralRegularizer


def assert_is_truth(reg: SpectralRegularizer, model: nn.Module, limit: float) -> None:
    """Of the weights as they are now: value and gradient, in both forms."""
    load_converged(reg, model)
    expected = truth(model)
    for form in ("loss", "accumulate"):
        model.zero_grad()
        value = reg() if form == "loss" else reg.accumulate_grad_()
        if form == "loss":
            value.backward()
        assert abs(value.item() - expected.value) <= 2e-5 * expected.value
        assert_close(gradients(model), expected.gradients, limit)


def used(model: nn.Module) -> SpectralRegularizer:
    """A regularizer that has its tables built for the tensors of now, in both forms."""
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    reg().backward()
    reg.accumulate_grad_()
    model.zero_grad()
    return reg


def to_double(model: nn.Module) -> None:
    model.double()


def to_bfloat16(model: nn.Module) -> None:
    model.to(BF16)


def to_bfloat16_and_back(model: nn.Module) -> None:
    model.to(BF16).float()


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()}, assign=True)


def copied(model: nn.Module) -> None:
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()})


def other_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = 1.5 * p.data


def other_strides(model: nn.Module) -> None:
    for p in model.parameters():
        if p.ndim == 2:
            p.data = p.data.t().contiguous().t()


def same_address_other_strides(model: nn.Module) -> None:
    """The memory stays; a square matrix is read transposed."""
    w = model.attention.out_proj.weight
    before = w.data_ptr()
    w.data = w.data.t()
    assert w.data_ptr() == before and w.stride() == (1, 6)


def other_data_of_another_dtype(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.double()


def swapped(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "lstm" not in name:  # nn.LSTM holds weak references, with which torch refuses to swap
            torch.utils.swap_tensors(p, nn.Parameter(1.5 * p.detach()))


def cast_by_swapping(model: nn.Module) -> None:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def new_parameter(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(1.5 * model.head.weight.detach())


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


CHANGES = [
    (to_double, 2e-5),  # vectors from float32
    (to_bfloat16, 2e-5 + 2.0**-8),
    (to_bfloat16_and_back, 2e-5),
    (assigned, 2e-5),
    (copied, 2e-5),
    (other_data, 2e-5),
    (other_strides, 2e-5),
    (same_address_other_strides, 2e-5),
    (other_data_of_another_dtype, 2e-5),
    (swapped, 2e-5),
    (cast_by_swapping, 2e-5),
    (new_parameter, 2e-5),
    (in_place, 2e-5),
]


@pytest.mark.parametrize(("change", "limit"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_changes_are_followed(change: Callable[[nn.Module], None], limit: float, backend: str) -> None:
    model = Net()
    reg = used(model)
    change(model)
    assert_is_truth(reg, model, limit)


def test_vectors_follow_the_dtype_of_the_weights(backend: str) -> None:
    model = Mlp()
    reg = SpectralRegularizer(model, strength=1.0)
    before = reg.state_dict()["v"]["first.weight"]
    model.double()
    assert torch.equal(reg.state_dict()["v"]["first.weight"], before.double())  # the same vectors, not new ones
    model.to(BF16)
    assert reg.state_dict()["v"]["first.weight"].dtype == F32
    assert torch.equal(reg.state_dict()["v"]["first.weight"], before)


def test_attached_through_a_cast(backend: str) -> None:
    model = Net()
    reg = used(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reg.attach(optimizer)
    model.double()
    optimizer.step()
    assert_close(gradients(model), truth(model).gradients, 2e-5)
    assert {g.dtype for g in gradients(model).values()} == {F64}


def test_gradients_left_from_before_a_change_of_layout(backend: str) -> None:
    """zero_grad(set_to_none=False): weights move, the old gradients stay."""
    model = Net()
    reg = used(model)
    reg.accumulate_grad_()
    model.zero_grad(set_to_none=False)
    other_strides(model)
    expected = truth(model)
    reg.accumulate_grad_()
    assert_close(gradients(model), expected.gradients, 2e-5)


# ---- what cannot be followed ----


def test_another_shape_is_refused(backend: str) -> None:
    model = Mlp()
    reg = used(model)
    before = bits(reg)
    model.last = model.last  # the same layer again is no change
    model.last.weight = nn.Parameter(torch.randn(5, 8))
    message = "expected parameter 'last.weight' of shape (3, 8), got (5, 8) since. Build the regularizer again."
    for call in (reg, reg.accumulate_grad_, reg.state_dict):
        with refuses(ValueError, f"SpectralRegularizer: {message}"):
            call()
    model.last.weight = nn.Parameter(torch.randn(3, 8))
    assert all(torch.equal(x, before[name]) for name, x in bits(reg).items())
    assert_is_truth(reg, model, 2e-5)


@pytest.mark.parametrize("how", ["parametrized", "deleted"])
def test_a_parameter_that_is_gone_is_refused(how: str, backend: str) -> None:
    model = Mlp()
    reg = used(model)
    if how == "parametrized":
        parametrize.register_parametrization(model.first, "weight", nn.Identity())
    else:
        del model.first.weight
    message = (
        "expected parameter 'first.weight' on its module, got none. It was removed or parametrized since; build the "
        "regularizer again."
    )
    for call in (reg, reg.accumulate_grad_, reg.state_dict):
        with refuses(RuntimeError, f"SpectralRegularizer: {message}"):
            call()


def test_a_dtype_that_cannot_be_read_is_refused(backend: str) -> None:
    model = nn.Linear(3, 2)
    reg = used(model)
    model.to(torch.complex64)
    message = (
        "expected parameter 'weight' to be dense and float16, bfloat16, float32 or float64, got torch.complex64, "
        "torch.strided. Leave it out with exclude='weight'."
    )
    with refuses(TypeError, f"SpectralRegularizer: {message}"):
        reg()


# ---- copies ----

ALONE = (
    "SpectralRegularizer: expected deepcopy together with its model, got the regularizer alone. "
    "Use copy.deepcopy((model, reg)), model first, or build a new one and load this one's state_dict()."
)


@pytest.mark.parametrize("from_pairs", [False, True])
def test_deepcopy_alone_is_refused(from_pairs: bool) -> None:
    model = Mlp()
    rules: dict[Any, str] = {"norm.weight": "scale"}
    reg = SpectralRegularizer(model.named_parameters() if from_pairs else model, strength=1.0, rules=rules)
    for copy_of in (reg, [reg], {"reg": reg, "model": model}):
        with refuses(RuntimeError, ALONE):
            copy.deepcopy(copy_of)


@pytest.mark.parametrize("from_pairs", [False, True])
def test_deepcopy_with_the_model(from_pairs: bool, backend: str) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    reg = used(model) if not from_pairs else SpectralRegularizer(model.named_parameters(), strength=1.0)
    before = bits(reg), weights(model)
    model_copy, reg_copy = copy.deepcopy((model, reg))
    assert all(torch.equal(x, before[0][name]) for name, x in bits(reg_copy).items())
    with torch.no_grad():
        for p in model_copy.parameters():
            p.mul_(1.5)
    assert_is_truth(reg_copy, model_copy, 2e-5)
    # The original has seen nothing of it.
    assert all(torch.equal(x, before[0][name]) for name, x in bits(reg).items())
    assert gradients(model) == {}
    reg()
    assert_is_truth(reg, model, 2e-5)


def test_deepcopy_of_a_model_that_holds_its_regularizer(backend: str) -> None:
    model = Mlp()
    model.reg = SpectralRegularizer(model, strength=1.0)
    load_converged(model.reg, model)
    assert len(list(model.parameters())) == 6 and len(model.state_dict()) == 6
    copied_model = copy.deepcopy(model)
    with torch.no_grad():
        copied_model.last.weight.mul_(1.5)
    assert_is_truth(copied_model.reg, copied_model, 2e-5)
    assert gradients(model) == {}
    assert_is_truth(model.reg, model, 2e-5)


def test_deepcopy_of_an_attached_one_is_not_attached(backend: str) -> None:
    model = Mlp()
    reg = used(model)
    reg.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    model_copy, reg_copy = copy.deepcopy((model, reg))
    assert_is_truth(reg_copy, model_copy, 2e-5)


def test_average_of_weights(backend: str) -> None:
    """EMA: the regularizer of the original goes on; the average gets one of its own, with the state loaded."""
    model = Mlp()
    reg = SpectralRegularizer(model, strength=1.0)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    reg.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    assert gradients(average.module) == {}
    of_average = SpectralRegularizer(average.module, strength=1.0)
    of_average.load_state_dict(reg.state_dict())
    assert all(torch.equal(x, bits(reg)[name]) for name, x in bits(of_average).items())
    assert_is_truth(of_average, average.module, 2e-5)
    assert not torch.equal(average.module.first.weight, model.first.weight)
