"""Small models of the trainer, every kind of them, and images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_ops.continual.models import Model, build_model
from spectral_ops.continual.models.activations import ACTIVATIONS

SHAPES = ((1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 8, 8))
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (6, 5)},
    "conv": {"channels": (3, 4), "hidden": (5, 6)},
    "resnet18": {"width": 4},
    "vit-tiny": {"depth": 2, "width": 12, "heads": 2},
}
NORMS = {"mlp": ("none", "layer", "layer-plain"), "resnet18": ("batch", "group"), "vit-tiny": ("layer", "layer-plain")}
NORMS["conv"] = NORMS["mlp"]

# Every small model with every activation and norm.
VARIANTS = [
    (name, {"activation": activation, "norm": norm})
    for name in SMALL
    for activation in ACTIVATIONS
    for norm in NORMS[name]
]


def describe(value: str | dict[str, str]) -> str:
    return value if isinstance(value, str) else "-".join(value.values())


variants = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=describe)


def small(name: str, shape: tuple[int, ...] = (1, 8, 8), classes: int = 3, **options: Any) -> Model:
    """In float64, with norms moved off 1 and 0, so that none is without effect."""
    model = build_model(name, shape, classes, **SMALL[name], **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def images(shape: tuple[int, ...] = (1, 8, 8), count: int = 4) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64)


def assert_close(ours: Tensor, truth: Tensor) -> None:
    """Measured over five seeds: 2e-14 at most, by the ResNet."""
    assert ours.shape == truth.shape and (ours - truth).abs().max() <= 1e-12 * (1 + truth.abs().max())
