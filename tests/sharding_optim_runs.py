"""What the tests of SpectralAdamW on sharded models do on every rank: an optimizer, gradients, what it holds."""

from __future__ import annotations

from typing import Any

import torch
from helpers import gaussian
from sharding_models import like, whole
from torch import Tensor, nn

from spectral_ops import SpectralAdamW


def optimizer_of(model: Any, **options: Any) -> SpectralAdamW:
    groups = options.pop("groups", False)
    parameters: Any = list(model.parameters())
    if groups:  # of different strength and target
        parameters = [
            {"params": parameters[::2]},
            {"params": parameters[1::2], "strength": torch.tensor(0.1), "target": 0.5, "lr": 0.02},
        ]
    return SpectralAdamW(parameters, lr=0.01, model=model, strength=0.3, rules=model.rules, **options)


def pull(model: nn.Module, step: int, without: tuple[str, ...] = ("norm",)) -> None:
    """Gradients out of thin air; some parameters have none."""
    for name, p in model.named_parameters():
        p.grad = None if name.startswith(without) else like(p, 0.1 * gaussian(f"{name}{step}", *p.shape))


def vectors_of(optimizer: SpectralAdamW) -> dict[str, Tensor]:
    found = optimizer.spectral_state_dict()
    return {f"{key} of {name}": x for key, entries in found.items() for name, x in entries.items()}


def moments_of(model: nn.Module, optimizer: SpectralAdamW) -> dict[str, Tensor]:
    return {
        f"{key} of {name}": whole(x)
        for name, p in model.named_parameters()
        for key, x in optimizer.state.get(p, {}).items()
    }


def trained(model: Any, optimizer: SpectralAdamW, steps: range) -> None:
    for step in steps:
        pull(model, step)
        optimizer.step()
