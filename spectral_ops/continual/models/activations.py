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
    """What an activation is, for features along a dimension.

    Args:
        module: of that dimension, an instance.
        backward: of the gradient of y, of x, of y = module(dim)(x) and of dim; gives the gradient of x.
        copies: features that come out for each that goes in.
    """

    module: Callable[[int], nn.Module]
    backward: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    copies: int = 1


_aten = torch.ops.aten


def _relu_backward(d: Tensor, x: Tensor, y: Tensor, dim: int) -> Tensor:
    return _aten.threshold_backward.default(d, y, 0)


def _crelu_backward(d: Tensor, x: Tensor, y: Tensor, dim: int) -> Tensor:
    above, below = _relu_backward(d, x, y, dim).chunk(2, dim)
    return above - below


def _gelu_backward(d: Tensor, x: Tensor, y: Tensor, dim: int) -> Tensor:
    return _aten.gelu_backward.default(d, x)


def _tanh_backward(d: Tensor, x: Tensor, y: Tensor, dim: int) -> Tensor:
    return _aten.tanh_backward.default(d, y)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(lambda dim: nn.ReLU(), _relu_backward),
    "crelu": Activation(CReLU, _crelu_backward, copies=2),
    "gelu": Activation(lambda dim: nn.GELU(), _gelu_backward),
    "tanh": Activation(lambda dim: nn.Tanh(), _tanh_backward),
}
