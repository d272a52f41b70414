"""SpectralAdamW's step that finds its tensors by one look-up: taken where nothing changed, right where anything did."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import same_bits
from optim_models import LR, STRENGTH, Batches, Net, net
from torch import nn

from spectral_ops import SpectralAdamW
from spectral_ops.backends import use_backend
from spectral_ops.optim_parts import Part

STEPS = 24


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which form each call of a part took, in order."""
    forms: list[str] = []
    originals = {name: getattr(Part, name) for name in ("step", "step_again")}
    for name, original in originals.items():

        def call(self: Part, *args: Any, name: str = name, original: Any = original) -> Any:
            forms.append(name)
            return original(self, *args)

        monkeypatch.setattr(Part, name, call)
    return forms


def optimizer_of(model: Net, groups: int = 1, **options: Any) -> SpectralAdamW:
    """Of two groups, with an exponent of its own for each, it takes two calls a step."""
    parameters = list(model.parameters())
    cut = len(parameters) // 2 if groups == 2 else len(parameters)
    held = [{"params": parameters[:cut]}, {"params": parameters[cut:], "exponent": 1.5}][:groups]
    return SpectralAdamW(held, **({"lr": LR, "model": model, "strength": STRENGTH} | options))


def gradients(model: Net, batches: Batches) -> None:
    batches.loss(model).backward()


def step(model: Net, optimizer: SpectralAdamW, batches: Batches, *, forget: bool = False) -> None:
    if forget and optimizer._cut is not None:  # the look-up: every tensor is then looked at by itself
        for part in optimizer._cut.parts:
            part.lookup = None
    optimizer.step()
    optimizer.zero_grad()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(same_bits(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


def state_of(optimizer: SpectralAdamW, model: nn.Module) -> list[torch.Tensor]:
    saved = optimizer.state_dict()
    moments = [x for state in saved["state"].values() for x in state.values()]
    spectra = [x for key in ("v", "u", "sigma", "exponents") for x in saved["spectral"].get(key, {}).values()]
    return [*model.parameters(), *moments, *spectra, optimizer.penalty]  # type: ignore[list-item]


def replace_moment(optimizer: SpectralAdamW, model: Net) -> None:
    state = optimizer.state[model.head.weight]
    if state:
        state["exp_avg"] = 0.5 * state["exp_avg"]


def replace_state(optimizer: SpectralAdamW, model: Net) -> None:
    if optimizer.state[model.head.bias]:
        optimizer.state[model.head.bias] = {key: x.clone() for key, x in optimizer.state[model.head.bias].items()}


def wide_count(optimizer: SpectralAdamW, model: Net) -> None:
    state = optimizer.state[model.norm.weight]
    if state:
        state["step"] = state["step"].double()


def unaligned(optimizer: SpectralAdamW, model: Net) -> None:
    p = model.head.weight
    model.head.weight.data = torch.cat([torch.zeros(1), p.detach().flatten()])[1:].view(p.shape)


@torch.no_grad()
def in_place(optimizer: SpectralAdamW, model: Net) -> None:
    model.head.weight.mul_(2)


def strided_gradient(optimizer: SpectralAdamW, model: Net) -> None:
    grad = model.head.weight.grad
    assert grad is not None
    model.head.weight.grad = grad.t().contiguous().t()


def toggle_amsgrad(optimizer: SpectralAdamW, model: Net) -> None:
    group = optimizer.param_groups[0]
    group["amsgrad"] = not group["amsgrad"]
    for p in model.parameters():
        state = optimizer.state[p]
        if state and group["amsgrad"]:
            state.setdefault("max_exp_avg_sq", state["exp_avg_sq"].clone())


def loaded(optimizer: SpectralAdamW, model: Net) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# What may happen between backward and step.
CHANGES: dict[str, Callable[[SpectralAdamW, Net], object]] = {
    "nothing": lambda optimizer, model: None,
    "no gradient": lambda optimizer, model: setattr(model.head.weight, "grad", None),
    "no gradient of a plain one": lambda optimizer, model: setattr(model.table.weight, "grad", None),
    "gradient elsewhere": lambda optimizer, model: setattr(model.head.weight, "grad", 2 * model.head.weight.grad),
    "gradient in another order": strided_gradient,
    "weight in place": in_place,
    "weight in place, unseen": lambda optimizer, model: model.head.weight.data.mul_(2),
    "weight by load": lambda optimizer, model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "weight elsewhere": lambda optimizer, model: setattr(model.head.weight, "data", 2 * model.head.weight.data),
    "weight unaligned": unaligned,
    "frozen": lambda optimizer, model: model.conv.weight.requires_grad_(not model.conv.weight.requires_grad),
    "another lr": lambda optimizer, model: optimizer.param_groups[0].update(lr=LR / 3),
    "another strength": lambda optimizer, model: optimizer.param_groups[0].update(strength=5 * STRENGTH),
    "another target": lambda optimizer, model: optimizer.param_groups[0].update(target=0.5),
    "another exponent": lambda optimizer, model: optimizer.param_groups[0].update(exponent=1.0),
    "amsgrad": toggle_amsgrad,
    "maximize": lambda optimizer, model: optimizer.param_groups[0].update(maximize=True),
    "moment": replace_moment,
    "state": replace_state,
    "count in float64": wide_count,
    "state loaded": loaded,
    "read anew": lambda optimizer, model: optimizer.prime(),
}


def test_taken_from_the_second_step_on(taken: list[str]) -> None:
    model, batches = net(), Batches()
    optimizer = optimizer_of(model)
    for _ in range(4):
        gradients(model, batches)
        step(model, optimizer, batches)
    assert taken == ["step", "step_again", "step_again", "step_again"]


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("nothing", "another lr")])
def test_what_looks_otherwise_is_looked_at(taken: list[str], name: str) -> None:
    """The rest is a change of numbers or of places."""
    model, batches = net(), Batches()
    optimizer = optimizer_of(model)
    for i in range(4):
        gradients(model, batches)
        if i == 2:
            CHANGES[name](optimizer, model)
        step(model, optimizer, batches)
    assert taken[:2] == ["step", "step_again"]
    looked_at = {
        "no gradient", "no gradient of a plain one", "gradient in another order", "weight unaligned", "frozen",
        "another target", "another exponent", "amsgrad", "maximize", "count in float64", "state loaded",
    }  # fmt: skip
    assert taken[2] == ("step" if name in looked_at else "step_again")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("groups", [1, 2])
