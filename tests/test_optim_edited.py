"""SpectralAdamW's parameters exchanged in the lists of its groups, which torch's optimizers read at every step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits
from optim_models import LR, STRENGTH
from torch import nn

from spectral_ops import SpectralAdamW


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def linear(*sizes: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(n, m) for n, m in zip(sizes, sizes[1:], strict=False)))


def steps(model: nn.Sequential, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, model[0].in_features)).square().sum().backward()
        optimizer.step()


def assert_goes_on_as(model: nn.Sequential, optimizer: SpectralAdamW, fresh: SpectralAdamW) -> None:
    """A step's penalty is that of an optimizer which is made now."""
    found, expected = optimizer.penalty_gradients(), fresh.penalty_gradients()
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        # Vectors of a few warm steps beside converged ones.
        assert (found[name] - gradient).abs().max().item() <= 0.02 * scale
        assert scale > 0 or name.endswith("bias")


def replace(model: nn.Sequential, params: list[nn.Parameter]) -> None:
    params[0] = model[0].weight = nn.Parameter(3 * model[0].weight.detach())


def widen(model: nn.Sequential, params: list[nn.Parameter]) -> None:
    """More units in the layer between the first two."""
    wide = linear(5, 12, 3, 4)
    model[0], model[1] = wide[0], wide[1]
    params[:] = list(model.parameters())


def append(model: nn.Sequential, params: list[nn.Parameter]) -> None:
    model.append(nn.Linear(4, 9))
    params.extend(model[3].parameters())


def drop(model: nn.Sequential, params: list[nn.Parameter]) -> None:
    del params[:2]


def shuffle(model: nn.Sequential, params: list[nn.Parameter]) -> None:
    params.reverse()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("edit", [replace, widen, append, drop, shuffle])
def test_edited_lists_of_parameters_are_followed(edit: Callable[..., None], named: bool) -> None:
    """torch's optimizers look at them at every step, and so tools exchange them: Accelerate for FSDP2, pruning."""
    model = linear(5, 7, 3, 4)
    options: dict[str, Any] = {"lr": LR, "strength": STRENGTH, "model": model if named else None}
    optimizer = SpectralAdamW(model.parameters(), **options)
    steps(model, optimizer, 3)
    params = optimizer.param_groups[0]["params"]
    edit(model, params)
    left = {id(p): p.detach().clone() for p in model.parameters()}
    assert_goes_on_as(model, optimizer, SpectralAdamW(params, **options))
    steps(model, optimizer, 3)
    trained = {id(p) for p in params}
    assert len(trained) == len(optimizer.entries)
    for p in model.parameters():
        assert same_bits(p, left[id(p)]) == (id(p) not in trained)
    assert_goes_on_as(model, optimizer, SpectralAdamW(params, **options))


@pytest.mark.parametrize("edit", [replace, append, drop, shuffle])
def test_names_given_without_a_model_stay_with_their_parameters(edit: Callable[..., None]) -> None:
    """torch keeps them in a list of their own, which whoever edits the parameters may leave as it is."""
    model = linear(5, 7, 3, 4)
    optimizer = SpectralAdamW(model.named_parameters(), lr=LR, strength=STRENGTH)
    steps(model, optimizer, 2)
    before = {id(entry.held): (entry.name, entry.layout) for entry in optimizer.entries}
    edit(model, optimizer.param_groups[0]["params"])
    steps(model, optimizer, 2)
    for entry in optimizer.entries:
        assert entry.layout is not None or entry.held.ndim == 1
        assert (entry.name, entry.layout) == before.get(id(entry.held), (entry.name, entry.layout))
    assert len(optimizer.sigmas()) == sum(p.ndim == 2 for p in optimizer.param_groups[0]["params"])


def test_a_removed_group_is_left_alone() -> None:
    model = linear(5, 7, 3)
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    optimizer = SpectralAdamW(groups, lr=LR, model=model, strength=STRENGTH)
    steps(model, optimizer, 2)
    del optimizer.param_groups[0]
    before = model[0].weight.detach().clone()
    steps(model, optimizer, 2)
    assert same_bits(model[0].weight, before) and set(optimizer.sigmas()) == {"1.weight"}


def test_copies_of_an_optimizer_whose_lists_were_edited() -> None:
    model = linear(5, 7, 3)
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)
    del optimizer.param_groups[0]["params"][:2]
    other, copied = copy.deepcopy((model, optimizer))
    steps(other, copied, 2)
    assert set(copied.sigmas()) == {"1.weight"}


def test_weights_of_another_shape_in_the_same_parameter() -> None:
    model = linear(5, 7, 3)
    options: dict[str, Any] = {"lr": LR, "strength": STRENGTH, "model": model}
    optimizer = SpectralAdamW(model.parameters(), **options)
    model[0].weight.data = torch.ones(7, 2).cumsum(0)
    model[0].in_features = 2
    steps(model, optimizer, 2)
    model[0].weight.data = torch.ones(7, 9).cumsum(0)
    model[0].in_features = 9
    before = model[1].weight.detach().clone()
    message = r"the exp_avg of '0.weight' of shape \(7, 9\), as the parameter is now, got \(7, 2\)\. Delete"
    with pytest.raises(ValueError, match=message):
        steps(model, optimizer, 1)
    assert same_bits(model[1].weight, before)
    del optimizer.state[model[0].weight]
    steps(model, optimizer, 2)
    assert_goes_on_as(model, optimizer, SpectralAdamW(model.parameters(), **options))


def test_the_penalty_of_the_others_goes_on_when_a_group_is_added() -> None:
    """Everything had a gradient from the first step on, so nothing was cut anew since."""
    model = linear(5, 7, 3)
    optimizer = SpectralAdamW(model[0].parameters(), lr=LR, model=model, strength=STRENGTH)
    steps(model, optimizer, 2)
    before = optimizer.penalty_gradients()["0.weight"]
    optimizer.add_param_group({"params": model[1].parameters()})
    assert before.any() and same_bits(optimizer.penalty_gradients()["0.weight"], before)
