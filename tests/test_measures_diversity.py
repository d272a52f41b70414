"""Gradient diversity: that of the gradients of single samples, one by one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from measured import batch, small
from torch import Tensor, nn

from spectral_ops.continual.measures import diversity, probe


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
    monkeypatch.setattr(diversity, "SAMPLE_GRADIENTS", 2 * stacked.shape[1])
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

    monkeypatch.setattr(diversity, "vmap", lambda *args, **kwargs: fail)
    with pytest.raises(torch.OutOfMemoryError):
        probe(small("conv"), batch())


def test_dropout_is_drawn_for_every_sample_anew():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1, bias=False))
    same = (torch.ones(8, 50), torch.ones(8))
    found = probe(model, same, loss=partial(_product, torch.ones(1)))["gradient_diversity"]
    # Masks that agree would give 1/8 exactly; independent ones E|g|^2 / (E|g|^2 + 7 |E g|^2) / 8 * 8 = 2 / 9.
    assert 0.18 <= found <= 0.26
