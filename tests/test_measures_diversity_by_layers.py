"""Gradient diversity by layers, where the gradients of single samples need not be made."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from spectral_ops.continual.measures import diversity, probe
from spectral_ops.continual.models import build_model
from spectral_ops.continual.models.activations import ACTIVATIONS
from spectral_ops.continual.models.mlp import MLP

SHAPE, CLASSES, SAMPLES = (1, 5, 5), 4, 9


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, *SHAPE, generator=generator), torch.randint(CLASSES, (SAMPLES,), generator=generator)


def mlp(**options):
    return build_model("mlp", SHAPE, CLASSES, **{"hidden": (8, 6), **options})


def one_by_one(model, x, y):
    """sum ||g_i||^2 / ||sum g_i||^2 in float64."""
    model = model.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1]), trained)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    stacked = torch.stack(rows)
    return (stacked.square().sum() / stacked.sum(0).square().sum()).item()


def refuse(*args, **kwargs):
    raise AssertionError("gradients of single samples were made")


KINDS = [{"activation": activation, "norm": norm} for activation in ACTIVATIONS for norm in ("none", "layer")]
KINDS += [{"norm": "layer-plain"}, {"hidden": ()}]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_mlp(batch, options, monkeypatch):
    monkeypatch.setattr(diversity, "vmap", refuse)
    model = mlp(**options)
    for p in model.parameters():  # norms begin as ones and zeros
        p.data += 0.3 * torch.randn_like(p)
    found = probe(model, batch)["gradient_diversity"]
    # float32's forward and backward pass, 1e-7 a layer; sums are of float64.
    assert found == pytest.approx(one_by_one(model, *batch), rel=1e-5)


@pytest.mark.parametrize("frozen", ["layers.0.incoming.weight", "layers.0", "layers.1.incoming.bias", "layers", "head"])
def test_frozen_parameters_do_not_count(batch, frozen, monkeypatch):
    monkeypatch.setattr(diversity, "vmap", refuse)
    model = mlp(norm="layer")
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    assert probe(model, batch)["gradient_diversity"] == pytest.approx(one_by_one(model, *batch), rel=1e-5)


def test_gradients_that_nearly_cancel(batch):
    """The sum of nine gradients is 1e-4 of one: what float32 sums would lose."""
    x, y = batch
    model = mlp(hidden=())
    opposed = torch.cat([x, -(1 + 1e-4) * x])
    with torch.no_grad():
        model.head.weight.zero_(), model.head.bias.zero_()
    model.head.bias.requires_grad_(False)  # its gradients do not cancel
    twice = torch.cat([y, y])
    assert probe(model, (opposed, twice))["gradient_diversity"] == pytest.approx(
        one_by_one(model, opposed, twice), rel=1e-6
    )


class Shared(MLP):
    """Its first layer is used twice."""

    by_rows = True

    def forward(self, x):
        layer = self.layers[0]
        return self.head(layer(layer(x.flatten(1))))


class Own(MLP):
    def forward(self, x):
        return super().forward(x)


WHY = ["a layer used twice", "a parametrization", "not said to be by rows", "a forward of its own", "another loss"]


@pytest.mark.parametrize("why", WHY)
def test_what_layers_do_not_tell_is_left_to_single_samples(batch, why, monkeypatch):
    x, y = batch
    model, loss = mlp(hidden=(25,)), F.cross_entropy
    if why == "a layer used twice":
        model = Shared(SHAPE, CLASSES, hidden=(25,))
    if why == "a forward of its own":
        model = Own(SHAPE, CLASSES, hidden=(25,))
    if why == "a parametrization":
        spectral_norm(model.head)
        model.eval()
    if why == "not said to be by rows":
        monkeypatch.setattr(MLP, "by_rows", False)
    if why == "another loss":

        def loss(scores, y):
            return F.cross_entropy(scores, y)

    made, true = [], diversity.vmap

    def vmap(*args, **kwargs):
        made.append(True)
        return true(*args, **kwargs)

    monkeypatch.setattr(diversity, "vmap", vmap)
    found = probe(model, (x, y), loss=loss)["gradient_diversity"]
    assert made and found == pytest.approx(one_by_one(model, x, y), rel=1e-5)


def test_a_sample_that_the_loss_ignores_does_not_count(batch, monkeypatch):
    monkeypatch.setattr(diversity, "vmap", refuse)
    (x, y), model = batch, mlp()
    others = torch.arange(SAMPLES) != 2
    without = probe(model, (x[others], y[others]))["gradient_diversity"]
    assert probe(model, (x, y.where(others, -100)))["gradient_diversity"] == pytest.approx(without, rel=1e-6)


def test_nothing_is_left_behind(batch):
    model = mlp(norm="layer")
    before = {name: p.clone() for name, p in model.named_parameters()}
    probe(model, batch)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Module))
