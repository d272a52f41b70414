"""What `probe` says of weights: each measure against its formula, and which weights are read how."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import with_values
from measured import batch, entropy_rank, small
from torch import nn
from torch.nn.utils import parametrizations

from spectral_ops.continual.measures import probe
from spectral_ops.continual.measures.norms import norm
from spectral_ops.continual.measures.spectra import effective_rank, singular_values


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
    assert norm(x) == pytest.approx(x.double().norm().item(), rel=1e-6)


def test_a_weight_of_zeros_has_a_sigma_and_no_rank():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    found = probe(model, (torch.randn(4, 3), torch.randint(2, (4,))))
    assert found["sigma"]["weight"] == found["weight_norm"]["weight"] == 0
    assert found["effective_rank"]["weight"] is found["stable_rank"]["weight"] is None


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
