"""Several MLPs as one: products of all at once, and the chain rule written out.

Between small products autograd takes as long as they do: docs/performance.md, "The trainer".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spectral_ops.continual.models.activations import ACTIVATIONS, Activation
from spectral_ops.continual.models.model import HiddenLayer
from spectral_ops.continual.models.products import by_onednn, rows_for_onednn

if TYPE_CHECKING:
    from spectral_ops.continual.models.mlp import MLP

Tensors = Mapping[str, Tensor]


class StackedMLP:
    """See `Model.stacked`.

    Args:
        model: what all networks are like.
        parameters, gradients: by its names, each (S, ...).
    """

    def __init__(self, model: MLP, parameters: Tensors, gradients: Tensors):
        kind = ACTIVATIONS[model.activation]
        self._stages: list[_Linear | _Norm | _Activation] = []
        for i, layer in enumerate(model.layers):
            assert isinstance(layer, HiddenLayer)
            self._stages.append(_Linear(f"layers.{i}.incoming", parameters, gradients))
            if isinstance(layer.norm, nn.LayerNorm):
                self._stages.append(_Norm(f"layers.{i}.norm", layer.norm, parameters, gradients))
            self._stages.append(_Activation(kind))
        self._stages.append(_Linear("head", parameters, gradients))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        for stage in self._stages:
            x = stage.forward(x)
        return x

    def backward(self, d: Tensor) -> None:
        first, *others = self._stages
        for stage in reversed(others):
            d = stage.backward(d)
        assert isinstance(first, _Linear)
        first.differentiate(d)  # of the images nobody wants a gradient


class _Linear:
    def __init__(self, name: str, parameters: Tensors, gradients: Tensors):
        self._weight, self._bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"].unsqueeze(1)
        self._weight_gradient, self._bias_gradient = gradients.get(f"{name}.weight"), gradients.get(f"{name}.bias")
        self._large_from, self._outputs = rows_for_onednn(self._weight), self._weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        self._x, rows = x, x.shape[1]
        self._large = rows >= self._large_from
        if self._large:
            return by_onednn(x, self._weight.mT, bias=self._bias)
        if rows > self._outputs:
            # A head's few classes: MKL takes two thirds of the time for the transpose, and softmax wants it so.
            return torch.baddbmm(self._bias.mT, self._weight, x.mT).mT
        return torch.baddbmm(self._bias, x, self._weight.mT)

    def backward(self, d: Tensor) -> Tensor:
        self.differentiate(d)
        return by_onednn(d, self._weight) if self._large else torch.bmm(d, self._weight)

    def differentiate(self, d: Tensor) -> None:
        if self._weight_gradient is not None:
            product = by_onednn if self._large else torch.bmm
            product(d.mT, self._x, out=self._weight_gradient)
        if self._bias_gradient is not None:
            torch.sum(d, 1, out=self._bias_gradient)


class _Norm:
    """LayerNorm over the features of every sample, with each network's own scale and shift where it has them."""

    def __init__(self, name: str, norm: nn.LayerNorm, parameters: Tensors, gradients: Tensors):
        self._shape, self._eps = norm.normalized_shape, norm.eps
        self._weight, self._bias = parameters.get(f"{name}.weight"), parameters.get(f"{name}.bias")
        self._weight_gradient, self._bias_gradient = gradients.get(f"{name}.weight"), gradients.get(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        self._x = x
        y, self._mean, self._rstd = torch.native_layer_norm(x, self._shape, None, None, self._eps)
        self._y = y
        if self._weight is not None:
            y = y * self._weight.unsqueeze(1)
        return y if self._bias is None else y + self._bias.unsqueeze(1)

    def backward(self, d: Tensor) -> Tensor:
        if self._weight_gradient is not None:
            torch.sum(d * self._y, 1, out=self._weight_gradient)
        if self._bias_gradient is not None:
            torch.sum(d, 1, out=self._bias_gradient)
        if self._weight is not None:
            d = d * self._weight.unsqueeze(1)
        arguments = d, self._x, self._shape, self._mean, self._rstd, None, None
        return torch.ops.aten.native_layer_norm_backward(*arguments, [True, False, False])[0]


class _Activation:
    def __init__(self, kind: Activation):
        self._forward, self._backward = kind.module(2).forward, kind.backward  # nobody hooks into this one

    def forward(self, x: Tensor) -> Tensor:
        self._x, self._y = x, self._forward(x)
        return self._y

    def backward(self, d: Tensor) -> Tensor:
        return self._backward(d, self._x, self._y, 2)
