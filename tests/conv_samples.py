"""Small conv layers of every kind, and the dense matrices of what they do, by torch's own modules alone."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from helpers import DTYPES, F64, NAMES, gaussian, step_in_float64, unit
from torch import Tensor, nn

from spectral_ops import backends
from spectral_ops.ops.conv_operator import ConvOperator, conv_operator
from spectral_ops.ops.layout import Kind, Layout, pack, vector_dtype

OPS = torch.ops.spectral_ops
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.fixture(params=["reference", "native"])
def conv_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that serves conv operators on the CPU, chosen while the test runs; its name."""
    reason = backends.available()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param} not usable: {reason}")
    with backends.use_backend(request.param):
        yield request.param


@dataclass(frozen=True)
class ConvSample:
    """A layer and the spatial size of its input."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    inputs: int = 4
    outputs: int = 6
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0

    def __str__(self) -> str:
        kind = f"{'transposed' if self.transposed else 'conv'}{len(self.size)}d"
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name != "transposed" and getattr(self, field.name) != field.default
        ]
        return "-".join([kind, *changed]).replace(" ", "").replace("(", "").replace(")", "")

    @property
    def arguments(self) -> dict[str, Any]:
        """What `conv_spectral_norm` and `conv_operator` take beside the weight and the size."""
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed", "output_padding")
        return {name: getattr(self, name) for name in names}

    @property
    def operator(self) -> ConvOperator:
        return conv_operator("sample", self.shape, self.size, **self.arguments)

    @property
    def layout(self) -> Layout:
        return Layout(Kind.MATRIX, self.groups, 0, int(self.transposed), self.operator)

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        return first, second // self.groups, *self.kernel

    def module(self) -> nn.Module:
        """Raises what torch raises for arguments that it refuses."""
        given = {name: value for name, value in self.arguments.items() if name != "transposed"}
        if not self.transposed:
            del given["output_padding"]
        kind = (TRANSPOSED if self.transposed else CONV)[len(self.size)]
        return kind(self.inputs, self.outputs, self.kernel, bias=False, dtype=F64, **given)

    def weight(self, dtype: torch.dtype = F64) -> Tensor:
        return (0.3 * gaussian(str(self), *self.shape)).to(dtype)

    def run(self, w: Tensor, x: Tensor) -> Tensor:
        """The layer's output, in float64."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using padding='same'")  # torch's, on copies it makes
            return torch.func.functional_call(self.module(), {"weight": w.double()}, x.double())

    def output_size(self) -> tuple[int, ...]:
        return tuple(self.run(self.weight(), torch.zeros(1, self.inputs, *self.size)).shape[2:])

    def whole(self, w: Tensor) -> Tensor:
        """The matrix of the layer, all groups, differentiable in w."""
        x = torch.eye(self.inputs * math.prod(self.size), dtype=F64).view(-1, self.inputs, *self.size)
        return self.run(w, x).flatten(1).T

    def dense(self, w: Tensor) -> list[Tensor]:
        """The matrix (m, n) of every group."""
        whole = self.whole(w)
        m, n = whole.shape[0] // self.groups, whole.shape[1] // self.groups
        return [whole[i * m : (i + 1) * m, i * n : (i + 1) * n] for i in range(self.groups)]

    def vectors(self, dtype: torch.dtype) -> Tensor:
        """A unit vector for every group, (groups, n)."""
        n = self.inputs // self.groups * math.prod(self.size)
        return torch.stack([unit(f"{self}{i}", n) for i in range(self.groups)]).to(vector_dtype(dtype))


@functools.cache
def matrices(sample: ConvSample, dtype: torch.dtype) -> list[Tensor]:
    """Of the sample's weight as rounded to dtype."""
    return sample.dense(sample.weight(dtype))


def accepted(sample: ConvSample) -> bool:
    """Whether torch runs it."""
    try:
        sample.output_size()
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


# ---- every combination, for what is cheap; torch refuses some of them ----


