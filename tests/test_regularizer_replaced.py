"""SpectralRegularizer follows parameters that are cast, assigned, swapped or copied, and refuses what it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64
from regularizer_truth import (
    TOLERANCE,
    Mlp,
    Net,
    assert_close,
    bits,
    gradients,
    load_converged,
    refuses,
    truth,
    weights,
)
from torch import nn
from torch.nn.utils import parametrize

from spectral_ops import SpectralRegularizer


def assert_is_truth(reg: SpectralRegularizer, model: nn.Module, limit: float = TOLERANCE[F32]) -> None:
    """Of the weights as they are now: value and gradient, in both forms."""
    load_converged(reg, model)
    expected = truth(model)
    for form in ("loss", "accumulate"):
        model.zero_grad()
        value = reg() if form == "loss" else reg.accumulate_grad_()
        if form == "loss":
            value.backward()
        assert abs(value.item() - expected.value) <= TOLERANCE[F32] * expected.value
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
    (to_double, TOLERANCE[F32]),  # vectors from float32
    (to_bfloat16, TOLERANCE[F32] + 2.0**-8),
    (to_bfloat16_and_back, TOLERANCE[F32]),
    (assigned, TOLERANCE[F32]),
    (copied, TOLERANCE[F32]),
    (other_data, TOLERANCE[F32]),
    (other_strides, TOLERANCE[F32]),
    (same_address_other_strides, TOLERANCE[F32]),
    (other_data_of_another_dtype, TOLERANCE[F32]),
    (swapped, TOLERANCE[F32]),
    (cast_by_swapping, TOLERANCE[F32]),
    (new_parameter, TOLERANCE[F32]),
    (in_place, TOLERANCE[F32]),
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
    assert_close(gradients(model), truth(model).gradients, TOLERANCE[F32])
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
    assert_close(gradients(model), expected.gradients, TOLERANCE[F32])


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
    assert_is_truth(reg, model)


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


@pytest.mark.parametrize("depth", ["layer", "block"])
def test_a_replaced_layer_is_refused(depth: str, backend: str) -> None:
    """A new head for a new task: the old one would be regularized, and the new one not."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2))
    reg = used(model)
    if depth == "layer":
        model[1] = nn.Linear(4, 2)
    else:
        model[0] = copy.deepcopy(model[0])
    name = "1.weight" if depth == "layer" else "0.0.weight"
    message = (
        f"expected the layer of {name!r} to be in the model, got one that was replaced or removed since. "
        "Build the regularizer again."
    )
    for call in (reg, reg.accumulate_grad_, reg.state_dict):
        with refuses(RuntimeError, f"SpectralRegularizer: {message}"):
            call()
    assert gradients(model) == {}
    assert_is_truth(SpectralRegularizer(model, strength=1.0), model)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("called", [False, True], ids=["at_first", "later"])
def test_parameters_tied_since_are_refused(called: bool, backend: str) -> None:
    """They would count twice. Before the first call: built on meta, where moving a model unties it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("cpu" if called else "meta")
    reg = SpectralRegularizer(model, strength=1.0)
    if called:
        reg()
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p)
    model[1].weight = model[0].weight
    for form in (reg, reg.accumulate_grad_):
        message = "expected parameter '1.weight' apart from '0.weight', got one tied to it since."
        with refuses(RuntimeError, f"SpectralRegularizer: {message} Build the regularizer again."):
            form()
    model[1].weight = nn.Parameter(torch.randn(4, 4))
    assert_is_truth(reg, model)


def test_parameters_tied_no_more_are_refused(backend: str) -> None:
    """load_state_dict(assign=True) makes two of one, of which the second would go without a penalty."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    reg = SpectralRegularizer(model, strength=1.0)
    reg()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    message = "expected parameter '1.weight' to be tied to '0.weight', got another one since."
    for form in (reg, reg.accumulate_grad_):
        with refuses(RuntimeError, f"SpectralRegularizer: {message} Tie them again, or build the regularizer again."):
            form()
    model[1].weight = model[0].weight
    assert_is_truth(reg, model)


def test_a_layer_that_is_there_twice_is_tied_to_itself(backend: str) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    reg = SpectralRegularizer(model, strength=1.0)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert_is_truth(reg, model)


def test_a_wrapped_layer_is_followed(backend: str) -> None:
    """As activation checkpointing, adapters and torch.compile of a layer do; and layers not treated may change."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    reg = used(model)
    expected = reg(advance=False).item()
    model[0] = Wrapped(model[0])
    model[1] = nn.Tanh()
    assert reg(advance=False).item() == expected
    model.append(nn.Softmax())
    assert reg(advance=False).item() == expected


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
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
    assert_is_truth(reg_copy, model_copy)
    # The original has seen nothing of it.
    assert all(torch.equal(x, before[0][name]) for name, x in bits(reg).items())
    assert gradients(model) == {}
    reg()
    assert_is_truth(reg, model)


def test_deepcopy_of_a_model_that_holds_its_regularizer(backend: str) -> None:
    model = Mlp()
    model.reg = SpectralRegularizer(model, strength=1.0)
    load_converged(model.reg, model)
    assert len(list(model.parameters())) == 6 and len(model.state_dict()) == 6
    copied_model = copy.deepcopy(model)
    with torch.no_grad():
        copied_model.last.weight.mul_(1.5)
    assert_is_truth(copied_model.reg, copied_model)
    assert gradients(model) == {}
    assert_is_truth(model.reg, model)


def test_deepcopy_of_an_attached_one_is_not_attached(backend: str) -> None:
    model = Mlp()
    reg = used(model)
    reg.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    model_copy, reg_copy = copy.deepcopy((model, reg))
    assert_is_truth(reg_copy, model_copy)


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
    assert_is_truth(of_average, average.module)
    assert not torch.equal(average.module.first.weight, model.first.weight)
