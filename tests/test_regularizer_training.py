"""SpectralRegularizer in a training loop: its three forms, clipping, accumulation, GradScaler, several optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import F32, step_in_float64
from regularizer_truth import (
    NET,
    TOLERANCE,
    Mlp,
    Net,
    assert_close,
    assert_same_bits,
    batch,
    bits,
    gradients,
    load_converged,
    load_random,
    refuses,
    truth,
    weights,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_ops import SpectralRegularizer

FORMS = ("loss", "accumulate", "attach")
# Two float32 gradients added in another order, or rounded once more: units of 1.2e-7, measured 1.
ROUNDING = 1e-6


def task(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def backward(form: str, reg: SpectralRegularizer, loss: Tensor, optimizer: Optimizer) -> None:
    """The gradient of loss + penalty, in whichever form, and a step."""
    if form == "loss":
        (loss + reg()).backward()
    else:
        loss.backward()
        if form == "accumulate":
            reg.accumulate_grad_()
    optimizer.step()


# ---- the three forms ----


def test_three_forms_give_one_gradient(backend: str) -> None:
    model, x = Net(), batch()
    reg = SpectralRegularizer(model, strength=0.3)
    load_random(reg)
    found, states = {}, {}
    for form in FORMS:
        copied, copied_reg = copy.deepcopy((model, reg))
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        if form == "attach":
            copied_reg.attach(optimizer)
        backward(form, copied_reg, task(copied, x), optimizer)
        found[form], states[form] = gradients(copied), bits(copied_reg)
    assert_same_bits(found["attach"], found["accumulate"])
    assert_close(found["loss"], found["accumulate"], ROUNDING)
    assert_same_bits(states["attach"], states["loss"])
    assert_same_bits(states["accumulate"], states["loss"])


def test_three_forms_give_one_value(backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=0.3)
    load_converged(reg, model)
    expected = 0.3 * truth(model).value
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    values = [reg(), reg.accumulate_grad_()]
    with reg.attach(optimizer) as handle:
        assert handle.penalty is None
        optimizer.step()
        assert handle.penalty is not None
        values.append(handle.penalty)
    assert all(abs(value.item() - expected) <= 1e-6 * expected for value in values)  # measured 4e-7
    assert all(value.shape == () for value in values)
    assert values[0].requires_grad and not values[1].requires_grad and not values[2].requires_grad


def test_accumulate_is_backward_of_the_call(backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=0.3)
    reg(advance=False).backward()
    expected = gradients(model)
    model.zero_grad()
    reg.accumulate_grad_()
    assert_close(gradients(model), expected, ROUNDING)
    # Added to what is there.
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    reg.accumulate_grad_()
    assert_close({name: g - 1 for name, g in gradients(model).items()}, expected, 1e-4)  # 1 + g, rounded


def test_loss_form_is_clipped_with_the_task(backend: str) -> None:
    model, x = Net(), batch()
    reg = SpectralRegularizer(model, strength=0.3)
    (task(model, x) + reg(advance=False)).backward()
    whole = gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm.item() > 0.02  # it is clipped
    factor = 0.01 / (norm.item() + 1e-6)  # as torch has it
    assert_close(gradients(model), {name: factor * g for name, g in whole.items()}, ROUNDING)


def test_attach_adds_after_clipping(backend: str) -> None:
    model, x = Net(), batch()
    reg = SpectralRegularizer(model, strength=0.3)
    reg(advance=False).backward()
    penalty = gradients(model)
    model.zero_grad()
    task(model, x).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    clipped = gradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)
    optimizer.step()
    assert_close(gradients(model), {name: clipped[name] + penalty[name] for name in clipped}, ROUNDING)


@pytest.mark.parametrize("form", FORMS)
def test_one_penalty_for_accumulated_micro_steps(form: str, backend: str) -> None:
    model, x = Mlp(), torch.randn(8, 6)
    reg = SpectralRegularizer(model, strength=0.3)
    load_converged(reg, model)
    task(model, x).backward()
    expected = {name: g + 0.3 * truth(model).gradients[name] for name, g in gradients(model).items()}
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if form == "attach":
        reg.attach(optimizer)
    for part in x[:6].split(2):
        (task(model, part) / 4).backward()
    backward(form, reg, task(model, x[6:]) / 4, optimizer)
    assert_close(gradients(model), expected, 1e-5)  # measured 4e-7


# ---- the state ----


@pytest.mark.parametrize("form", FORMS)
def test_one_warm_step_per_call(form: str, backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=0.3)
    start = load_random(reg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if form == "attach":
        reg.attach(optimizer)
    for _ in range(2):
        backward(form, reg, torch.zeros((), requires_grad=True), optimizer)
    after, sigmas = reg.state_dict()["v"], reg.sigmas()
    for name, first in start.items():
        w = dict(model.named_parameters())[name]
        for i, x in enumerate(NET[name][1](w.detach())):
            v = step_in_float64(x, first[i])[2]
            sigma, _, v = step_in_float64(x, v)
            # float32; 1e-6 is measured, for a start that is almost orthogonal to the rows
            assert (after[name][i].double() - v).norm().item() <= 1e-5
            assert abs(sigmas[name][i].item() - sigma.item()) <= 1e-5 * sigma.item()


@pytest.mark.parametrize("context", [None, torch.no_grad, torch.inference_mode])
def test_looking_changes_nothing(context: Callable[[], Any] | None, backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=0.3)
    load_random(reg)
    before, weights_before = bits(reg), weights(model)
    if context is None:
        value = reg(advance=False)
        value.backward()  # differentiable all the same
        assert model.head.weight.grad is not None
    else:
        with context():
            value = reg()
        assert not value.requires_grad
    assert_same_bits(bits(reg), before)
    str(reg), reg.sigmas(), reg.state_dict()
    assert_same_bits(bits(reg), before)
    assert_same_bits(weights(model), weights_before)
    assert value.item() == reg().item()
    assert not torch.equal(bits(reg)["v of head.weight"], before["v of head.weight"])  # and this call does


def test_the_model_is_not_touched(backend: str) -> None:
    model = Net()
    keys, modules = list(model.state_dict()), {name: set(vars(module)) for name, module in model.named_modules()}
    reg = SpectralRegularizer(model, strength=0.3)
    reg().backward()
    assert list(model.state_dict()) == keys
    assert {name: set(vars(module)) for name, module in model.named_modules()} == modules
    for module in model.modules():
        assert not any(hooks for key, hooks in vars(module).items() if key.endswith("_hooks"))
    assert all(p._backward_hooks is None and p._post_accumulate_grad_hooks is None for p in model.parameters())


# ---- GradScaler ----

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    # eps large enough that a gradient near zero is not blown up to a step of size lr
    "adam": lambda p, **arguments: torch.optim.Adam(p, lr=0.002, eps=1e-2, **arguments),
    "adamw": lambda p, **arguments: torch.optim.AdamW(p, lr=0.002, eps=1e-2, weight_decay=0.1, **arguments),
    "sgd": lambda p, **arguments: torch.optim.SGD(p, lr=0.003, momentum=0.9, **arguments),
}
OVERFLOWS = (1, 4)
STEPS = 7


def train_with_scaler(
    model: nn.Module, x: Tensor, form: str, make: Callable[..., Optimizer], fused: bool, unscale: bool
) -> None:
    optimizer = make(model.parameters(), fused=fused)
    reg = SpectralRegularizer(model, strength=0.3)
    if form == "attach":
        reg.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    scales = set()
    for step in range(STEPS):
        scales.add(scaler.get_scale())
        optimizer.zero_grad()
        before, weights_before = bits(reg), weights(model)
        loss = task(model, x)
        scaler.scale(loss + reg() if form == "loss" else loss).backward()
        if step in OVERFLOWS:
            next(model.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
        if form == "accumulate" and not unscale:
            reg.accumulate_grad_(grad_scale=scaler.get_scale())
        if unscale:
            scaler.unscale_(optimizer)
            if form == "accumulate":
                reg.accumulate_grad_()
        scaler.step(optimizer)
        scaler.update()
        if step in OVERFLOWS:
            assert_same_bits(weights(model), weights_before)
            if form == "attach":
                assert_same_bits(bits(reg), before)
    assert len(scales) > 1  # one that never moves would hide a stale one
    assert not hasattr(optimizer, "grad_scale")


def train_in_float64(model: nn.Module, x: Tensor, make: Callable[..., Optimizer]) -> None:
    """The same without scaler and overflow, the penalty's gradient from the SVD."""
    optimizer = make(model.parameters())
    for _ in range(STEPS - len(OVERFLOWS)):
        optimizer.zero_grad()
        task(model, x).backward()
        for (_, p), g in zip(model.named_parameters(), truth(model).gradients.values(), strict=True):
            p.grad += 0.3 * g
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize(
    ("form", "name"), [("loss", "adamw"), ("accumulate", "adamw"), *(("attach", name) for name in OPTIMIZERS)]
)
def test_grad_scaler(form: str, name: str, unscale: bool, fused: bool, backend: str) -> None:
    model, x = Mlp(), torch.randn(16, 6)
    start = weights(model)
    expected = copy.deepcopy(model).double()
    train_in_float64(expected, x.double(), OPTIMIZERS[name])
    train_with_scaler(model, x, form, OPTIMIZERS[name], fused, unscale)
    moved = {n: w - start[n] for n, w in weights(model).items()}
    # A warm step is behind the SVD by what the weights have turned since: measured 5e-3 of the way each parameter went.
    # A penalty that is lost shows as 0.5 and more.
    assert_close(moved, {n: w - start[n] for n, w in weights(expected).items()}, 1e-2)