def combinations(dims: int, transposed: bool) -> list[ConvSample]:
    kernels = {1: [(1,), (3,), (4,)], 2: [(3, 2), (1, 3)], 3: [(2, 3, 1), (2, 1, 2)]}[dims]
    strides = {1: [1, 2, 3], 2: [1, (1, 2), (3, 2)], 3: [1, (2, 1, 2)]}[dims]
    paddings = {1: [0, 1, 2], 2: [0, (1, 2), 2], 3: [0, (1, 2, 0)]}[dims] + ([] if transposed else ["same", "valid"])
    dilations = {1: [1, 2], 2: [1, (2, 1)], 3: [1, (1, 2, 3)]}[dims]
    channels = [(4, 6, 1), (4, 6, 2), (4, 4, 4), (4, 8, 4)]  # the last two depthwise, with one and two outputs each
    modes = ["zeros"] if transposed else ["zeros", "circular"]
    extras: list[Any] = {1: [0, 1], 2: [0, (0, 1)], 3: [0, (1, 0, 1)]}[dims] if transposed else [0]
    out = []
    for kernel, stride, padding, dilation, (inputs, outputs, groups), mode, extra in itertools.product(
        kernels, strides, paddings, dilations, channels, modes, extras
    ):
        size = {1: (7,), 2: (6, 5), 3: (3, 4, 3)}[dims]
        layer = (stride, padding, dilation, groups, mode, transposed, extra)
        out.append(ConvSample(size, kernel, inputs, outputs, *layer))
    return out


# ---- every small geometry: strides, dilations and sizes of all kinds beside each other ----


