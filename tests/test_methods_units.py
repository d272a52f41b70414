"""Methods that make single units anew: which units, what of them, and what is left of the optimizer's memory."""

import math
from copy import deepcopy

import pytest
import torch
from method_samples import MODELS, Sample, batch, changed, equal, make

from spectral_ops.continual.methods.activations import MeanActivations
from spectral_ops.continual.methods.optimizer_state import moments
from spectral_ops.continual.methods.unit_reset import UnitReset

WITH_UNITS = [model for model in MODELS if model != "linear"]


def none_chosen(sample: Sample) -> list[torch.Tensor]:
    return [torch.zeros(0, dtype=torch.int64) for _ in sample.context.units]


def choose(sample: Sample, layer: int, *index: int) -> list[torch.Tensor]:
    chosen = none_chosen(sample)
    chosen[layer] = torch.tensor(index)
    return chosen


# ---- activations ----


@pytest.mark.parametrize("model", WITH_UNITS)
def test_mean_activations_are_those_of_the_last_pass_of_training(model):
    sample = make("none", model)
    units = sample.context.units
    activations, seen = MeanActivations(units), {}
    for layer, unit in enumerate(units):
        unit.activation.register_forward_hook(lambda m, a, output, layer=layer: seen.update({layer: output}))
    sample.model.train()
    sample.model(batch(0)[0])
    sample.model(batch(1)[0])
    for layer, (unit, mean) in enumerate(zip(units, activations.means(), strict=True)):
        flat = seen[layer].abs().movedim(unit.dim, -1).flatten(0, -2).mean(0)
        assert mean.shape == (unit.copies, unit.count) and not mean.requires_grad
        assert torch.allclose(mean.flatten(), flat, rtol=1e-5, atol=1e-7)
    before = [mean.clone() for mean in activations.means()]
    sample.model.eval()
    sample.model(batch(2)[0])
    sample.model.train()
    activations.recording = False
    sample.model(batch(2)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, activations.means(), strict=True))


def test_a_copy_of_the_model_records_for_itself():
    sample = make("none")
    activations = MeanActivations(sample.context.units)
    sample.model(batch(0)[0])
    before = [mean.clone() for mean in activations.means()]
    deepcopy(sample.model)(batch(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, activations.means(), strict=True))


# ---- resetting a unit ----


@pytest.mark.parametrize("model", WITH_UNITS)
def test_a_reset_unit_is_fresh_and_all_others_are_as_they_were(model):
    sample = make("none", model)
    sample.train(range(3))
    reset, before = UnitReset(sample.context, own_steps=False), sample.copy()
    layer = len(sample.context.units) - 2
    units = sample.context.units[layer]
    reset.reset(choose(sample, layer, 1, 3 % units.count))
    after, fresh, gone = sample.copy(), sample.context.initialize(1), sorted({1, 3 % units.count})
    names = {id(tensor): name for name, tensor in sample.model.state_dict(keep_vars=True).items()}
    wanted = dict(before)
    for module in (units.incoming, units.norm):
        for tensor in (*module.parameters(), *module.buffers()) if module is not None else ():
            if tensor.ndim:
                wanted[names[id(tensor)]] = before[names[id(tensor)]].clone()
                wanted[names[id(tensor)]][gone] = fresh[names[id(tensor)]][gone]
    outgoing = wanted[names[id(units.outgoing.weight)]].clone()
    features = outgoing.shape[1] // units.copies // units.count  # of a flattened map
    for copy in range(units.copies):
        for i in gone:
            start = (copy * units.count + i) * features
            outgoing[:, start : start + features] = 0
    wanted[names[id(units.outgoing.weight)]] = outgoing
    assert equal(after, wanted)
    if model == "resnet18":
        running = {name for name in changed(before, after) if "running" in name}
        assert len(running) == 2


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd-momentum"])
def test_moments_of_a_reset_unit_are_zero_and_step_counters_stay(optimizer):
    sample = make("none", "conv-crelu", optimizer=optimizer)
    sample.train(range(3))
    units = sample.context.units[1]  # its outgoing layer reads flattened maps of both copies
    held = sample.optimizer.state
    before = {p: [m.clone() for m in moments(sample.optimizer, p)] for p in held}
    steps = {p: s["step"].clone() for p, s in held.items() if "step" in s}
    UnitReset(sample.context, own_steps=False).reset(choose(sample, 1, 2))
    weight = units.outgoing.weight
    kept = len(moments(sample.optimizer, weight))
    assert kept == (1 if optimizer.startswith("sgd") else 2)
    own = {units.incoming.weight, units.incoming.bias, units.norm.weight, units.norm.bias}
    for p, olds in before.items():
        for now, old in zip(moments(sample.optimizer, p), olds, strict=True):
            wanted = old.clone()
            if p in own:
                wanted[2] = 0
            elif p is weight:
                units.read_by(wanted)[:, :, 2] = 0
            assert torch.equal(now, wanted) and (torch.equal(wanted, old) == (p not in own and p is not weight))
    assert all(torch.equal(held[p]["step"], steps[p]) for p in steps)