@pytest.mark.parametrize("name", ["adam", "adamw"])  # fused SGD moves no float16 weight on the CPU (torch 2.13)
@pytest.mark.parametrize("scale", [2.0**4, 2.0**14], ids=["in_range", "overflow"])
def test_scaled_penalty_beyond_float16(name: str, scale: float, backend: str) -> None:
    """A fused optimizer, float16 weights: what overflows after GradScaler's search for infinities stays finite."""
    model = nn.Linear(4, 4, bias=False).half()
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([6.0, 1.0, 1.0, 1.0])))
    optimizer = OPTIMIZERS[name](model.parameters(), fused=True)
    reg = SpectralRegularizer(model, strength=0.1)
    load_converged(reg, model)
    reg.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(model(torch.zeros(2, 4, dtype=torch.float16)).sum()).backward()
    scaler.step(optimizer)
    gradient = model.weight.grad
    assert gradient is not None
    # 0.1 * 4 * 6 * 35 = 84, times the scale: 1344 or 1.4 million. The step has divided .grad by the scale.
    top = min(84 * scale, 65504.0) / scale
    assert abs(gradient[0, 0].item() - top) <= 2e-3 * top and gradient.isfinite().all()
    assert model.weight.isfinite().all() and model.weight[0, 0] < 6


