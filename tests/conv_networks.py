"""Networks of conv layers, written plainly: torchvision cannot be imported everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spectral_ops.conv_sizes import ConvCall


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """In the form for CIFAR (3x3 stem) or for ImageNet (7x7 stem, stride 2, max pooling)."""

    def __init__(self, *, width: int = 64, imagenet: bool = False):
        super().__init__()
        stem = nn.Conv2d(3, width, 7, 2, 3, bias=False) if imagenet else nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        if imagenet:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential()
        for i in range(4):
            self.blocks.append(Basic(widths[i], widths[i + 1], 1 if i == 0 else 2))
            self.blocks.append(Basic(widths[i + 1], widths[i + 1], 1))
        self.head = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, then 1x1 up and down (Liu et al., CVPR 2022, arXiv 2201.03545)."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.up = nn.Conv2d(width, 4 * width, 1)
        self.down = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.depthwise(x))))


class UNet(nn.Module):
    """Down by strides, up by transposed convolutions: one whose windows overlap, and one whose do not."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding="same")
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, dilation=1)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 3, stride=2, padding=1, output_padding=1)
        self.up1 = nn.ConvTranspose2d(4 * width, width, 2, stride=2)
        self.last = nn.Conv2d(2 * width, 1, 3, padding=2, dilation=2, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.first(x))
        b = torch.relu(self.down1(a))
        c = torch.relu(self.down2(b))
        d = torch.relu(self.up2(c))
        e = torch.relu(self.up1(torch.cat([d, b], dim=1)))
        return self.last(torch.cat([e, a], dim=1))


class Running(nn.Module):
    """A model whose forward is the given function of it and its inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def calls_as_it_runs(model: nn.Module, *shapes: tuple[int, ...]) -> dict[str, list[ConvCall]]:
    """The sizes of every conv layer by name, by hooks of the layers, in a real forward of a copy."""
    model, found = copy.deepcopy(model), {}
    dtype = next(model.parameters()).dtype
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):

            def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                found[name] = [ConvCall(tuple(args[0].shape[2:]), tuple(output.shape[2:]))]

            module.register_forward_hook(look)
    model(*(torch.randn(2, *shape, dtype=dtype) for shape in shapes))
    return found
