"""SpectralRegularizer.attach: several optimizers, parameters that come later, the end of it, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import F32
from regularizer_truth import (
    TOLERANCE,
    Mlp,
    assert_close,
    assert_same_bits,
    bits,
    gradients,
    load_converged,
    refuses,
    truth,
    weights,
)
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer

STRENGTH = 0.3

NOT_ATTACHED = (
    "on a regularizer that is not attached, got one attached to an optimizer, which adds the penalty at each step. "
    "Use one of the forms; to look at the value: reg(advance=False) under torch.no_grad()."
)


def regularized(model: nn.Module, **arguments: object) -> SpectralRegularizer:
    reg = SpectralRegularizer(model, strength=STRENGTH, **arguments)  # type: ignore[arg-type]
    load_converged(reg, model)
    return reg


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)  # type: ignore[arg-type]


def expected(model: nn.Module) -> dict[str, Tensor]:
    return {name: STRENGTH * g for name, g in truth(model).gradients.items()}


def test_every_optimizer_serves_its_own_parameters(backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    first, second = sgd(matrices), torch.optim.AdamW(others, lr=0.0)
    whole = reg(advance=False).item()
    handles = reg.attach(first), reg.attach(second)
    first.step()
    assert {name for name in gradients(model)} == {"first.weight", "last.weight"}
    second.step()
    assert_close(gradients(model), expected(model), TOLERANCE[F32])
    shares = [handle.penalty.item() for handle in handles]  # type: ignore[union-attr]
    assert all(share > 0 for share in shares) and abs(sum(shares) - whole) <= 1e-6 * whole


def test_one_of_two_optimizers_leaves_the_rest_alone(backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    optimizer = sgd(model.last.parameters())
    reg.attach(optimizer)
    before = bits(reg)
    optimizer.step()
    assert set(gradients(model)) == {"last.weight", "last.bias"}
    assert torch.equal(bits(reg)["v of first.weight"], before["v of first.weight"])


def test_parameters_added_after_attach(backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    optimizer = sgd(model.first.parameters())
    reg.attach(optimizer)
    optimizer.step()
    assert set(gradients(model)) == {"first.weight", "first.bias"}
    model.zero_grad()
    optimizer.add_param_group({"params": [*model.norm.parameters(), *model.last.parameters()]})
    optimizer.step()
    assert_close(gradients(model), expected(model), TOLERANCE[F32])


def test_parameters_exchanged_after_attach(backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    optimizer = sgd(model.first.parameters())
    reg.attach(optimizer)
    optimizer.param_groups[0]["params"] = list(model.last.parameters())  # as many as before
    optimizer.step()
    assert set(gradients(model)) == {"last.weight", "last.bias"}


def test_parameters_that_are_not_the_models(backend: str) -> None:
    model, stranger = Mlp(), nn.Parameter(torch.ones(3, 3))
    reg = regularized(model)
    optimizer = sgd([stranger, *model.parameters()])
    reg.attach(optimizer)
    optimizer.step()
    assert stranger.grad is None
    assert_close(gradients(model), expected(model), TOLERANCE[F32])


@pytest.mark.parametrize("end", ["remove", "with"])
def test_removed(end: str, backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    optimizer = sgd(model.parameters())
    if end == "with":
        with reg.attach(optimizer):
            optimizer.step()
    else:
        handle = reg.attach(optimizer)
        optimizer.step()
        handle.remove()
        handle.remove()  # does nothing
    assert len(gradients(model)) == 6
    assert not optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]
    model.zero_grad()
    before = bits(reg)
    optimizer.step()
    assert gradients(model) == {}
    assert_same_bits(bits(reg), before)
    reg().backward()  # allowed again, and right
    assert_close(gradients(model), expected(model), TOLERANCE[F32])
    reg.attach(optimizer)  # and so is this


def test_removing_one_of_two_keeps_the_other(backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    first, second = sgd(model.first.parameters()), sgd(model.last.parameters())
    handle = reg.attach(first)
    reg.attach(second)
    handle.remove()
    first.step()
    second.step()
    assert set(gradients(model)) == {"last.weight", "last.bias"}


def test_attached_twice_is_refused(backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    optimizer = sgd(model.parameters())
    reg.attach(optimizer)
    for name, again in (("last.weight", sgd(model.last.parameters())), ("first.weight", optimizer)):
        condition = f"expected parameter {name!r} to be attached to no other optimizer, got one that is."
        with refuses(RuntimeError, f"attach: {condition} Call remove() on the first handle."):
            reg.attach(again)
    optimizer.step()  # the first attachment is as it was, and the refused ones left no hook
    assert_close(gradients(model), expected(model), TOLERANCE[F32])


def test_optimizer_of_another_model_is_refused() -> None:
    message = (
        "expected optimizer to hold parameters of the regularizer ('first.weight', ...), got none of them. "
        "Attach to the optimizer that was given this model's parameters."
    )
    other = sgd(Mlp().parameters())
    with refuses(ValueError, f"attach: {message}"):
        regularized(Mlp()).attach(other)
    other.step()  # no hook was left behind


def test_what_is_no_optimizer_is_refused() -> None:
    message = "expected optimizer to be a torch.optim.Optimizer, got Mlp. Pass the optimizer itself."
    with refuses(TypeError, f"attach: {message}"):
        regularized(Mlp()).attach(Mlp())  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["positional", "keyword", "lbfgs"])
def test_closure_is_refused(how: str, backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    optimizer = torch.optim.LBFGS(model.parameters()) if how == "lbfgs" else sgd(model.parameters())
    reg.attach(optimizer)
    before = bits(reg), weights(model)
    message = (
        "expected optimizer.step() without a closure, got one. A closure computes the gradients anew and would discard "
        "the penalty: add reg() to the loss inside it."
    )
    with refuses(RuntimeError, f"attach: {message}"):
        if how == "keyword":
            optimizer.step(closure=lambda: torch.zeros(()))
        else:
            optimizer.step(lambda: torch.zeros(()))
    assert_same_bits(bits(reg), before[0])
    assert_same_bits(weights(model), before[1])
    assert gradients(model) == {}
    if how != "lbfgs":
        optimizer.step(closure=None)
        assert_close(gradients(model), expected(model), TOLERANCE[F32])


def test_lbfgs_with_the_loss_form(backend: str) -> None:
    """The remedy that the message names: the penalty is part of what LBFGS minimises."""
    model = nn.Linear(4, 4, bias=False)
    reg = SpectralRegularizer(model, strength=1.0)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=40)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([3.0, 0.5, 0.2, 0.1])))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = reg()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert abs(torch.linalg.matrix_norm(model.weight, 2).item() - 1) <= 1e-3  # measured 1e-5


@pytest.mark.parametrize("call", ["reg()", "reg.accumulate_grad_()"])
def test_other_forms_while_attached_are_refused(call: str, backend: str) -> None:
    model = Mlp()
    reg = regularized(model)
    optimizer = sgd(model.last.parameters())  # one parameter suffices
    forms: dict[str, Callable[[], Tensor]] = {"reg()": reg, "reg.accumulate_grad_()": reg.accumulate_grad_}
    handle = reg.attach(optimizer)
    before = bits(reg)
    with refuses(RuntimeError, f"SpectralRegularizer: expected {call} {NOT_ATTACHED}"):
        forms[call]()
    assert_same_bits(bits(reg), before)
    assert gradients(model) == {}
    with torch.no_grad():  # the remedy
        reg(advance=False)
        reg()
    assert_same_bits(bits(reg), before)
    handle.remove()
    forms[call]()


def test_copied_optimizer_has_no_penalty() -> None:
    """torch drops the hooks of an optimizer that is copied; attach to the copy."""
    model = Mlp()
    optimizer = sgd(model.parameters())
    reg = regularized(model)
    reg.attach(optimizer)
    copied_model, copied_reg, copied = copy.deepcopy((model, reg, optimizer))
    copied.step()
    assert gradients(copied_model) == {} and gradients(model) == {}
    copied_reg.attach(copied)
    copied.step()
    assert_close(gradients(copied_model), expected(copied_model), TOLERANCE[F32])
    assert gradients(model) == {}


def test_optimizer_state_does_not_hold_the_attachment(backend: str) -> None:
    """Saving and loading an optimizer keeps the attachment of the one that is there."""
    model = Mlp()
    reg = regularized(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    reg.attach(optimizer)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.zero_grad()
    optimizer.step()
    assert_close(gradients(model), expected(model), TOLERANCE[F32])
