"""All measures of a network: what the log has, models that do not do everything, and that looking leaves no trace."""

from __future__ import annotations

import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from measured import OF_UNITS, OF_WEIGHTS, SMALL, batch, small
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from spectral_ops.continual.measures import probe
from spectral_ops.continual.units import Units

KEYS = ("loss", "accuracy", *OF_WEIGHTS, *OF_UNITS, "gradient_diversity")


def test_what_is_measured_is_what_the_log_says():
    assert tuple(probe(small("mlp"), batch())) == KEYS


def test_loss_and_accuracy():
    model, (x, y) = small("mlp"), batch()
    found, scores = probe(model, (x, y)), model(x)
    assert found["loss"] == F.cross_entropy(scores, y).item()
    assert found["accuracy"] == (scores.argmax(1) == y).double().mean().item()
    assert probe(nn.Linear(4, 1), (torch.randn(3, 4), torch.randn(3, 1)), loss=F.mse_loss)["accuracy"] is None


def test_without_units_without_parameters_and_all_frozen():
    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    assert probe(small("mlp"), batch(), units=[])["dormant"] == {}
    empty = probe(nn.Identity(), (x, y))
    assert empty["sigma"] == {} and empty["gradient_diversity"] is None and empty["loss"] > 0
    frozen = probe(nn.Linear(3, 3).requires_grad_(False), (x, y))
    assert frozen["gradient_norm"] == {"weight": None} and frozen["gradient_diversity"] is None
    assert frozen["sigma"]["weight"] > 0
    no_inputs = nn.Linear(1, 3)
    no_inputs.weight = nn.Parameter(torch.empty(3, 0))
    assert probe(no_inputs, (torch.empty(4, 0), y))["sigma"] == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_none_and_the_rest_is_there(value):
    model = small("mlp")
    with torch.no_grad():
        model.layers[1].incoming.weight[2, 3] = value
    found = probe(model, batch())
    json.dumps(found, allow_nan=False)
    broken, sound = "layers.1.incoming", "layers.0.incoming"
    for key in OF_WEIGHTS[:4]:
        assert found[key][f"{broken}.weight"] is None and found[key][f"{sound}.weight"] > 0
    for key in OF_UNITS:
        assert found[key][broken] is None and found[key][sound] is not None
    assert found["loss"] is None and found["gradient_diversity"] is None


# ---- no trace ----


def state_of(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[object]]:
    """All that could change: tensors, to be compared bit for bit, and everything else."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += inputs
    kept: list[object] = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    kept += [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), [t._version for t in tensors]]
    kept += [[id(p) for p in (*model.parameters(), *model.buffers())], [p.requires_grad for p in model.parameters()]]
    for module in model.modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        kept += [module.training, list(vars(module)), getattr(module, "calls", 0), hooks]
    return [t.detach().clone() for t in tensors], kept


class Restless(nn.Module):
    """Draws from every source there is, counts its calls and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x
        return x * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


def restless() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), Restless(), nn.Linear(9, 3)]
    return nn.Sequential(*layers)


def normalised() -> nn.Module:
    model = small("mlp")
    parametrizations.spectral_norm(model.layers[0].incoming)  # a step of its power iteration with every look
    return model


BUILDERS = [*(partial(small, name) for name in SMALL), restless, normalised]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDERS, ids=[*SMALL, "restless", "normalised"])
def test_no_trace_is_left(build, training):
    model, some = build().train(training), batch()
    F.cross_entropy(model(some[0]), some[1]).backward()
    ran = []
    handle = next(p for p in model.parameters()).register_hook(lambda grad: ran.append(grad))
    tensors, kept = state_of(model, some)
    first = probe(model, some)
    after, kept_after = state_of(model, some)
    assert all(same_bits(a, b) for a, b in zip(tensors, after, strict=True)) and kept == kept_after
    assert not ran  # a parameter's hooks see the training's gradients alone
    assert probe(model, some) == first  # the same draws, the same running statistics
    handle.remove()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_the_caller_has_switched_off(guard):
    model, some = small("mlp"), batch()
    truth = probe(model, some)
    with guard():
        assert probe(model, (some[0].clone(), some[1].clone())) == truth
        made_here = small("mlp")  # under inference_mode of tensors that autograd refuses
        assert probe(made_here, some)["gradient_diversity"] > 0
        assert guard is torch.no_grad or torch.is_inference_mode_enabled()


def test_a_model_is_left_alone_when_it_raises():
    model, some = normalised(), batch()
    tensors, kept = state_of(model, some)
    wrong = Units("wrong", model.layers[0].incoming, model.layers[1].activation, model.head)
    with pytest.raises(ValueError, match="to have 6 features"):
        probe(model, some, units=[wrong])
    after, kept_after = state_of(model, some)
    assert all(same_bits(a, b) for a, b in zip(tensors, after, strict=True)) and kept == kept_after


# ---- errors ----


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(3, 4), TypeError, "two tensors, inputs and targets, got Tensor. Write"),
        ((torch.zeros(3, 4), [0, 1, 2]), TypeError, "two tensors, inputs and targets, got tuple"),
        ((torch.zeros(3, 4), torch.zeros(2)), ValueError, r"one length >= 1, got shapes \(3, 4\) and \(2,\)"),
        ((torch.zeros(0, 4), torch.zeros(0)), ValueError, r"one length >= 1, got shapes \(0, 4\)"),
        ((torch.zeros(()), torch.zeros(())), ValueError, r"one length >= 1, got shapes \(\) and \(\)"),
    ],
)
def test_a_batch_that_is_none_is_refused(given, error, message):
    with pytest.raises(error, match=f"probe: expected .*{message}"):
        probe(nn.Linear(4, 3), given)


def test_a_loss_that_is_not_one_number_is_refused():
    with pytest.raises(ValueError, match=r"expected loss to give one number, got shape \(7,\). Take the mean"):
        probe(small("mlp"), batch(), loss=partial(F.cross_entropy, reduction="none"))


def test_units_that_are_not_in_the_model_are_refused():
    model = small("mlp")
    elsewhere = Units("elsewhere", model.head, nn.ReLU(), model.head)
    with pytest.raises(ValueError, match="to call the activation of units 'elsewhere', got none. Name"):
        probe(model, batch(), units=[*model.units(), elsewhere])
    wrong = Units("wrong", model.head, model.layers[0].activation, model.head)
    with pytest.raises(ValueError, match=r"'wrong' to have 3 features, got shape \(7, 6\) with 6 along dimension 1"):
        probe(model, batch(), units=[wrong])
