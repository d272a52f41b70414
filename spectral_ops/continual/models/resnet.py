"""ResNet-18 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from spectral_ops.continual.choices import choose
from spectral_ops.continual.models.activations import ACTIVATIONS, Activation
from spectral_ops.continual.models.model import Model, check_sizes
from spectral_ops.continual.models.norms import RESNET_NORMS, Norm
from spectral_ops.continual.units import Units

STAGES = (1, 2, 2, 2)  # strides of the four stages; each doubles the channels of the one before
BLOCKS = 2  # of a stage


class Block(nn.Module):
    """activation(norm2(conv2(activation(norm1(conv1(x))))) + shortcut(x)), the basic block.

    The shortcut is the identity, or a 1x1 convolution with a norm where the shape changes. What `conv1` makes are
    units; what leaves the block is not, since the shortcut adds to it.
    """

    def __init__(self, inputs: int, channels: int, stride: int, norm: Norm, activation: Activation):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.activation1 = activation.module(1)
        self.conv2 = nn.Conv2d(activation.copies * channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), norm(channels))
        self.activation2 = activation.module(1)
        self.copies = activation.copies

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation1(self.norm1(self.conv1(x)))
        return self.activation2(self.norm2(self.conv2(hidden)) + self.shortcut(x))

    def units(self, name: str) -> Units:
        return Units(f"{name}.conv1", self.conv1, self.activation1, self.conv2, copies=self.copies, norm=self.norm1)


class ResNet18(Model):
    """ResNet-18 in its form for CIFAR: a 3x3 stem of stride 1 and no max pooling.

    He et al. 2016 (arXiv 1512.03385), with projections where the shape changes (their option B). Convolutions are
    drawn as in He et al. 2015 and torchvision: normal with variance 2 / fan_out, which keeps the gradient's variance
    under ReLU; the head is PyTorch's default, uniform within 1 / sqrt(fan_in), gain 1 / sqrt(3).

    Args:
        input_shape: (C, H, W) of one image.
        classes: scores of every image.
        width: channels of the stem and of the first stage.
        activation: relu, crelu, gelu or tanh. crelu doubles what every layer reads, so that all shortcuts are
            projections.
        norm: batch, or group (32 groups, or as many as leave two channels to each), which is the same in training and
            evaluation.

    Raises:
        ValueError: an unknown name, or a size below 1.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        *,
        width: int = 64,
        activation: str = "relu",
        norm: str = "batch",
    ):
        super().__init__(input_shape, classes)
        check_sizes("model resnet18", width=width)
        kind, normalise = choose("activation", activation, ACTIVATIONS), choose("norm", norm, RESNET_NORMS)
        self.stem = nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False)
        self.stem_norm = normalise(width)
        self.stem_activation = kind.module(1)
        self.blocks = nn.ModuleList()
        inputs = kind.copies * width
        for stage, stride in enumerate(STAGES):
            channels = width * 2**stage
            for block in range(BLOCKS):
                self.blocks.append(Block(inputs, channels, stride if block == 0 else 1, normalise, kind))
                inputs = kind.copies * channels
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_activation(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))

    def units(self) -> list[Units]:
        return [module.units(name) for name, module in self.named_modules() if isinstance(module, Block)]
