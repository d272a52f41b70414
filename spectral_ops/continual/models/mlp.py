"""The multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from spectral_ops.continual.choices import choose
from spectral_ops.continual.models.activations import ACTIVATIONS
from spectral_ops.continual.models.mlp_stacked import StackedMLP
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

    by_rows = True

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
        self.activation = activation
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

    def stacked(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> StackedMLP:
        return StackedMLP(self, parameters, gradients)

    def units(self) -> list[Units]:
        return chain_units(self, self.head)
