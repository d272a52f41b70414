"""The measures of a network: each against its formula, and that looking leaves no trace."""

from __future__ import annotations

import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits, with_values
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from spectral_ops.continual import measures
from spectral_ops.continual.measures import effective_rank, probe, singular_values
from spectral_ops.continual.models import build_model
from spectral_ops.continual.units import Units

SMALL = {
    "mlp": {"hidden": (6, 5)},
    "conv": {"channels": (3, 4), "hidden": (5,)},
    "resnet18": {"width": 4},
    "vit-tiny": {"depth": 2, "width": 12, "heads": 2},
}
OF_WEIGHTS = ("sigma", "effective_rank", "stable_rank", "weight_norm", "gradient_norm")
OF_UNITS = ("dormant", "duplicate", "feature_rank")
KEYS = ("loss", "accuracy", *OF_WEIGHTS, *OF_UNITS, "gradient_diversity")


def small(name: str, **options) -> nn.Module:
    return build_model(name, (1, 8, 8), 3, **SMALL[name], **options)


def batch(count: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 8, 8), torch.randint(3, (count,))


def entropy_rank(values: Tensor) -> float:
    p = values[values > 0] / values.sum()
    return math.exp(-(p * p.log()).sum().item())


class Given(nn.Module):
    """A layer of units whose activations are what it is given, so that a test can choose them."""

    def __init__(self, features: int, dim: int = 1, copies: int = 1):
        super().__init__()
        self.incoming, self.activation = nn.Linear(1, features // copies), nn.Identity()
        self.outgoing = nn.Linear(features, 2)
        self.dim, self.copies = dim, copies

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(x).movedim(self.dim, -1)
        return self.outgoing(h.reshape(len(h), -1, h.shape[-1]).mean(1))

    def units(self) -> list[Units]:
        return [Units("layer", self.incoming, self.activation, self.outgoing, dim=self.dim, copies=self.copies)]


def of_activations(h: Tensor, dim: int = 1, copies: int = 1, **options) -> dict[str, float]:
    found = probe(Given(h.shape[dim], dim, copies), (h, torch.zeros(len(h), dtype=torch.int64)), **options)
    return {name: found[name]["layer"] for name in OF_UNITS}


# ---- each measure against its formula ----


def test_what_is_measured_is_what_the_log_says():
    assert tuple(probe(small("mlp"), batch())) == KEYS


def test_loss_and_accuracy():
    model, (x, y) = small("mlp"), batch()
    found, scores = probe(model, (x, y)), model(x)
    assert found["loss"] == F.cross_entropy(scores, y).item()
    assert found["accuracy"] == (scores.argmax(1) == y).double().mean().item()
    assert probe(nn.Linear(4, 1), (torch.randn(3, 4), torch.randn(3, 1)), loss=F.mse_loss)["accuracy"] is None


def test_weights_of_known_singular_values():
    model = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(with_values("probe", 4, 6, [4.0, 2.0, 1.0]))
    found = probe(model, (torch.randn(5, 6), torch.randint(4, (5,))))
    assert found["sigma"]["weight"] == pytest.approx(4, rel=1e-6)
    assert found["stable_rank"]["weight"] == pytest.approx(21 / 16, rel=1e-6)
    assert found["weight_norm"]["weight"] == pytest.approx(21**0.5, rel=1e-6)
    shares = [4 / 7, 2 / 7, 1 / 7]
    assert found["effective_rank"]["weight"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 6, 4), (1, 7)])
def test_singular_values(dtype, shape):
    w = torch.randn(shape).to(dtype)
    truth = torch.linalg.svdvals(w.double())
    found = singular_values(w)
    assert found.dtype == torch.float64 and found.shape == truth.shape
    # Through the Gram matrix an absolute error of the root of float64's eps: measured 1e-15 on these, well conditioned.
    assert (found - truth).abs().max() <= 1e-12 * truth.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_that_is_not_there_is_not_counted(dtype):
    w = torch.zeros(40, 30, dtype=dtype)
    w[:, 0] = torch.randint(1, 9, (40,)).to(dtype)  # exactly of rank one, and its Gram matrix too
    w[:, 1:] = w[:, :1] * torch.randint(1, 9, (29,)).to(dtype)
    assert abs(effective_rank(singular_values(w)).item() - 1) <= 1e-12
    assert effective_rank(torch.ones(7, dtype=torch.float64)).item() == pytest.approx(7)
    assert effective_rank(torch.zeros(7)).isnan()


