"""Adam with a step counter for every entry that was reset: what a fresh Adam would do from then on."""

import math

import pytest
import torch
from method_samples import make
from torch import nn

from spectral_ops.continual.methods import entry_steps
from spectral_ops.continual.methods.entry_steps import EntrySteps
from spectral_ops.continual.methods.unit_reset import UnitReset

KINDS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "fused": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.99), fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "maximize": lambda p: torch.optim.Adam(p, lr=1e-2, maximize=True),
}
SIZE, RESET, BEFORE, AFTER = 12, [2, 3, 7], 30, 40


def model(values):
    out = nn.Module()
    out.p = nn.Parameter(values.clone())
    return out


def gradients():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BEFORE + AFTER, SIZE, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_entries_go_the_way_of_a_fresh_adam_and_the_others_of_the_old_one(kind):
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    ours, old = model(start), model(start)
    optimizer, plain = KINDS[kind](ours.parameters()), KINDS[kind](old.parameters())
    steps, kept = EntrySteps(optimizer, ours), [i for i in range(SIZE) if i not in RESET]
    fresh, new = None, None
    for step, gradient in enumerate(gradients()):
        if step == BEFORE:
            with torch.no_grad():
                for module in (ours, old):
                    module.p[RESET] = 0.5
            fresh = model(ours.p.detach())
            new = KINDS[kind](fresh.parameters())
            for name, moment in optimizer.state[ours.p].items():
                if name != "step":
                    moment[RESET] = 0
            for share in steps.shares(ours.p):
                share[RESET] = 0
        for module, own in ((ours, optimizer), (old, plain), (fresh, new)):
            if module is not None:
                module.p.grad = gradient.clone()
                own.step()
        steps.correct()
        assert torch.equal(ours.p[kept], old.p[kept])
        if fresh is not None:
            assert torch.allclose(ours.p[RESET], fresh.p[RESET], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(old.p[RESET], fresh.p[RESET], rtol=1e-3)  # what a counter left alone would give


def test_nothing_is_kept_once_nothing_is_left_to_correct(monkeypatch):
    monkeypatch.setattr(entry_steps, "_SMALL", 0.5)
    ours = model(torch.ones(SIZE))
    optimizer = torch.optim.Adam(ours.parameters(), betas=(0.9, 0.9))
    steps = EntrySteps(optimizer, ours)

    def step():
        ours.p.grad = torch.ones(SIZE)
        optimizer.step()
        steps.correct()

    step()
    steps.shares(ours.p)
    for i in range(7):  # 0.9^6 > 0.5 > 0.9^7
        assert len(steps.state_dict()["shares"]) == 1, i
        step()
    assert steps.state_dict() == {"shares": {}, "since": {}}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RAdam])
def test_other_optimizers_are_left_alone(optimizer):
    ours = model(torch.ones(SIZE))
    own = optimizer(ours.parameters(), lr=0.1)
    steps = EntrySteps(own, ours)
    assert steps.shares(ours.p) == []  # nor before the first step of any
    ours.p.grad = torch.ones(SIZE)
    own.step()
    before = ours.p.detach().clone()
    assert steps.shares(ours.p) == []
    steps.correct()
    assert torch.equal(ours.p, before)


@pytest.mark.parametrize(("own_steps", "length"), [(True, 1.0), (False, 0.1 / math.sqrt(0.001))])
def test_the_first_step_of_a_reset_unit_is_as_long_as_said(own_steps, length):
    sample = make("none", dtype=torch.float64)
    reset = UnitReset(sample.context, own_steps=own_steps)

    def step():
        for p in sample.model.parameters():
            p.grad = torch.ones_like(p)
        sample.optimizer.step()
        reset.after_step()

    for _ in range(200):
        step()
    chosen = [torch.zeros(0, dtype=torch.int64) for _ in sample.context.units]
    chosen[0] = torch.tensor([4])
    reset.reset(chosen)
    before = sample.copy()
    step()
    moved = {name: (before[name] - now) / 1e-2 for name, now in sample.copy().items()}
    correction = 1.0 if own_steps else math.sqrt(1 - 0.999**201) / (1 - 0.9**201)
    for entries in (
        moved["layers.0.incoming.weight"][4],
        moved["layers.0.incoming.bias"][4],
        moved["layers.1.incoming.weight"][:, 4],
    ):
        assert torch.allclose(entries, torch.full_like(entries, length * correction), rtol=1e-5)
    assert torch.allclose(moved["layers.0.incoming.bias"][:4], torch.ones(4, dtype=torch.float64), rtol=1e-5)


@pytest.mark.parametrize("method", ["redo", "continual-backprop"])
@pytest.mark.parametrize("own_steps", [True, False])
def test_methods_take_it_as_an_option(method, own_steps):
    options = {"strength": 1.0, "period": 1} if method == "redo" else {"strength": 0.5, "maturity": 0}
    sample = make(method, own_steps=own_steps, **options)
    sample.train(range(4))
    kept = sample.method.state_dict()["reset"]
    assert ("steps" in kept) == own_steps
    if own_steps:
        assert kept["steps"]["shares"].keys() >= {"layers.0.incoming.weight", "head.weight"}
