"""The small convolutional network."""

from __future__ import annotations

from torch import Tensor, nn

from spectral_ops.continual.choices import choose
from spectral_ops.continual.models.activations import ACTIVATIONS
from spectral_ops.continual.models.model import HiddenLayer, Model, chain_units, check_sizes
from spectral_ops.continual.models.norms import CHANNEL_NORMS, FEATURE_NORMS
from spectral_ops.continual.units import Units


class ConvNet(Model):
    """Convolutions, each with an activation and 2x2 max pooling, then hidden linear layers, then a Linear.

    LeNet's plan (LeCun et al. 1998). Convolutions keep the image's size and pooling halves it, rounded down. Weights
    and biases are PyTorch's default, uniform within 1 / sqrt(fan_in): gain 1 / sqrt(3), as in the MLP.

    Args:
        input_shape: (C, H, W) of one image; H and W at least 2^(number of convolutions).
        classes: scores of every image.
        channels: of the convolutions.
        hidden: widths of the hidden linear layers.
        kernel: side of the convolutions' kernels, odd.
        activation: relu, crelu (each unit is read twice, as relu(x) and relu(-x)), gelu or tanh.
        norm: none, layer (over the features; after a convolution over channels and pixels together) or layer-plain
            (without scale and shift).

    Raises:
        ValueError: an unknown name, a size below 1, no convolution, an even kernel, or an image too small to pool.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        *,
        channels: tuple[int, ...] = (32, 64),
        hidden: tuple[int, ...] = (128,),
        kernel: int = 3,
        activation: str = "relu",
        norm: str = "none",
    ):
        super().__init__(input_shape, classes)
        _check(input_shape, channels, hidden, kernel)
        kind = choose("activation", activation, ACTIVATIONS)
        channel_norm, feature_norm = choose("norm", norm, CHANNEL_NORMS), choose("norm", norm, FEATURE_NORMS)
        inputs, height, width = input_shape
        self.convs, self.layers, self.pool = nn.ModuleList(), nn.ModuleList(), nn.MaxPool2d(2)
        for outputs in channels:
            conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
            self.convs.append(HiddenLayer(conv, channel_norm(outputs), kind))
            inputs, height, width = kind.copies * outputs, height // 2, width // 2
        inputs *= height * width
        for outputs in hidden:
            self.layers.append(HiddenLayer(nn.Linear(inputs, outputs), feature_norm(outputs), kind))
            inputs = kind.copies * outputs
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.pool(conv(x))
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def units(self) -> list[Units]:
        return chain_units(self, self.head)


def _check(input_shape: tuple[int, ...], channels: tuple[int, ...], hidden: tuple[int, ...], kernel: int) -> None:
    check_sizes("model conv", channels=channels, hidden=hidden, kernel=kernel)
    if not channels:
        raise ValueError("model conv: expected channels of at least one convolution, got (). Use the model mlp.")
    if kernel % 2 == 0:
        raise ValueError(f"model conv: expected kernel to be odd, got {kernel}. Use {kernel - 1} or {kernel + 1}.")
    least = 2 ** len(channels)
    if min(input_shape[1:]) < least:
        raise ValueError(
            f"model conv: expected images of at least {least} x {least} for {len(channels)} poolings, "
            f"got {input_shape[1]} x {input_shape[2]}. Give fewer channels."
        )