def test_gradient_norms():
    model, (x, y) = small("mlp"), batch()
    model.head.weight.requires_grad_(False)
    found = probe(model, (x, y))["gradient_norm"]
    F.cross_entropy(model(x), y).backward()
    for layer in ("layers.0.incoming", "layers.1.incoming"):
        grad = model.get_submodule(layer).weight.grad
        assert found[f"{layer}.weight"] == pytest.approx(grad.norm().item(), rel=1e-5)
    assert found["head.weight"] is None and set(found) == {
        "head.weight",
        *(f"layers.{i}.incoming.weight" for i in (0, 1)),
    }


def test_a_weight_that_the_loss_does_not_reach_has_a_gradient_of_zero():
    model = nn.Linear(3, 2)
    model.extra = nn.Linear(3, 2)
    assert probe(model, (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)))["gradient_norm"]["extra.weight"] == 0


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])  # beyond 1e-12..1e15 the norm is taken in float64
@pytest.mark.parametrize("shape", [(), (5,), (300, 40)])
def test_norms_of_gradients_hold_what_float32_squares_do_not(scale, shape):
    x = scale * torch.randn(shape)
    assert measures._norm(x) == pytest.approx(x.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["mlp", "conv", "vit-tiny", "resnet18"])
def test_gradient_diversity_is_that_of_the_gradients_taken_one_by_one(name, monkeypatch):
    options = {"norm": "group"} if name == "resnet18" else {}
    model, (x, y) = small(name, **options).double(), batch(5)
    x = x.double()
    gradients = []
    for i in range(5):
        taken = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        gradients.append(torch.cat([g.flatten() for g in taken]))
    stacked = torch.stack(gradients)
    truth = (stacked.square().sum() / stacked.sum(0).square().sum()).item()
    assert probe(model, (x, y))["gradient_diversity"] == pytest.approx(truth, rel=1e-9)
    # Three chunks, the last one shorter.
    monkeypatch.setattr(measures, "SAMPLE_GRADIENTS", 2 * stacked.shape[1])
    assert probe(model, (x, y))["gradient_diversity"] == pytest.approx(truth, rel=1e-9)


def test_gradient_diversity_of_samples_that_agree_and_of_orthogonal_ones():
    model = nn.Linear(4, 1, bias=False)
    total = partial(_product, torch.ones(1))
    agree = probe(model, (torch.ones(6, 4), torch.ones(6)), loss=total)
    apart = probe(model, (torch.eye(4), torch.ones(4)), loss=total)
    assert agree["gradient_diversity"] == pytest.approx(1 / 6) and apart["gradient_diversity"] == pytest.approx(1)
    opposed = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    assert probe(model, (opposed, torch.ones(2)), loss=total)["gradient_diversity"] is None  # infinite


def _product(scale: Tensor, scores: Tensor, y: Tensor) -> Tensor:
    return (scale * scores[:, 0] * y).mean()


def test_dormant_units():
    h = torch.tensor([[1.0, 0.0, 0.06, -1.0], [-1.0, 0.0, 0.0, 1.0]])  # mean |h| 1, 0, 0.03, 1: of their mean 1.97, ...
    assert of_activations(h)["dormant"] == 0.25
    assert of_activations(h, dormant=0.06)["dormant"] == 0.5
    assert of_activations(torch.zeros(3, 4))["dormant"] == 1


