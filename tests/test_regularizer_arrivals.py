"""Layers that come later, change places or lose one of two places are refused: they would go without a penalty."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regularizer_truth import refuses
from torch import nn
from torch.nn.utils import parametrize

from spectral_ops import SpectralRegularizer, backends


class Tasks(nn.Module):
    """A head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4, bias=False)
        self.head: nn.Module = nn.Identity()
        self.heads = nn.ModuleList([nn.Linear(4, 2)])


def used(model: nn.Module, **options: Any) -> SpectralRegularizer:
    reg = SpectralRegularizer(model, strength=1.0, **options)
    for _ in range(2):
        reg.accumulate_grad_()
    model.zero_grad()
    return reg


def refused(reg: SpectralRegularizer, name: str) -> None:
    message = (
        f"SpectralRegularizer: expected every parameter to be there when the regularizer is built, got {name!r}, which "
        "came later and has no penalty. Build the regularizer again."
    )
    for call in (reg, reg.accumulate_grad_, reg.state_dict, reg):
        with refuses(RuntimeError, message):
            call()


def head_appended(model: Tasks) -> str:
    model.heads.append(nn.Linear(4, 2))
    return "heads.1.weight"


def identity_replaced(model: Tasks) -> str:
    model.head = nn.Linear(4, 4)
    return "head.weight"


def bias_set(model: Tasks) -> str:
    model.body.bias = nn.Parameter(torch.zeros(4))
    return "body.bias"


def child_of_a_layer(model: Tasks) -> str:
    model.body.adapter = nn.Linear(4, 4)
    return "body.adapter.weight"


def wrapped_with_a_layer_of_its_own(model: Tasks) -> str:
    model.heads[0] = nn.Sequential(model.heads[0], nn.Linear(2, 2))
    return "heads.0.1.weight"


COMING = [head_appended, identity_replaced, bias_set, child_of_a_layer, wrapped_with_a_layer_of_its_own]


@pytest.mark.parametrize("calls", [0, 2], ids=["before_the_first_call", "later"])
@pytest.mark.parametrize("come", COMING, ids=[come.__name__ for come in COMING])
def test_what_comes_later_is_refused(come: Callable[[Tasks], str], calls: int, backend: str) -> None:
    model = Tasks()
    reg = SpectralRegularizer(model, strength=1.0)
    for _ in range(calls):
        reg()
    refused(reg, come(model))
    SpectralRegularizer(model, strength=1.0).accumulate_grad_()
    assert all(p.grad is not None for p in model.parameters())


def test_without_the_compiled_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_native", lambda: False)
    with backends.use_backend("reference"):
        model = Tasks()
        reg = used(model)
        assert reg._lookup is None
        refused(reg, head_appended(model))


@pytest.mark.parametrize("place", [0, 1])
def test_a_shared_layer_replaced_in_one_place(place: int, backend: str) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    reg = used(model)
    model[place] = nn.Linear(4, 4)
    if place == 1:
        refused(reg, "1.weight")
    else:
        message = (
            "SpectralRegularizer: expected parameter '0.weight' to stay where it was, got it at '1.weight' and another "
            "in its place. Build the regularizer again."
        )
        with refuses(RuntimeError, message):
            reg()


