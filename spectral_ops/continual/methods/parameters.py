"""What the methods act on: parameters with their gradients, and the matrices among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectral_ops.continual.methods.method import Context


class Matrix(NamedTuple):
    """A weight that a layer multiplies by: (m, ...), rows being outputs, or `parts` of them below each other.

    Args:
        name: of the parameter in the model.
        module: the layer that owns it.
        attribute: its name there.
        parts: 3 for the packed query, key and value of nn.MultiheadAttention, else 1.
    """

    name: str
    module: nn.Module
    attribute: str
    parts: int = 1

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.attribute)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, self.attribute.replace("weight", "bias"))


def trainable(model: nn.Module) -> list[Tensor]:
    """All parameters that are trained: weights, biases, scales and shifts of norms, positions."""
    return [p for p in model.parameters() if p.requires_grad]


def initial(context: Context, task: int = 0) -> list[Tensor]:
    """A fresh network's parameters in the order of `trainable`; of task 0: what the run began with."""
    state = context.initialize(task)
    return [state[name] for name, p in context.model.named_parameters() if p.requires_grad]


def matrices(model: nn.Module, output: str | None = None) -> list[Matrix]:
    """The weights of all Linear, Conv and MultiheadAttention layers, without those of the module named `output`."""
    return [matrix for matrix in _matrices(model) if output is None or not _is_of(matrix.name, output)]


def gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Their .grad; where there is none yet, zeros are put there."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters if p.grad is not None]


def _matrices(model: nn.Module) -> Iterator[Matrix]:
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            yield Matrix(f"{prefix}weight", module, "weight")
        elif isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim:  # else not packed
            yield Matrix(f"{prefix}in_proj_weight", module, "in_proj_weight", parts=3)


def _is_of(parameter: str, module: str) -> bool:
    return parameter.startswith(f"{module}.")