def test_overflow_is_seen_where_the_scaler_looks_after_it(backend: str) -> None:
    """accumulate_grad_ before unscale_ does not saturate: the infinity has the step skipped and the scale reduced."""
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([6.0, 1.0, 1.0, 1.0])))
    model.half()
    reg = SpectralRegularizer(model, strength=0.1)
    load_converged(reg, model)
    reg.accumulate_grad_(grad_scale=2.0**14)
    assert model.weight.grad is not None and model.weight.grad.isinf().any()


def test_penalty_matters() -> None:
    """That test_grad_scaler can fail: without the penalty weights go elsewhere."""
    model, x = Mlp(), torch.randn(16, 6)
    start, moved = weights(model), []
    for strength in (0.3, 0.0):
        copied = copy.deepcopy(model)
        optimizer = OPTIMIZERS["adam"](copied.parameters())
        SpectralRegularizer(copied, strength=strength).attach(optimizer)
        for _ in range(STEPS - len(OVERFLOWS)):
            optimizer.zero_grad()
            task(copied, x).backward()
            optimizer.step()
        moved.append({n: w - start[n] for n, w in weights(copied).items()})
    assert any((moved[0][n] - moved[1][n]).norm() >= 0.5 * moved[0][n].norm() for n in start)


@pytest.mark.parametrize("scale", [2.0**16, torch.tensor(2.0**16), 65536], ids=["float", "tensor", "int"])
def test_accumulate_with_grad_scale(scale: float | Tensor, backend: str) -> None:
    model = Mlp()
    reg = SpectralRegularizer(model, strength=0.3)
    value = reg(advance=False)
    value.backward()
    expected = {name: g * 2.0**16 for name, g in gradients(model).items()}
    model.zero_grad()
    found = reg.accumulate_grad_(grad_scale=scale)
    assert_close(gradients(model), expected, ROUNDING)
    assert abs(found.item() - value.item()) <= ROUNDING * value.item()  # not scaled


NOT_POSITIVE = "finite and positive"


@pytest.mark.parametrize(
    ("scale", "kind", "condition", "got"),
    [
        (0.0, ValueError, NOT_POSITIVE, "0.0"),
        (-1, ValueError, NOT_POSITIVE, "-1"),
        (float("inf"), ValueError, NOT_POSITIVE, "inf"),
        (float("nan"), ValueError, NOT_POSITIVE, "nan"),
        (torch.ones(1), ValueError, "0-d", "shape (1,)"),
        ("2", TypeError, "a number or a 0-d tensor", "str"),
        (True, TypeError, "a number or a 0-d tensor", "bool"),
    ],
)
def test_bad_grad_scale(scale: Any, kind: type[Exception], condition: str, got: str) -> None:
    reg = SpectralRegularizer(Mlp(), strength=0.3)
    message = f"expected grad_scale to be {condition}, got {got}. Pass scaler.get_scale()."
    with refuses(kind, f"accumulate_grad_: {message}"):
        reg.accumulate_grad_(grad_scale=scale)


# ---- autocast ----


@pytest.mark.parametrize("form", FORMS)
def test_autocast_leaves_the_penalty_in_float32(form: str, backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=0.3)
    load_converged(reg, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if form == "attach":
        reg.attach(optimizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(form, reg, torch.zeros((), requires_grad=True), optimizer)
    expected = truth(model)
    # As without autocast; in bfloat16 it would be 1e-2 and more.
    assert_close(gradients(model), {name: 0.3 * g for name, g in expected.gradients.items()}, TOLERANCE[F32])
    assert all(v.dtype == F32 for v in reg.state_dict()["v"].values())