def test_duplicate_units():
    a, b = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([1.0, -2.0, 5.0, 0.0])
    zero = torch.zeros(4)
    h = torch.stack([a, b, 2 * a, -a, zero, 0.5 * a, zero], 1)  # of 7, two repeat a; what is opposed or silent does not
    assert of_activations(h)["duplicate"] == pytest.approx(2 / 7)
    near = torch.stack([a, a + 0.1 * b], 1)
    cosine = F.cosine_similarity(near[:, 0], near[:, 1], 0).item()
    assert of_activations(near, duplicate=cosine - 1e-6)["duplicate"] == 0.5
    assert of_activations(near, duplicate=cosine + 1e-6)["duplicate"] == 0


def test_the_two_sides_of_a_unit_are_one_vector():
    # CReLU's features: units 0 and 1 agree where they are positive, and only there.
    x = torch.tensor([[1.0, 1.0], [-1.0, -3.0], [-2.0, -1.0], [2.0, 2.0]])
    h = torch.cat((x, -x), 1).relu()  # (4, 4): both sides of unit 0 are in columns 0 and 2
    cosine = F.cosine_similarity(x[:, 0], x[:, 1], 0).item()
    assert of_activations(h, copies=2, duplicate=cosine - 1e-6)["duplicate"] == 0.5
    assert of_activations(h, copies=2, duplicate=cosine + 1e-6)["duplicate"] == 0
    assert of_activations(h)["duplicate"] == 0.25  # as four units: columns 0 and 1 are the same
    silent = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    assert of_activations(torch.cat((silent, -silent), 1).relu(), copies=2)["dormant"] == 0.5


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 5, 2, 4), (6, 3, 8)])
@pytest.mark.parametrize("rows", [4, 1 << 14])  # in several blocks, and in one
def test_feature_rank(shape, rows, monkeypatch):
    monkeypatch.setattr(measures, "ROWS", rows)
    dim = -1 if len(shape) == 3 else 1
    h = torch.randn(shape)
    flat = h.movedim(dim, -1).reshape(-1, h.shape[dim]).double()  # samples and positions by features
    found = of_activations(h, dim)
    assert found["feature_rank"] == pytest.approx(entropy_rank(torch.linalg.svdvals(flat)), rel=1e-6)


def test_units_of_conv_layers_and_tokens_are_compared_over_positions():
    images = torch.randn(3, 4, 2, 2)
    images[:, 2] = 3 * images[:, 0]
    images[:, 1] = 0
    tokens = images.flatten(2).mT  # (N, T, F)
    for h, dim in ((images, 1), (tokens, -1)):
        found = of_activations(h, dim)
        assert found["dormant"] == 0.25 and found["duplicate"] == 0.25


# ---- how weights are read ----


def test_conv_weights_are_reshaped_and_groups_are_matrices_of_their_own():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = probe(model, (torch.randn(3, 4, 8, 8), torch.randint(4, (3,))))
    whole = torch.linalg.svdvals(model[0].weight.flatten(1).double())
    halves = torch.linalg.svdvals(model[1].weight.view(2, 2, -1).double())
    assert found["sigma"] == pytest.approx({"0.weight": whole[0].item(), "1.weight": halves.max().item()}, rel=1e-6)
    ranks = [entropy_rank(values) for values in halves.detach()]
    assert found["effective_rank"]["1.weight"] == pytest.approx(sum(ranks) / 2, rel=1e-6)
    stable = (halves.square().sum(1) / halves[:, 0].square()).mean().item()
    assert found["stable_rank"]["1.weight"] == pytest.approx(stable, rel=1e-6)
    assert found["weight_norm"]["1.weight"] == pytest.approx(model[1].weight.norm().item(), rel=1e-6)