def windows(dims: int, mode: str, transposed: bool) -> Iterator[ConvSample]:
    """Layers by the width of their coarse grid, the output of a convolution, the input of a transposed one."""
    widths = {1: range(1, 7), 2: range(1, 4), 3: (1, 2)}[dims]
    kernels = {1: range(1, 8), 2: (1, 2, 3, 5), 3: (1, 3)}[dims]
    strides = {1: range(1, 5), 2: (1, 2, 4), 3: (1, 2)}[dims]
    dilations = {1: range(1, 4), 2: (1, 2), 3: (1,)}[dims]
    each = itertools.product(kernels, strides, dilations, widths)
    pairs = each if dims == 1 else ((k, s, 1, w) for k, s, _, w in each)
    for dimensions in itertools.product(list(dict.fromkeys(pairs)), repeat=dims):
        kernel, stride, dilation, coarse = zip(*dimensions, strict=True)
        reach = [(w - 1) * s + d * (k - 1) + 1 for k, s, d, w in dimensions]
        padding = tuple(min(k // 2, (n - 1) // 2) for k, n in zip(kernel, reach, strict=True))
        size = coarse if transposed else tuple(n - 2 * p for n, p in zip(reach, padding, strict=True))
        yield ConvSample(size, kernel, 2, 3, stride, padding, dilation, 1, mode, transposed)


# ---- a few of each kind, for what iterates ----

BASE = ConvSample((6, 5), (3, 3), 3, 4, padding=1)
PATCHES = ConvSample((8, 6), (2, 3), 3, 5, stride=(2, 3))  # patch embedding: windows side by side
UP = ConvSample((4, 3), (3, 3), 4, 3, stride=2, padding=1, output_padding=1, transposed=True)

SAMPLES = [
    ConvSample((12,), (3,), 3, 4),
    ConvSample((11,), (4,), 3, 4, padding="same"),
    ConvSample((13,), (3,), 4, 6, stride=2, padding=2, dilation=2, groups=2),
    ConvSample((9,), (3,), 5, 5, padding=1, groups=5, padding_mode="circular"),
    ConvSample((6,), (4,), 4, 2, stride=3, padding=1, dilation=2, output_padding=1, transposed=True),
    BASE,
    replace(BASE, padding="valid"),
    replace(BASE, padding="same", dilation=(1, 2)),
    replace(BASE, padding=2),  # more than half of the kernel: windows that hold nothing but a corner
    replace(BASE, stride=2),
    replace(BASE, stride=(1, 3), padding=(0, 2), kernel=(2, 3)),
    replace(BASE, padding_mode="circular"),
    replace(BASE, padding_mode="circular", stride=(2, 1), kernel=(3, 2)),
    replace(BASE, padding_mode="circular", padding=(4, 3)),  # an output longer than its input
    replace(BASE, inputs=4, groups=2),
    replace(BASE, inputs=4, outputs=8, groups=4, padding_mode="circular"),  # depthwise
    replace(BASE, kernel=(1, 1), padding=0),
    replace(BASE, size=(2, 2)),  # the kernel never lies inside
    PATCHES,
    replace(PATCHES, stride=(3, 4), padding=1),  # gaps between windows
    UP,
    replace(UP, stride=1, output_padding=0),
    replace(UP, inputs=4, outputs=6, groups=2, dilation=(1, 2), output_padding=(1, 0)),
    replace(UP, kernel=(2, 2), padding=0, output_padding=0),  # transposed without overlap
    ConvSample((3, 4, 4), (3, 3, 3), 2, 3, padding=1),
    ConvSample((3, 4, 4), (2, 3, 2), 4, 4, stride=(1, 2, 2), padding=(0, 1, 1), groups=4),
    ConvSample((3, 3, 2), (2, 3, 1), 2, 4, padding="same", padding_mode="circular"),
    ConvSample((2, 2, 3), (3, 2, 2), 2, 2, stride=(2, 1, 2), padding=(1, 0, 1), transposed=True),
]


# Windows that see nothing but padding: the zero map, whatever the weight.
UNSEEN = [
    ConvSample((1,), (1,), 2, 3, stride=3, padding=1),
    ConvSample((1, 1), (1, 1), 2, 2, stride=(3, 4), padding=1, groups=2),
    ConvSample((1, 1), (3, 2), 3, 1, (1, 4), (4, 2), (3, 1), 1, "zeros", True, (2, 3)),
]


def samples(*, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Any]:
    """(sample, dtype) as parameters for pytest."""
    return [pytest.param(sample, dtype, id=f"{sample}-{NAMES[dtype]}") for sample in SAMPLES for dtype in dtypes]


# One of each kind, for lists: groups, depthwise, circular, transposed, 1-D to 3-D.
MIXED = [BASE, SAMPLES[2], SAMPLES[3], UP, PATCHES, SAMPLES[15], SAMPLES[24]]


class Problem:
    """Some layers as the ops take them."""

    def __init__(self, layers: Sequence[ConvSample], dtype: torch.dtype | Sequence[torch.dtype]) -> None:
        dtypes = [dtype] * len(layers) if isinstance(dtype, torch.dtype) else list(dtype)
        self.layers = list(layers)
        self.weights = [layer.weight(d) for layer, d in zip(layers, dtypes, strict=True)]
        self.v = torch.cat([layer.vectors(dtypes[0]).flatten() for layer in layers])
        self.layouts = pack([layer.layout for layer in layers])
        self.exponents = torch.zeros(sum(layer.groups for layer in layers), dtype=torch.int32)
        self.targets = [0.7 + 0.1 * i for i in range(len(layers))]
        self.scales = [1.0 + 0.2 * i for i in range(len(layers))]

    @classmethod
    def of_windows(cls, dims: int, mode: str, transposed: bool) -> Problem:
        """Every small geometry, or so many of them as a launch on CUDA holds; targets of 0, so that a sigma near its
        own has no gradient of rounding alone."""
        layers = [sample for sample in windows(dims, mode, transposed) if accepted(sample)]
        problem = cls(layers[:: 1 + len(layers) // 768], torch.float32)
        problem.targets = [0.0] * len(problem.layers)
        return problem

    def steps(self, n_iter: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return OPS.power_iteration(self.weights, self.v, self.exponents, self.layouts, n_iter)

    def arguments(self, exponent: float = 2.0) -> tuple[Any, ...]:
        return self.weights, self.v, self.exponents, self.layouts, self.targets, self.scales, exponent

    def accumulate(self, gradients: list[Tensor], strength: float, *scaler: Tensor | None) -> tuple[Tensor, Tensor]:
        """(strength R, sigma); v and the exponents advance."""
        sigma = torch.full_like(self.exponents, -1, dtype=self.v.dtype)
        factor = torch.tensor(strength, dtype=F64)
        settings = (self.layouts, self.targets, self.scales, 2.0, factor, *(scaler or (None, None)))
        return OPS.accumulate_grad_(gradients, self.weights, self.v, self.exponents, sigma, *settings), sigma

    def truth(self, exponent: float = 2.0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """R, its gradients at fixed u by autograd through torch's modules, sigma of every group; in float64."""
        doubles = [w.detach().double().requires_grad_() for w in self.weights]
        total, sigmas, at = torch.zeros((), dtype=F64), [], 0
        for layer, w, target, scale in zip(self.layers, doubles, self.targets, self.scales, strict=True):
            for block in layer.dense(w):
                _, u, _ = step_in_float64(block.detach(), self.v[at : at + block.shape[1]])
                at += block.shape[1]
                sigma = torch.linalg.vector_norm(block.T @ u)
                total = total + scale * (sigma**exponent - target**exponent) ** 2
                sigmas.append(sigma.detach())
        return total.detach(), list(torch.autograd.grad(total, doubles)), sigmas
