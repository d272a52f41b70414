"""Activations by name: how each is made for a dimension of features, and how many features it makes of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class CReLU(nn.Module):
    """(relu(x), relu(-x)), concatenated along `dim`: features double, and no unit is ever silent on both sides.

    Shang et al. 2016 (arXiv 1603.05201); against loss of plasticity: Abbas et al. 2023 (arXiv 2303.07507).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, -x), self.dim).relu()

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Activation(NamedTuple):
    """`module(dim)` is an instance for features along `dim`; `copies` features come out for each that goes in."""

    module: Callable[[int], nn.Module]
    copies: int = 1


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda dim: nn.ReLU()),
    "crelu": Activation(CReLU, copies=2),
    "gelu": Activation(lambda dim: nn.GELU()),
    "tanh": Activation(lambda dim: nn.Tanh()),
}
