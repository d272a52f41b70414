"""Small models and batches to measure."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spectral_ops.continual.models import build_model

SMALL = {
    "mlp": {"hidden": (6, 5)},
    "conv": {"channels": (3, 4), "hidden": (5,)},
    "resnet18": {"width": 4},
    "vit-tiny": {"depth": 2, "width": 12, "heads": 2},
}
OF_WEIGHTS = ("sigma", "effective_rank", "stable_rank", "weight_norm", "gradient_norm")
OF_UNITS = ("dormant", "duplicate", "feature_rank")


def small(name: str, **options) -> nn.Module:
    return build_model(name, (1, 8, 8), 3, **SMALL[name], **options)


def batch(count: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 1, 8, 8), torch.randint(3, (count,))


def entropy_rank(values: Tensor) -> float:
    p = values[values > 0] / values.sum()
    return math.exp(-(p * p.log()).sum().item())
