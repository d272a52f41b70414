"""Sharded models that are gathered, changed, cast, tied and scaled between steps train as unsharded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64, gaussian
from regularizer_truth import assert_close
from sharding_models import SHARDINGS, Feedforward, Rows, fsdp, kept, load_gaussian, make, regularizer, wholes
from sharding_run import run
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from spectral_ops import SpectralRegularizer

pytestmark = pytest.mark.slow


def batch(step: int, dtype: torch.dtype = F64) -> Tensor:
    return gaussian(f"x{step}", 3, 5, 7).to(dtype)


def steps(
    model: Any, reg: SpectralRegularizer, form: str, count: int = 2, before: Callable[[], Any] | None = None
) -> None:
    for step in range(count):
        model.zero_grad()
        dtype = next(model.parameters()).dtype
        if before is not None:
            before()
        loss = model(batch(step, dtype)).square().mean()
        if form == "loss":
            loss = loss + reg()
        loss.backward()
        if form == "accumulate":
            reg.accumulate_grad_()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad)


def outcome(model: Any, reg: SpectralRegularizer) -> dict[str, Tensor]:
    return wholes(model) | reg.sigmas()


def built_before_sharding(form: str, shard: str) -> dict[str, Tensor]:
    model = make(Rows, F64)
    reg = regularizer(model)
    load_gaussian(reg)
    if shard != "unsharded":
        SHARDINGS[shard](model)
    steps(model, reg, form)
    return outcome(model, reg)


@pytest.mark.parametrize("form", ["loss", "accumulate"])
@pytest.mark.parametrize("shard", ["fsdp", "kept"])
def test_built_before_sharding(shard: str, form: str) -> None:
    truth = built_before_sharding(form, "unsharded")
    for found in run(2, built_before_sharding, form, shard):
        assert_close(found, truth, 1e-12)


def built_while_gathered(form: str, shard: bool) -> dict[str, Tensor]:
    """A forward pass without gradients leaves the root whole until the next backward pass."""
    model = make(Rows, F64)
    if shard:
        fsdp(model)
    with torch.no_grad():
        model(batch(7))
    reg = regularizer(model)
    load_gaussian(reg)
    steps(model, reg, form)
    return outcome(model, reg)


@pytest.mark.parametrize("form", ["loss", "accumulate"])
def test_built_while_layers_are_gathered(form: str) -> None:
    truth = built_while_gathered(form, False)
    for found in run(2, built_while_gathered, form, True):
        assert_close(found, truth, 1e-12)


def evaluates_between(form: str, shard: bool) -> dict[str, Tensor]:
    model = make(Rows, F64)
    if shard:
        kept(model)
    reg = regularizer(model)
    load_gaussian(reg)

    def evaluate() -> None:
        with torch.no_grad():
            model(batch(9))
            reg()

    steps(model, reg, form, before=evaluate)
    return outcome(model, reg)


@pytest.mark.parametrize("form", ["loss", "accumulate"])
def test_evaluation_between_steps(form: str) -> None:
    truth = evaluates_between(form, False)
    for found in run(2, evaluates_between, form, True):
        assert_close(found, truth, 1e-12)


def changes(how: str, form: str, shard: bool) -> dict[str, Tensor]:
    model = make(Rows, F32 if how == "cast" else F64)
    if shard:
        fsdp(model)
    reg = regularizer(model)
    load_gaussian(reg)
    if how == "cast":
        model.to(F64)
    elif how == "assign":
        model.load_state_dict({name: p.detach() * 1.1 for name, p in model.state_dict().items()}, assign=True)
    elif how == "frozen":
        steps(model, reg, form, 1)
        for p in model.attention.parameters():
            p.requires_grad_(False)
        _frozen_step(model, reg, form)
        for p in model.attention.parameters():
            p.requires_grad_(True)
    steps(model, reg, form)
    return outcome(model, reg)


def _frozen_step(model: Any, reg: SpectralRegularizer, form: str) -> None:
    model.zero_grad()
    if form == "loss":
        reg().backward()
    else:
        reg.accumulate_grad_()


@pytest.mark.parametrize("form", ["loss", "accumulate"])
@pytest.mark.parametrize("how", ["cast", "assign", "frozen"])
def test_parameters_that_change(how: str, form: str) -> None:
    truth = changes(how, form, False)
    for found in run(2, changes, how, form, True):
        assert_close(found, truth, 1e-12)


def micro_steps(form: str, shard: bool) -> dict[str, Tensor]:
    model = make(Rows, F64)
    if shard:
        fsdp(model)
    reg = regularizer(model)
    load_gaussian(reg)
    for step in range(2):
        model.zero_grad()
        for micro in range(2):
            if shard:
                model.set_requires_gradient_sync(micro == 1)
            loss = model(batch(2 * step + micro)).square().mean()
            (loss + reg() if form == "loss" and micro == 1 else loss).backward()
        if form == "accumulate":
            reg.accumulate_grad_()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.05 * p.grad)
    return outcome(model, reg)


@pytest.mark.parametrize("form", ["loss", "accumulate"])
def test_gradient_accumulation(form: str) -> None:
    truth = micro_steps(form, False)
    for found in run(3, micro_steps, form, True):
        assert_close(found, truth, 1e-12)


def mixed_precision(form: str) -> dict[str, Tensor]:
    """The difference that the penalty makes to the gradients of one step."""
    found = []
    for with_penalty in (True, False):
        model = make(Rows, F32)
        fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32))
        reg = regularizer(model)
        load_gaussian(reg)
        loss = model(batch(0, BF16)).float().square().mean()
        (loss + reg() if form == "loss" and with_penalty else loss).backward()
        if form == "accumulate" and with_penalty:
            reg.accumulate_grad_()
        found.append(wholes(model, "grad"))
    return {name: found[0][name] - found[1][name] for name in found[0]}


@pytest.mark.parametrize("form", ["loss", "accumulate"])
def test_mixed_precision(form: str) -> None:
    model = make(Rows, F32)
    reg = regularizer(model)
    load_gaussian(reg)
    reg.accumulate_grad_()
    for found in run(2, mixed_precision, form):
        # Of the float32 weights: those in bfloat16 are off by 4e-3. What is left is the difference of two sums.
        assert_close(found, wholes(model, "grad"), 1e-4)


class Tied(Feedforward):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(7, 8)
        self.other.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.last(self.other(x))


def given(how: str, form: str, shard: bool) -> dict[str, Tensor]:
    model = make(Tied if how == "tied" else Feedforward, F64)
    if shard:
        kept(model)
    pairs = list(model.named_parameters())
    reg = SpectralRegularizer(pairs if how == "pairs" else model, strength=0.3)
    load_gaussian(reg)
    steps(model, reg, form)
    return outcome(model, reg)


@pytest.mark.parametrize("form", ["loss", "accumulate"])
@pytest.mark.parametrize("how", ["tied", "pairs"])
def test_tied_weights_and_pairs(how: str, form: str) -> None:
    truth = given(how, form, False)
    for found in run(2, given, how, form, True):
        assert_close(found, truth, 1e-12)


def under_scaler(fused: bool, overflow: bool, shard: bool) -> tuple[float, dict[str, Tensor]]:
    """Attached, three steps; the second one overflows, if any does, and is left out."""
    model = make(Rows, F32)
    if shard:
        fsdp(model)
    reg = regularizer(model)
    load_gaussian(reg)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, fused=fused, foreach=False if not fused else None)
    reg.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        before = outcome(model, reg)
        optimizer.zero_grad()
        loss = model(batch(step, F32)).square().mean()
        skipped = overflow and step == 1
        scaler.scale(loss * torch.inf if skipped else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = outcome(model, reg)
        assert all(torch.equal(x, after[name]) for name, x in before.items()) == skipped
    return scaler.get_scale(), outcome(model, reg)


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool, overflow: bool) -> None:
    scale, truth = under_scaler(fused, overflow, False)
    assert scale == (512.0 if overflow else 1024.0)
    for found_scale, found in run(2, under_scaler, fused, overflow, True):
        assert found_scale == scale
        assert_close(found, truth, 1e-3)  # Adam's first steps magnify what is left of small gradients by their size
