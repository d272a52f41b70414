"""What `probe` says of layers of units: each measure against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measured import OF_UNITS, entropy_rank
from torch import Tensor, nn

from spectral_ops.continual.measures import activations, probe
from spectral_ops.continual.units import Units


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
    monkeypatch.setattr(activations, "ROWS", rows)
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