def test_parametrizations_removed(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    reg = used(model)
    parametrize.remove_parametrizations(model[0], "weight")
    refused(reg, "0.weight")


def test_layers_that_changed_places(backend: str) -> None:
    """Each would go by the other's name in sigmas(), in state_dict() and in a mapping's numbers."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reg = used(model)
    model[0], model[1] = model[1], model[0]
    message = (
        "SpectralRegularizer: expected parameter '0.weight' to stay where it was, got it at '1.weight' and another in "
        "its place. Build the regularizer again."
    )
    for call in (reg, reg.accumulate_grad_, reg.state_dict):
        with refuses(RuntimeError, message):
            call()
    model[0], model[1] = model[1], model[0]
    reg()


# ---- what may come ----


def embedding(model: Tasks) -> None:
    model.head = nn.Embedding(3, 4)


def unrecognised(model: Tasks) -> None:
    model.scale = nn.Parameter(torch.ones(3))


def nothing_to_treat(model: Tasks) -> None:
    model.heads.append(nn.ReLU())


def tied(model: Tasks) -> None:
    """The very parameter in a second place has its penalty."""
    model.heads.append(nn.Linear(4, 4, bias=False))
    model.heads[1].weight = model.body.weight


HARMLESS = [embedding, unrecognised, nothing_to_treat, tied]


@pytest.mark.parametrize("change", HARMLESS, ids=[change.__name__ for change in HARMLESS])
def test_what_would_not_be_treated_may_come(change: Callable[[Tasks], None], backend: str) -> None:
    model = Tasks()
    reg = used(model)
    expected = reg(advance=False).item()
    change(model)
    assert reg(advance=False).item() == expected
    if reg._lookup is not None:
        assert reg._lookup.parameters() is not None  # the look-up knows the model as it is now
    refused(reg, head_appended(model).replace("1", str(len(model.heads) - 1)))


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": "heads.*"},
        {"exclude": ["head*", lambda module, name: name.startswith("heads.")]},
        {"include": "body.*"},
        {"include": {"body.*": 1}.keys()},
        {"rules": {"heads.*": "skip"}},
    ],
    ids=["exclude", "callable", "include", "keys", "rules"],
)
def test_what_the_user_left_out_may_come(options: dict[str, Any], backend: str) -> None:
    model = Tasks()
    model.head = nn.Linear(4, 4)
    reg = used(model, **options)
    expected = reg(advance=False).item()
    model.heads.append(nn.Linear(4, 2))
    model.heads[0] = nn.Linear(4, 3)
    assert reg(advance=False).item() == expected
    twins = [copy.deepcopy((model, reg))[1]]
    if not any(callable(pattern) for pattern in options.get("exclude", ())):
        twins += [pickle.loads(pickle.dumps((model, reg)))[1]]
    for twin in twins:
        twin._root.heads.append(nn.Linear(4, 2))
        assert twin(advance=False).item() == expected
        twin._root.body.bias = nn.Parameter(torch.zeros(4))
        refused(twin, "body.bias")


def test_switches_hold_for_what_comes(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    reg = used(model, biases=False)
    model[0].bias = nn.Parameter(torch.zeros(4))
    reg()
    model.append(nn.LayerNorm(4))
    refused(reg, "1.weight")


def test_rules_hold_for_what_comes(backend: str) -> None:
    model = Tasks()
    model.gamma = nn.Parameter(torch.ones(3))
    reg = used(model, rules={"*gamma": "scale"})
    model.body.gamma = nn.Parameter(torch.ones(3))
    refused(reg, "body.gamma")


def test_a_frozen_layer_may_come_until_it_is_trained(backend: str) -> None:
    """As a copy of the model for distillation."""
    model = Tasks()
    reg = used(model)
    model.teacher = copy.deepcopy(model).requires_grad_(False)
    for _ in range(2):
        reg()
    model.teacher.requires_grad_(True)
    refused(reg, "teacher.body.weight")
    del model.teacher
    reg()


def test_pickled_with_patterns_that_cannot_be(backend: str) -> None:
    """Nothing is refused then that the callable might leave out."""
    model = Tasks()
    reg = used(model, exclude=lambda module, name: name.startswith("heads."))
    copied, loaded = pickle.loads(pickle.dumps((model, reg)))
    copied.heads.append(nn.Linear(4, 2))
    loaded()


def test_pairs_have_no_layers(backend: str) -> None:
    model = Tasks()
    reg = SpectralRegularizer(model.named_parameters(), strength=1.0)
    model.heads.append(nn.Linear(4, 2))
    reg()
