"""What SpectralAdamW knows of s, u, v through a save and a load: of which weights, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits
from optim_models import LR, STRENGTH
from regularizer_truth import refuses
from torch import Tensor, nn

from spectral_ops import SpectralAdamW


def made(seed: int = 0) -> tuple[nn.Sequential, SpectralAdamW]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5)).double()
    return model, SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)


def step(model: nn.Module, optimizer: SpectralAdamW, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = gradient if p.requires_grad else None
    optimizer.step()


def trained(*numbers: int) -> tuple[nn.Sequential, SpectralAdamW]:
    model, optimizer = made()
    for number in numbers:
        step(model, optimizer, number)
    return model, optimizer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(same_bits(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def state_of(optimizer: SpectralAdamW) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


# ---- of which weights ----


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["saved once", "saved twice"])
def test_a_matrix_that_is_frozen_while_it_is_saved(changed: bool, again: bool) -> None:
    """Where it was changed meanwhile, the step after it is thawed reads it anew, in either run."""
    model, optimizer = trained(1, 2)
    model[0].weight.requires_grad_(False)
    if changed:
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    step(model, optimizer, 3)
    state = state_of(optimizer)
    other, restored = made(seed=1)
    other[0].weight.requires_grad_(not again)
    other.load_state_dict(model.state_dict())
    restored.load_state_dict(state)
    if again:
        step(other, restored, 4)
        step(model, optimizer, 4)
        state = state_of(restored)
        other, restored = made(seed=2)
        other.load_state_dict(model.state_dict())
        restored.load_state_dict(state)
    for m, own in ((model, optimizer), (other, restored)):
        m[0].weight.requires_grad_(True)
        step(m, own, 5)
        step(m, own, 6)
    assert same(model, other)


LOOKS: dict[str, Callable[[SpectralAdamW], Any]] = {
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "spectral_state_dict": lambda optimizer: optimizer.spectral_state_dict(),
    "penalty_gradients": lambda optimizer: optimizer.penalty_gradients(),
    "deepcopy": copy.deepcopy,
    "repr": repr,
}


@pytest.mark.parametrize("look", list(LOOKS))
def test_looked_at_between_the_optimizers_state_and_the_models(look: str) -> None:
    """The weights that the state is of are yet to come."""
    model, optimizer = trained(1, 2)
    weights, state = copy.deepcopy(model.state_dict()), state_of(optimizer)
    other, restored = made(seed=1)
    restored.load_state_dict(state)
    LOOKS[look](restored)
    LOOKS["penalty_gradients"](restored)
    other.load_state_dict(weights)
    LOOKS[look](restored)
    for m, own in ((model, optimizer), (other, restored)):
        step(m, own, 3)
        step(m, own, 4)
    assert same(model, other)
    assert not restored._spectra._loaded


@pytest.mark.parametrize("by", ["state_dict", "deepcopy"])
def test_saved_between_the_optimizers_state_and_the_models(by: str) -> None:
    """What was loaded is what is saved."""
    model, optimizer = trained(1, 2)
    state = state_of(optimizer)
    between, held = made(seed=1)
    held.load_state_dict(state)
    held.penalty_gradients()
    if by == "deepcopy":
        other, restored = copy.deepcopy((between, held))
    else:
        other, restored = made(seed=2)
        restored.load_state_dict(state_of(held))
    for key, by_name in state["spectral"].items():
        assert all(same_bits(x, restored.state_dict()["spectral"][key][name]) for name, x in by_name.items()), key
    other.load_state_dict(model.state_dict())
    step(model, optimizer, 3)
    step(other, restored, 3)
    assert same(model, other)


def test_penalty_gradients_before_the_models_weights_come() -> None:
    """They are those of the weights that are there."""
    _, optimizer = trained(1, 2)
    other, restored = made(seed=1)
    expected = made(seed=1)[1].penalty_gradients()["0.weight"]
    restored.load_state_dict(state_of(optimizer))
    for _ in range(40):  # from the vectors of another matrix; each change by nothing is a read
        with torch.no_grad():
            other[0].weight.mul_(1.0)
        restored.penalty_gradients()
    first = restored.penalty_gradients()["0.weight"]
    assert first.shape == expected.shape and not first.isnan().any()
    sigma = torch.linalg.matrix_norm(other[0].weight, 2).item()
    assert 0.5 * sigma <= restored.sigmas()["0.weight"].item() <= sigma * (1 + 1e-12)


# ---- what is refused ----

REMEDY = "Build it with the model=, names and rules that the state was saved under"


def refused(state: dict[str, Any], kind: type[Exception], message: str) -> None:
    """And changes nothing, by either way of loading."""
    model, optimizer = trained(1)
    before = state_of(optimizer)["spectral"]
    for load in (
        lambda: optimizer.load_state_dict(optimizer.state_dict() | {"spectral": state}),
        lambda: optimizer.load_spectral_state_dict(state),
    ):
        with refuses(kind, message):
            load()
    after = optimizer.spectral_state_dict()
    assert all(same_bits(x, after[key][name]) for key, by_name in before.items() for name, x in by_name.items())


@pytest.mark.parametrize(
    ("names", "unexpected"),
    [
        ({"a.0.weight": "0.weight", "a.1.weight": "1.weight"}, ["a.0.weight", "a.1.weight"]),
        ({"0.weight": "0.weight", "1.weight": "1.weight", "2.weight": "1.weight"}, ["2.weight"]),
    ],
    ids=["other names", "one more"],
)
def test_a_state_of_other_matrices(names: dict[str, str], unexpected: list[str]) -> None:
    """names: those in the state, and whose entries they have."""
    state = trained(1)[1].spectral_state_dict()
    named = {key: {new: x[old] for new, old in names.items()} for key, x in state.items()}
    there = [f"{i}.{what}" for i in range(2) for what in ("bias", "weight")]
    refused(
        named, ValueError,
        f"SpectralAdamW: expected state['spectral'] to hold matrices of this optimizer, {there}, got {unexpected}. "
        f"{REMEDY}.",
    )  # fmt: skip


def test_a_matrix_that_was_never_trained_may_be_missing() -> None:
    """Frozen when the state was saved, whether it is now or not: what is trained layer after layer."""
    model, optimizer = made()
    model[0].weight.requires_grad_(False)
    fresh = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)
    state = state_of(fresh)
    assert set(state["spectral"]["v"]) == {"1.weight"}
    optimizer.load_state_dict(state)
    assert set(optimizer.spectral_state_dict()["v"]) == {"0.weight", "1.weight"}
    step(model, optimizer, 1)
    model[0].weight.requires_grad_(True)
    with torch.no_grad():
        model[0].weight.mul_(3)
    optimizer.load_state_dict(state)
    step(model, optimizer, 2)
    norm = torch.linalg.matrix_norm(model[0].weight.detach(), 2)
    assert abs(optimizer.sigmas()["0.weight"].item() / norm.item() - 1) <= 0.05  # its weight was read


def damaged(key: str, value: Any) -> dict[str, Any]:
    state = trained(1)[1].spectral_state_dict()
    if isinstance(value, float):
        state[key]["0.weight"][..., 0] = value
    else:
        state[key]["0.weight"] = value
    return state


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("u", math.nan, ValueError, "['u']['0.weight'] to be finite where sigma is, got NaN or infinity. The"),
        ("u", math.inf, ValueError, "['u']['0.weight'] to be finite where sigma is, got NaN or infinity. The"),
        ("u", torch.ones(1, 7).long(), TypeError, "['u']['0.weight'] to be a float tensor, got torch.int64"),
        ("exponent", torch.tensor([1 << 30]), ValueError, "['exponent']['0.weight'] within 2048 of 0, got [10737418"),
        ("exponent", torch.tensor([-2049]), ValueError, "['exponent']['0.weight'] within 2048 of 0, got [-2049]"),
    ],
)
def test_a_damaged_state(key: str, value: Any, kind: type[Exception], message: str) -> None:
    _, optimizer = made()
    with pytest.raises(kind) as error:
        optimizer.load_spectral_state_dict(damaged(key, value))
    assert f"SpectralAdamW: expected state['spectral']{message}" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 0.0])
def test_a_state_of_weights_that_training_has_blown_up(value: float) -> None:
    """u of NaN is NaN, beside a sigma that says so."""
    model, optimizer = trained(1)
    with torch.no_grad():
        model[0].weight.fill_(value)
    step(model, optimizer, 2)
    other, copied = copy.deepcopy((model, optimizer))
    copied.load_state_dict(state_of(optimizer))
    step(model, optimizer, 3)
    step(other, copied, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.nan_to_num(), q.nan_to_num())


def test_a_malformed_state() -> None:
    _, optimizer = made()
    good = optimizer.spectral_state_dict()
    keys = "['v', 'exponent', 'sigma', 'u', 'checksum']"
    for given in (None, [1], {}):
        message = f"SpectralAdamW: expected state['spectral'] with the keys {keys}, got none of {keys}. Pass what"
        with refuses(ValueError, f"{message} state_dict() returned."):
            optimizer.load_spectral_state_dict(given)  # type: ignore[arg-type]
    for key in good:
        message = f"SpectralAdamW: expected state['spectral'][{key!r}] to be a mapping, got list. Pass what"
        with refuses(TypeError, f"{message} state_dict() returned."):
            optimizer.load_spectral_state_dict(good | {key: [1]})


def test_a_state_without_checksums_is_read_anew() -> None:
    model, optimizer = trained(1)
    state: dict[str, dict[str, Tensor]] = optimizer.spectral_state_dict()
    optimizer.load_spectral_state_dict(state | {"checksum": {}})
    v = state["v"]["0.weight"]
    optimizer.penalty_gradients()
    assert not same_bits(optimizer._spectra.vectors["0.weight"].v, v)
    assert same_bits(optimizer.spectral_state_dict()["v"]["0.weight"], v)


# ---- torch's side ----


def test_a_strength_that_is_a_tensor_of_the_users_stays_connected() -> None:
    """Where the state has none of its own."""
    strength = torch.tensor(0.5)
    model = nn.Linear(4, 4)
    optimizer = SpectralAdamW(model.parameters(), model=model, strength=strength)
    optimizer.param_groups[0]["target"] = 0.25
    optimizer.load_state_dict(torch.optim.AdamW(model.parameters(), lr=0.125).state_dict())
    group = optimizer.param_groups[0]
    assert group["strength"] is strength and group["target"] == 0.25 and group["lr"] == 0.125
    strength.fill_(0.0)
    optimizer.step()
    assert optimizer.penalty is not None and optimizer.penalty.item() == 0.0
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["strength"] = 0.75
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["strength"] == 0.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": []}, "state_dict['state'] to be a mapping, got list. Pass what state_dict() returned."),
        ({"state": {0: [1]}}, "the state of '0.weight' to be a mapping, got list. Pass what state_dict() returned."),
        ({"param_groups": 3}, "state_dict['param_groups'] to be a list of groups, got int. Pass what state_dict()"),
        ({"param_groups": [3]}, "state_dict['param_groups'] to be a list of groups, got one with something else in"),
        ({"param_groups": [{}]}, "state_dict['param_groups'] to be a list of groups, got one with something else in"),
    ],
    ids=str,
)
def test_a_malformed_state_of_torchs(change: dict[str, Any], message: str) -> None:
    model, optimizer = trained(1)
    before = state_of(optimizer)
    with pytest.raises(TypeError) as error:
        optimizer.load_state_dict(before | change)
    assert f"SpectralAdamW: expected {message}" in str(error.value)
    state = copy.deepcopy(before)
    state["state"][0]["step"] = "3"
    with pytest.raises(TypeError, match="the step of '0.weight' to be a tensor or a number, got str"):
        optimizer.load_state_dict(state)
    step(model, optimizer, 2)