def test_the_same_bits_whatever_happens_between_steps(seed: int, groups: int) -> None:
    """Beside an optimizer that looks at every tensor at every step; changes come at random."""
    model, batches = net(), [Batches(), Batches()]
    models = model, copy.deepcopy(model)
    optimizers = [optimizer_of(m, groups) for m in models]
    chance = random.Random(seed)
    for i in range(STEPS):
        name = chance.choice(list(CHANGES)) if chance.random() < 0.6 else "nothing"
        for m, optimizer, own in zip(models, optimizers, batches, strict=True):
            gradients(m, own)
            CHANGES[name](optimizer, m)
            step(m, optimizer, own, forget=m is models[1])
        assert same(*(state_of(o, m) for o, m in zip(optimizers, models, strict=True))), (i, name)


def test_gradients_in_another_order_at_every_step(taken: list[str]) -> None:
    models, batches = (net(), net()), [Batches(), Batches()]
    optimizers = [optimizer_of(m) for m in models]
    for _ in range(4):
        for m, optimizer, own in zip(models, optimizers, batches, strict=True):
            gradients(m, own)
            if m is models[0]:
                strided_gradient(optimizer, m)
            step(m, optimizer, own)
    assert same(*(state_of(o, m) for o, m in zip(optimizers, models, strict=True)))
    assert taken == ["step", "step"] + 3 * ["step", "step_again"]


@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"decoupled": True}, {"maximize": True}, {"master_weights": True}]
)
def test_options(taken: list[str], options: dict[str, bool]) -> None:
    models = net(), net()
    models[1].load_state_dict(models[0].state_dict())
    optimizers, batches = [optimizer_of(m, **options) for m in models], [Batches(), Batches()]
    for _ in range(4):
        for m, optimizer, own in zip(models, optimizers, batches, strict=True):
            gradients(m, own)
            step(m, optimizer, own, forget=m is models[1])
    assert same(*(state_of(o, m) for o, m in zip(optimizers, models, strict=True)))
    assert ("step_again" in taken) == ("master_weights" not in options)


def test_every_backend(backend: str, taken: list[str]) -> None:
    """Beside the same backend's own steps; the reference takes tensors and has no other form."""
    models, batches = (net(), net()), [Batches(), Batches()]
    optimizers = [optimizer_of(m) for m in models]
    for _ in range(3):
        for m, optimizer, own in zip(models, optimizers, batches, strict=True):
            gradients(m, own)
            step(m, optimizer, own, forget=m is models[1])
    assert same(*(state_of(o, m) for o, m in zip(optimizers, models, strict=True)))
    assert ("step_again" in taken) == (backend != "reference")


def test_another_backend_looks_at_the_tensors(taken: list[str]) -> None:
    model, batches = net(), Batches()
    optimizer = optimizer_of(model)
    for name in ("native", "native", "reference", "native", "native"):
        gradients(model, batches)
        with use_backend(name):
            step(model, optimizer, batches)
    assert taken == ["step", "step_again", "step", "step", "step_again"]


def test_a_step_that_failed_is_not_repeated(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was of other gradients; the one after it has those of the step before, whose look-up still fits."""
    if backend == "reference":
        pytest.skip("it repeats no step")
    model = nn.Sequential(nn.Linear(6, 5), nn.Embedding(4, 5))  # whose weight has no term of R
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)
    table = model[1].weight

    def failing(*args: Any) -> None:
        raise MemoryError

    for fails in (False, False, True, False):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if fails:
            table.grad = None
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(torch.autograd.graph, "increment_version", failing)
                optimizer.step()
        else:
            before = table.detach().clone()
            optimizer.step()
            assert not torch.equal(before, table)
