"""What holds a regularizer, or an optimizer of its own, is freed: look-ups hide nothing from the collector."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from regularizer_truth import Mlp
from torch import nn

from spectral_ops import SpectralAdamW, SpectralRegularizer, backends


def stepped(model: nn.Module) -> SpectralRegularizer:
    """A regularizer that has its look-up made."""
    reg = SpectralRegularizer(model, strength=1.0)
    for _ in range(3):
        reg.accumulate_grad_()
    return reg


def test_a_model_that_holds_its_regularizer_is_freed(backend: str) -> None:
    model = Mlp()
    model.reg = stepped(model)
    if backends.has_native():
        assert model.reg._lookup is not None
    found = weakref.ref(model)
    del model
    gc.collect()
    assert found() is None


def test_an_attached_optimizer_is_freed(backend: str) -> None:
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.reg = SpectralRegularizer(model, strength=1.0)
    model.reg.attach(optimizer)
    for _ in range(3):
        optimizer.step()
    found = weakref.ref(optimizer), weakref.ref(model)
    del optimizer, model
    gc.collect()
    assert [x() for x in found] == [None, None]


def test_an_optimizer_that_its_parameters_hold_is_freed(backend: str) -> None:
    """As a step that runs inside backward has it: p.optimizer = optimizer."""
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = SpectralAdamW([p], strength=0.1)
    for _ in range(3):
        p.grad = torch.ones(4, 3)
        optimizer.step()
    if backend == "native":
        assert optimizer._cut is not None and any(part.lookup is not None for part in optimizer._cut.parts)
    p.optimizer = optimizer  # type: ignore[attr-defined]
    found = weakref.ref(optimizer)
    del optimizer, p
    gc.collect()
    assert found() is None


@pytest.mark.parametrize("name", ["ModelLookup", "StepLookup"])
def test_the_collector_comes_before_the_constructor(name: str) -> None:
    if not backends.has_native():
        pytest.skip("no compiled module")
    kind = getattr(backends.native(), name)
    unmade = kind.__new__(kind)
    gc.collect()
    assert gc.is_tracked(unmade)