def test_packed_queries_keys_and_values_are_three_matrices():
    model = small("vit-tiny")
    with torch.no_grad():
        model.blocks[1].attention.in_proj_weight[12:24] *= 50  # the keys alone
    found = probe(model, batch())
    for i, block in enumerate(model.blocks):
        values = torch.linalg.svdvals(block.attention.in_proj_weight.view(3, 12, 12).double())
        assert found["sigma"][f"blocks.{i}.attention.in_proj_weight"] == pytest.approx(values.max().item(), rel=1e-6)
    assert "positions" not in found["sigma"] and "class_token" not in found["sigma"]
    assert list(found["dormant"]) == ["blocks.0.fc1", "blocks.1.fc1"]


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    (x, y) = torch.randn(4, 3), torch.randint(3, (4,))
    found = probe(model, (x, y))
    F.cross_entropy(model(x), y).backward()
    assert list(found["sigma"]) == ["0.weight"]
    assert found["gradient_norm"]["0.weight"] == pytest.approx(model[0].weight.grad.norm().item(), rel=1e-5)


def test_a_parametrized_weight_is_measured_as_it_is_used():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5), n_power_iterations=50), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(7)
    found = probe(model, (torch.randn(4, 6), torch.randint(2, (4,))))
    assert found["sigma"]["0.weight"] == pytest.approx(1, rel=1e-4) and found["gradient_norm"]["0.weight"] > 0
    assert list(found["sigma"]) == ["1.weight", "0.weight"]


def test_a_recurrent_network_computes_with_what_is_measured():
    model = nn.LSTM(3, 4, batch_first=True)
    (x, y) = torch.randn(5, 6, 3), torch.randint(4, (5,))
    loss = lambda output, y: F.cross_entropy(output[0][:, -1], y)  # noqa: E731
    held = list(model._flat_weights)
    found = probe(model, (x, y), loss=loss)
    assert all(a is b for a, b in zip(model._flat_weights, held, strict=True)) and found["accuracy"] is None
    loss(model(x), y).backward()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert found["gradient_norm"][name] == pytest.approx(getattr(model, name).grad.norm().item(), rel=1e-5)


# ---- models that do not do everything ----


def test_batch_norm_in_training_has_no_gradients_of_single_samples():
    model, some = small("resnet18"), batch()
    assert probe(model, some)["gradient_diversity"] is None
    assert probe(model.eval(), some)["gradient_diversity"] > 0


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_running_statistics_has_none_either(training):
    """vmap would map it: a sample alone, normalised by itself, which is not what is trained."""
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Linear(72, 3)]
    assert probe(nn.Sequential(*layers).train(training), batch())["gradient_diversity"] is None


class Looks(nn.Module):
    """Its path depends on the numbers, which vmap refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else 2 * x


class RefusesOne(nn.Module):
    """As nn.InstanceNorm1d in training, and others, refuse what has a single value to take a mean of."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise ValueError("Expected more than 1 sample")
        return x - x.mean(0)


@pytest.mark.parametrize("layer", [Looks(), RefusesOne()], ids=lambda layer: type(layer).__name__)
def test_a_model_that_cannot_be_mapped_has_no_gradient_diversity(layer):
    found = probe(nn.Sequential(nn.Linear(4, 3), layer), (torch.randn(5, 4), torch.randint(3, (5,))))
    assert found["gradient_diversity"] is None and found["loss"] > 0


def test_a_want_of_memory_is_not_taken_for_a_model_that_cannot_be_mapped(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(measures, "vmap", lambda *args, **kwargs: fail)
    with pytest.raises(torch.OutOfMemoryError):
        probe(small("conv"), batch())


def test_dropout_is_drawn_for_every_sample_anew():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1, bias=False))
    same = (torch.ones(8, 50), torch.ones(8))
    found = probe(model, same, loss=partial(_product, torch.ones(1)))["gradient_diversity"]
    # Masks that agree would give 1/8 exactly; independent ones E|g|^2 / (E|g|^2 + 7 |E g|^2) / 8 * 8 = 2 / 9.
    assert 0.18 <= found <= 0.26


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


def test_a_weight_of_zeros_has_a_sigma_and_no_rank():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    found = probe(model, (torch.randn(4, 3), torch.randint(2, (4,))))
    assert found["sigma"]["weight"] == found["weight_norm"]["weight"] == 0
    assert found["effective_rank"]["weight"] is found["stable_rank"]["weight"] is None


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
