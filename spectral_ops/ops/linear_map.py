"""What the oracle iterates on: a stack of linear maps, which are matrices or convolutions, in plain torch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_ops.ops.conv_operator import ConvOperator
from spectral_ops.ops.layout import Layout, as_matrices, sizes


def without_tf32(x: Tensor) -> Any:
    """cuDNN rounds the factors of float32 convolutions to 10 bits unless told otherwise."""
    if x.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class Matrices:
    """A stack (parts, m, n) as `parts` maps from (n,) to (m,)."""

    def __init__(self, w: Tensor):
        self.w = w
        self.parts, self.m, self.n = w.shape

    def largest(self) -> Tensor:
        """max |w| of every part; NaN or infinite where one of its elements is."""
        return self.w.abs().amax(dim=(1, 2))

    def scaled(self, exponents: Tensor) -> Matrices:
        """Times 2^exponents, one for every part."""
        return Matrices(torch.ldexp(self.w, exponents[:, None, None]))

    def part(self, i: int) -> Matrices:
        return Matrices(self.w[i : i + 1])

    def apply(self, x: Tensor) -> Tensor:
        """(parts, n) to (parts, m)."""
        return torch.einsum("pmn,pn->pm", self.w, x)

    def adjoint(self, y: Tensor) -> Tensor:
        """(parts, m) to (parts, n)."""
        return torch.einsum("pmn,pm->pn", self.w, y)

    def gradient(self, u: Tensor, v: Tensor) -> Tensor:
        """d(sum of u'Wv)/dw, of the shape of w."""
        return u[:, :, None] * v[:, None, :]


class Convolutions:
    """The groups of a conv layer, each a map from its input to its output."""

    def __init__(self, w: Tensor, parts: int, operator: ConvOperator):
        self.w, self.parts, self.operator = w, parts, operator
        self.parts, self.m, self.n = sizes(w.shape, Layout(parts=parts, operator=operator))
        self.coarse, self.fine = operator.grids(w.shape[2:])
        # Channels of all groups on the coarse grid and on the fine one.
        self._channels = w.shape[0], w.shape[1] * parts

    def largest(self) -> Tensor:
        return self.w.reshape(self.parts, -1).abs().amax(dim=1)

    def scaled(self, exponents: Tensor) -> Convolutions:
        w = torch.ldexp(self.w.unflatten(0, (self.parts, -1)), exponents.view(-1, *[1] * self.w.ndim)).flatten(0, 1)
        return Convolutions(w, self.parts, self.operator)

    def part(self, i: int) -> Convolutions:
        return Convolutions(self.w.chunk(self.parts)[i], 1, self.operator)

    def apply(self, x: Tensor) -> Tensor:
        return self._to_fine(x) if self.operator.transposed else self._to_coarse(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._to_coarse(y) if self.operator.transposed else self._to_fine(y)

    def gradient(self, u: Tensor, v: Tensor) -> Tensor:
        if self.w.numel() == 0:  # torch refuses weights without output channels
            return torch.zeros_like(self.w)
        coarse, fine = (v, u) if self.operator.transposed else (u, v)
        return self._backward(self._on_coarse(coarse), self._padded(self._on_fine(fine)), 1)

    def _on_coarse(self, x: Tensor) -> Tensor:
        return x.reshape(1, self._channels[0], *self.coarse)

    def _on_fine(self, x: Tensor) -> Tensor:
        return x.reshape(1, self._channels[1], *self.fine)

    def _margins(self) -> list[tuple[int, int]]:
        """Added to the fine grid so that every window of the coarse one lies inside, and no other does."""
        op, out = self.operator, []
        for i, k in enumerate(self.w.shape[2:]):
            reach = op.dilation[i] * (k - 1) + 1
            end = (self.coarse[i] - 1) * op.stride[i] + reach
            out.append((op.before[i], end - self.fine[i] - op.before[i]))  # the second one negative: not all is read
        return out

    def _padded(self, x: Tensor) -> Tensor:
        margins = self._margins()
        if self.operator.circular:
            for dim, (low, high) in enumerate(margins, 2):
                index = torch.arange(-low, x.shape[dim] + high, device=x.device) % x.shape[dim]
                x = x.index_select(dim, index)
            return x
        return F.pad(x, [number for margin in reversed(margins) for number in margin])

    def _to_coarse(self, x: Tensor) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.coarse) - 1]
        op = self.operator
        with without_tf32(x):
            y = convolve(self._padded(self._on_fine(x)), self.w, None, op.stride, 0, op.dilation, self.parts)
        return y.reshape(self.parts, -1)

    def _to_fine(self, y: Tensor) -> Tensor:
        padded = [n + low + high for n, (low, high) in zip(self.fine, self._margins(), strict=True)]
        x = self._backward(self._on_coarse(y), y.new_empty(1, self._channels[1], *padded), 0)
        for dim, (low, high) in enumerate(self._margins(), 2):
            n = self.fine[dim - 2]
            if self.operator.circular:
                index = torch.arange(-low, n + high, device=x.device) % n
                shape = [*x.shape[:dim], n, *x.shape[dim + 1 :]]
                x = x.new_zeros(shape).index_add_(dim, index, x)
            else:
                # F.pad's adjoint: what lay in the margin goes, what was never read is zero.
                pads = [0] * (2 * (x.ndim - dim - 1)) + [-low, -high]
                x = F.pad(x, pads)
        return x.reshape(self.parts, -1)

    def _backward(self, coarse: Tensor, fine: Tensor, what: int) -> Tensor:
        op, dims = self.operator, len(self.coarse)
        mask = [what == 0, what == 1, False]
        with without_tf32(coarse):
            out = torch.ops.aten.convolution_backward(
                coarse, fine, self.w, None, op.stride, [0] * dims, op.dilation, False, [0] * dims, self.parts, mask
            )
        return out[what]


LinearMap = Matrices | Convolutions


def linear_map(w: Tensor, layout: Layout, dtype: torch.dtype) -> LinearMap:
    """A parameter read by its layout, in a dtype."""
    if layout.operator is not None:
        return Convolutions(w.detach().to(dtype), layout.parts, layout.operator)
    parts, m, n = sizes(w.shape, layout)
    return Matrices(as_matrices(w.detach(), layout).reshape(parts, m, n).to(dtype))
