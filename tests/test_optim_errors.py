"""What SpectralAdamW refuses before it trains: the whole message of each, and what it lets pass."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from regularizer_truth import refuses
from torch import nn

from spectral_ops import SpectralAdamW


def groups_with(**options: Any) -> list[dict[str, Any]]:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    return [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), **options}]


# ---- parameter groups ----

NUMBER, PAPER = "Use a float such as 1e-3", "2.0 is the paper's"


@pytest.mark.parametrize(
    ("key", "value", "kind", "condition", "remedy"),
    [
        ("strength", -1, ValueError, "finite and not negative, got -1", NUMBER),
        ("strength", "1", TypeError, "a number or a 0-d tensor, got str", NUMBER),
        ("strength", torch.ones(2), ValueError, "a 0-d float tensor, got torch.float32, 1-d", NUMBER),
        ("exponent", 0.5, ValueError, "finite and at least 1, got 0.5", PAPER),
        ("exponent", "2", TypeError, "a number, got str", PAPER),
        ("target", -1, ValueError, "finite and at least 0, got -1", "1.0 is the paper's"),
        ("target", True, TypeError, "a number, got bool", "1.0 is the paper's"),
    ],
)
def test_a_bad_value_in_a_group(key: str, value: Any, kind: type[Exception], condition: str, remedy: str) -> None:
    message = f"SpectralAdamW: expected param_groups[1]['{key}'] to be {condition}. {remedy}."
    first, second = groups_with(**{key: value})
    with refuses(kind, message):
        SpectralAdamW([first, second], strength=1e-3)
    optimizer = SpectralAdamW([first], strength=1e-3)
    with refuses(kind, message):
        optimizer.add_param_group(second)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("differentiable", True, "Autograd does not trace the step: leave it out"),
        ("decoupled_weight_decay", False, "Leave it out, or add weight_decay * w to the loss's gradients"),
    ],
)
def test_an_option_of_torchs_that_would_go_without_effect(key: str, value: bool, remedy: str) -> None:
    """At construction, in a group added later, in one that is edited between two steps."""
    message = f"SpectralAdamW: expected param_groups[1]['{key}'] to be {not value}, got {value}. {remedy}."
    first, second = groups_with(**{key: value})
    with refuses(ValueError, message):
        SpectralAdamW([first, second], strength=1e-3)
    optimizer = SpectralAdamW([first], strength=1e-3)
    with refuses(ValueError, message):
        optimizer.add_param_group(second)
    optimizer.add_param_group(second | {key: not value})
    for _ in range(2):
        optimizer.step()
    before = second["params"][0].detach().clone()
    optimizer.param_groups[1][key] = value
    with refuses(ValueError, message):
        optimizer.step()
    assert torch.equal(second["params"][0], before)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("strenght", "strength"),
        ("strengh", "strength"),
        ("Strength", "strength"),
        ("exponant", "exponent"),
        ("tagret", "target"),
        ("weight_deacy", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("maximise", "maximize"),
    ],
)
def test_a_misspelt_key_in_a_group(key: str, meant: str) -> None:
    condition = "expected the keys of param_groups[1] to be options, or names unlike them"
    with refuses(ValueError, f"SpectralAdamW: {condition}, got {key!r}. Write {meant!r}."):
        SpectralAdamW(groups_with(**{key: 1.0}), strength=1e-3)


def test_other_keys_are_kept() -> None:
    """Those of torch's other optimizers and schedulers, and such as projects keep in groups."""
    keys = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "name", "lr_scale", "layer"}
    keys |= {"no_weight_decay", "weight_decay_scale", "decoupled_decay", "beta", "beta1", "eps1", "use_muon", "rank"}
    for cls in vars(torch.optim).values():
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            parameters = [nn.Parameter(torch.ones(2, 2))]
            keys |= cls(parameters, lr=0.1).defaults.keys()  # type: ignore[call-arg]
    assert {"momentum", "nesterov", "lambd", "rho", "etas", "decoupled_weight_decay"} <= keys
    options = SpectralAdamW([nn.Parameter(torch.ones(2, 2))], strength=1e-3).defaults
    given = dict.fromkeys(keys - options.keys(), 0.5)
    optimizer = SpectralAdamW(groups_with(**given), strength=1e-3)
    assert given.items() <= optimizer.param_groups[1].items()


# ---- arguments ----


@pytest.mark.parametrize("seed", ["x", 1.5, None, True])
def test_a_seed_that_is_no_number(seed: Any) -> None:
    with refuses(TypeError, f"SpectralAdamW: expected seed to be a whole number, got {seed!r}. Use one such as 0."):
        SpectralAdamW(groups_with(), strength=1e-3, stochastic_rounding=True, seed=seed)


def test_whole_numbers_of_other_libraries_are_seeds() -> None:
    numpy = pytest.importorskip("numpy")
    model = nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = SpectralAdamW(model.parameters(), strength=1e-3, stochastic_rounding=True, seed=numpy.int64(-3))
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()


def test_stochastic_rounding_is_without_effect_on_float32() -> None:
    """As the docstring says."""
    ends = []
    for options in ({}, {"stochastic_rounding": True, "seed": 3}):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        optimizer = SpectralAdamW(model.parameters(), model=model, strength=1e-3, **options)
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("params", "got"),
    [
        (nn.Linear(3, 2), "a module (Linear)"),
        (nn.Sequential(nn.Linear(3, 2)), "a module (Sequential)"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_a_model_in_place_of_its_parameters(params: Any, got: str) -> None:
    condition, remedy = "expected params to be parameters or groups of them", "Pass model.parameters()"
    with refuses(TypeError, f"SpectralAdamW: {condition}, got {got}. {remedy}."):
        SpectralAdamW(params, strength=1e-3)


def test_a_parameter_list_is_parameters() -> None:
    listed = nn.ParameterList([torch.ones(2, 2)])
    assert SpectralAdamW(listed, strength=1e-3).param_groups[0]["params"] == list(listed)


# ---- states ----


def test_what_is_no_state() -> None:
    optimizer = SpectralAdamW(groups_with(), strength=1e-3)
    before = copy.deepcopy(optimizer.state_dict())
    remedy = "Pass what state_dict() returned."
    for given in (None, [1], optimizer):
        got = type(given).__name__
        with refuses(TypeError, f"SpectralAdamW: expected state_dict to be a mapping, got {got}. {remedy}"):
            optimizer.load_state_dict(given)  # type: ignore[arg-type]
    for key in ("state", "param_groups"):
        given = {name: value for name, value in before.items() if name != key}
        condition = "expected state_dict to hold 'state' and 'param_groups'"
        with refuses(ValueError, f"SpectralAdamW: {condition}, got one without {key!r}. {remedy}"):
            optimizer.load_state_dict(given)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(
    ("key", "value", "kind", "condition"),
    [
        ("target", math.nan, ValueError, "to be finite and at least 0, got nan"),
        ("target", "1", TypeError, "to be a number, got str"),
        ("exponent", 0.2, ValueError, "to be finite and at least 1, got 0.2"),
        ("exponent", None, TypeError, "to be a number, got NoneType"),
    ],
)
def test_a_bad_value_that_a_group_is_given_later(key: str, value: Any, kind: type[Exception], condition: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = SpectralAdamW(model.parameters(), model=model, strength=0.1)
    optimizer.step()
    before, good = model.weight.detach().clone(), optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with pytest.raises(kind, match=rf"param_groups\[0\]\['{key}'\] {condition}"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    optimizer.param_groups[0][key] = good
    optimizer.step()
    assert not torch.equal(model.weight, before)
