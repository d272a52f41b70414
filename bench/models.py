"""Shape tables, and modules of these shapes that hold real parameters and are never run forward."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from bench.vit_shapes import VITS, ViT

SEED = 0

# The MLP of the plasticity experiments on MNIST-sized images. The second one has the same six parameters and next to no
# arithmetic: what a call on it takes is Python and dispatch.
MLPS = {"mlp": (784, 256, 256, 10), "mlp-shrunk": (8, 4, 4, 2)}

# (out, in, kernel, how many), He et al., CVPR 2016, arXiv 1512.03385, table 1, with projection shortcuts (option B).
RESNET18_CONVS = [
    (64, 3, 7, 1),
    (64, 64, 3, 4),
    (128, 64, 3, 1),
    (128, 128, 3, 3),
    (128, 64, 1, 1),
    (256, 128, 3, 1),
    (256, 256, 3, 3),
    (256, 128, 1, 1),
    (512, 256, 3, 1),
    (512, 512, 3, 3),
    (512, 256, 1, 1),
]
RESNET18_HEAD = (1000, 512)


class Conv(NamedTuple):
    """A square conv layer, as wide as high, and the size of its input."""

    outputs: int
    inputs: int
    kernel: int
    stride: int
    size: int

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def output_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def macs(self) -> int:
        """Of one application, those with the padding's zeros counted."""
        return self.outputs * self.inputs * self.kernel**2 * self.output_size**2


def _resnet18_cifar() -> list[Conv]:
    """ResNet-18 for images of 32 x 32: He et al.'s stages behind a 3 x 3 stem, without the pooling."""
    convs, inputs, size = [Conv(64, 3, 3, 1, 32)], 64, 32
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        convs.append(Conv(width, inputs, 3, stride, size))
        if stride > 1:
            convs.append(Conv(width, inputs, 1, stride, size))
        inputs, size = width, size // stride
        convs += [Conv(width, width, 3, 1, size)] * 3
    return convs


def _resnet50() -> list[Conv]:
    """ResNet-50 for images of 224 x 224, strides in the 3 x 3 layers as in torchvision."""
    convs, inputs, size = [Conv(64, 3, 7, 2, 224)], 64, 56
    for width, blocks, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride, outputs = (first if block == 0 else 1), 4 * width
            convs += [Conv(width, inputs, 1, 1, size), Conv(width, width, 3, stride, size)]
            if block == 0:
                convs.append(Conv(outputs, inputs, 1, stride, size))
            size //= stride
            convs.append(Conv(outputs, width, 1, 1, size))
            inputs = outputs
    return convs


# Conv layers with all that makes them linear maps; no head.
CONV_NETS = {"resnet18-cifar": _resnet18_cifar(), "resnet50": _resnet50()}

NAMES = (*VITS, *MLPS, "resnet18", *CONV_NETS)

# What a run measures unless told otherwise: on a CPU what its caches and minutes allow, on CUDA every size up to a
# billion parameters; beyond it, bench.scale.
CPU_MODELS = ("vit-s", "mlp", "resnet18")
CUDA_MODELS = ("mlp", "resnet18", "vit-ti", "vit-s", "vit-b", "vit-l", "vit-h", "vit-g")
CUDA_ONLY = tuple(name for name in CUDA_MODELS if name not in CPU_MODELS)


def _linears(shapes: list[tuple[int, int]], *, bias: bool) -> list[nn.Module]:
    return [nn.Linear(n, m, bias=bias) for m, n in shapes]


def _convs(table: list[tuple[int, int, int, int]]) -> list[nn.Module]:
    return [nn.Conv2d(n, m, kernel, bias=False) for m, n, kernel, count in table for _ in range(count)]


def conv_net(name: str, *, quick: bool = False) -> list[Conv]:
    """The layers of one of CONV_NETS; quick: an eighth of the channels on a quarter of the size, as far as it goes."""
    if not quick:
        return CONV_NETS[name]
    return [
        Conv(max(c.outputs // 8, 3), max(c.inputs // 8, 3), c.kernel, c.stride, max(c.size // 4, 4))
        for c in CONV_NETS[name]
    ]


def build(
    name: str,
    *,
    quick: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    blocks: int | None = None,
) -> nn.Module:
    """A ModuleList of Linear and Conv2d layers, initialised as torch does, the same at every call on one device.

    Args:
        name: one of NAMES.
        quick: one block of a quarter of the width, the first stages, or narrow layers, in place of the whole.
        device: where the parameters are made: a billion of them take a CPU ten seconds.
        dtype: what the float32 initialisation is rounded to.
        blocks: so many blocks of a ViT in place of all.
    """
    if name not in NAMES:
        raise ValueError(f"build: expected name to be one of {', '.join(NAMES)}, got {name!r}. Name one of these.")
    device = torch.device(device)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []), device:
        torch.manual_seed(SEED)
        if name in VITS:
            vit = VITS[name]
            vit = ViT(vit.width // 4, 1, vit.mlp // 4, vit.source) if quick else vit
            layers = _linears(vit.matrices * min(vit.depth, blocks or vit.depth), bias=False)
        elif name in MLPS:
            widths = MLPS[name]
            layers = _linears(list(zip(widths[1:], widths[:-1], strict=True)), bias=True)
        elif name in CONV_NETS:
            layers = [
                nn.Conv2d(c.inputs, c.outputs, c.kernel, c.stride, c.padding, bias=False)
                for c in conv_net(name, quick=quick)
            ]
        else:
            layers = _convs(RESNET18_CONVS[:5] if quick else RESNET18_CONVS) + _linears([RESNET18_HEAD], bias=False)
    return nn.ModuleList(layers).to(dtype)


def set_decaying_spectrum(model: nn.Module, *, top: float = 3.0, power: float = 0.5) -> None:
    """Gives every matrix the singular values top * i^-power, on its own singular vectors.

    Layers as torch initialises them have their largest singular values within a per cent of each other, which is as
    hard as it gets for an iteration; trained ones have a few that stand out.
    """
    with torch.no_grad():
        for w in matrices(model):
            u, s, vh = torch.linalg.svd(w.flatten(1).float(), full_matrices=False)
            values = top * torch.arange(1, len(s) + 1, device=w.device) ** -power
            w.copy_((u * values @ vh).view_as(w))


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights, in the order of the model."""
    return [p for p in model.parameters() if p.ndim > 1]


def biases(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 1]


def columns(w: torch.Tensor) -> int:
    """n of a weight read as (m, n)."""
    return math.prod(w.shape[1:])