def test_adams_first_step_of_a_reset_entry_is_as_long_as_said():
    sample = make("none", dtype=torch.float64)
    for _ in range(2000):  # until the bias correction is gone
        for p in sample.model.parameters():
            p.grad = torch.ones_like(p)
        sample.optimizer.step()
    UnitReset(sample.context, own_steps=False).reset(choose(sample, 0, 4))
    before = sample.copy()["layers.0.incoming.bias"]
    sample.optimizer.step()
    step = before - sample.copy()["layers.0.incoming.bias"]
    correction = math.sqrt(1 - 0.999**2001)
    assert float(step[4]) == pytest.approx(1e-2 * 0.1 / math.sqrt(0.001) * correction, rel=1e-3)
    assert float(step[3]) == pytest.approx(1e-2, rel=1e-3)


def test_what_two_reset_units_have_between_them_is_zero():
    sample = make("none")
    chosen = [torch.tensor([2]), torch.tensor([5])]
    UnitReset(sample.context, own_steps=False).reset(chosen)
    row = sample.copy()["layers.1.incoming.weight"][5]
    assert float(row[2]) == 0 and (row != 0).sum() == len(row) - 1


def test_no_row_of_a_fresh_network_is_used_twice():
    sample = make("none")
    reset, weight = UnitReset(sample.context, own_steps=False), sample.model.state_dict()["layers.0.incoming.weight"]
    fresh = {task: sample.context.initialize(task)["layers.0.incoming.weight"] for task in (1, 2, 3)}
    for unit, draw in ((0, 1), (1, 1), (0, 2), (1, 2), (1, 3), (0, 3)):
        reset.reset(choose(sample, 0, unit))
        assert torch.equal(weight[unit], fresh[draw][unit]), (unit, draw)


# ---- redo ----


def kill(sample: Sample, layer: int, *index: int) -> None:
    """Units that are 0 for any input."""
    incoming = sample.context.units[layer].incoming
    norm = sample.context.units[layer].norm
    with torch.no_grad():
        for module in (incoming, norm):
            for p in module.parameters() if module is not None else ():
                p[list(index)] = 0


@pytest.mark.parametrize("model", WITH_UNITS)
def test_redo_resets_exactly_the_dead_units_and_the_network_computes_the_same(model):
    sample = make("redo", model, strength=0.0, period=1)
    units = sample.context.units
    kill(sample, 0, 1)
    kill(sample, 1, 0)
    sample.model.train()
    before, scores = sample.copy(), sample.model(batch(3)[0])
    dead = [(mean.sum(0) == 0).nonzero().flatten().tolist() for mean in sample.method._activations.means()]
    assert 1 in dead[0] and 0 in dead[1] and sum(map(len, dead)) < sum(unit.count for unit in units)
    sample.method.after_step()
    after = sample.copy()
    for layer, unit in enumerate(units):
        rows = (before[f"{unit.name}.weight"] != after[f"{unit.name}.weight"]).flatten(1).float().mean(1)
        # A row is anew, all of it but for what came from a reset unit before it.
        assert (rows > 0.5).nonzero().flatten().tolist() == dead[layer]
    if not model.endswith("layer") and model != "conv-crelu":  # LayerNorm mixes units: a new one changes the others
        assert torch.allclose(sample.model(batch(3)[0]), scores, atol=1e-5)


