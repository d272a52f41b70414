"""The multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_ops.continual.choices import choose
from spectral_ops.continual.models.activations import ACTIVATIONS
from spectral_ops.continual.models.model import HiddenLayer, Model, chain_units, check_sizes
from spectral_ops.continual.models.norms import FEATURE_NORMS
from spectral_ops.continual.units import Units


class MLP(Model):
    """Flattened images through hidden layers, each a Linear, a normalisation and an activation, then a Linear.

    Weights and biases are PyTorch's default, uniform within 1 / sqrt(fan_in): gain 1 / sqrt(3), where ReLU would need
    sqrt(2) to keep its activations' variance, so that without a norm the signal shrinks from layer to layer.

    Args:
        input_shape: (C, H, W) of one image.
        classes: scores of every image.
        hidden: widths of the hidden layers; none makes it a linear classifier.
        activation: relu, crelu (each unit is read twice, as relu(x) and relu(-x)), gelu or tanh.
        norm: none, layer (LayerNorm) or layer-plain (without scale and shift).

    Raises:
        ValueError: an unknown name, or a size below 1.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        *,
        hidden: tuple[int, ...] = (256, 256),
        activation: str = "relu",
        norm: str = "none",
    ):
        super().__init__(input_shape, classes)
        check_sizes("model mlp", hidden=hidden)
        kind = choose("activation", activation, ACTIVATIONS)
        normalise = choose("norm", norm, FEATURE_NORMS)
        inputs = (math.prod(input_shape), *(kind.copies * width for width in hidden))
        pairs = zip(inputs[:-1], hidden, strict=True)
        self.layers = nn.ModuleList(HiddenLayer(nn.Linear(n, m), normalise(m), kind) for n, m in pairs)
        self.head = nn.Linear(inputs[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def forward_stacked(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        # Samples are columns all the way: W x has gradients of W with W's strides, where x W' would have them copied.
        x = x.flatten(2).mT
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, HiddenLayer)
            x = layer.activation(
                _norm(layer.norm, parameters, f"layers.{i}.norm", _linear(parameters, f"layers.{i}.incoming", x))
            )
        return _linear(parameters, "head", x).mT

    def units(self) -> list[Units]:
        return chain_units(self, self.head)


def _linear(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Of S networks: (S, m, samples) of (S, n, samples)."""
    return torch.baddbmm(parameters[f"{name}.bias"].unsqueeze(2), parameters[f"{name}.weight"], x)


def _norm(norm: nn.Module, parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if not isinstance(norm, nn.LayerNorm):
        return x
    x = F.layer_norm(x.mT, norm.normalized_shape, eps=norm.eps).mT
    if not norm.elementwise_affine:
        return x
    return x * parameters[f"{name}.weight"].unsqueeze(2) + parameters[f"{name}.bias"].unsqueeze(2)