def test_redo_uses_the_threshold_over_the_layers_mean():
    sample = make("redo", strength=0.5, period=1)
    sample.model.train()
    sample.model(batch(0)[0])
    first = sample.method._activations.means()[0][0]
    dormant = (first / first.mean() <= 0.5).nonzero().flatten().tolist()
    assert 0 < len(dormant) < len(first) and any(first[i] > 0 for i in dormant)
    before = sample.copy()["layers.0.incoming.weight"]
    sample.method.after_step()
    rows = (before != sample.copy()["layers.0.incoming.weight"]).any(1)
    assert rows.nonzero().flatten().tolist() == dormant


def test_a_unit_with_two_copies_is_dormant_only_if_both_are():
    sample = make("redo", "conv-crelu", strength=0.0, period=1)
    sample.context.units[0].norm.bias.data[1] = 100.0  # relu(-x) is 0 throughout
    kill(sample, 0, 2)
    sample.train([0])
    assert float(sample.method._activations.means()[0][1, 1]) == 0
    age = sample.method.state_dict()["reset"]["used"][0]
    assert age.tolist() == [False, False, True]


def test_redo_looks_once_a_period():
    sample = make("redo", strength=1.0, period=3)  # 1: units below the mean, some in every layer
    for step in range(7):
        draw = sample.method.state_dict()["reset"]["draw"]
        sample.train([step])
        assert (sample.method.state_dict()["reset"]["draw"] > draw) == (step in (2, 5)), step


# ---- continual backprop ----


def test_the_utility_is_the_running_mean_of_contributions():
    sample = make("continual-backprop", "conv-crelu", strength=0.0, decay=0.8)
    wanted = [torch.zeros(units.count) for units in sample.context.units]
    for step in range(4):
        sample.train([step])
        for utility, units, mean in zip(wanted, sample.context.units, sample.method._activations.means(), strict=True):
            weight = units.outgoing.weight.detach().abs()
            per_feature = weight.flatten(1).sum(0).view(units.copies, units.count, -1).sum(2)
            utility.mul_(0.8).add_(0.2 * (mean * per_feature).sum(0))
    for utility, ours in zip(wanted, sample.method.state_dict()["utility"], strict=True):
        assert float(utility.min()) > 0 and torch.allclose(utility, ours, rtol=1e-5)


@pytest.mark.parametrize(("rate", "maturity"), [(0.01, 0), (0.03, 5), (0.3, 2)])
def test_the_share_of_mature_units_is_replaced_and_they_alone(rate, maturity):
    sample = make("continual-backprop", strength=rate, maturity=maturity)
    width, layer, due, replaced = 9, 0, 0.0, 0
    for step in range(60):
        state = sample.method.state_dict()
        ages = state["age"][layer] + 1
        sample.train([step])
        gone = sample.method.state_dict()["age"][layer] == 0
        due += rate * int((ages > maturity).sum())
        assert bool((ages[gone] > maturity).all())
        replaced += int(gone.sum())
        assert replaced in (int(due - 1e-9), int(due + 1e-9)), step  # a sum of shares that is whole but for rounding
        assert torch.equal(sample.method.state_dict()["age"][layer][~gone], ages[~gone])
    assert replaced >= 0.5 * rate * width * 60 * (1 if maturity == 0 else 0.3) - 1


def test_the_least_useful_mature_units_go_first():
    sample = make("continual-backprop", strength=0.4, maturity=10)
    sample.train(range(10))  # none is mature yet
    assert not any(sample.method._due)
    method = sample.method
    method._age[0][3] = 0
    method._utility[0].copy_(torch.tensor([5.0, 4.0, 90.0, 0.0, 60.0, 1.0, 70.0, 80.0, 2.0]) * 1e3)
    sample.train([10])
    # 8 mature units, 0.4 of them are 3.2; unit 3, the least useful, is too young.
    assert (method._age[0] == 0).nonzero().flatten().tolist() == [1, 5, 8]
    assert method._due[0] == pytest.approx(0.2)
    assert not method._utility[0][[1, 5, 8]].any() and method._age[0][3] == 1


def test_a_network_without_units_trains():
    sample = make("continual-backprop", "linear")
    sample.train(range(2))
    sample = make("redo", "linear", period=1)
    sample.train(range(2))
