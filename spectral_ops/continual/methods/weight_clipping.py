"""weight-clipping: every weight within a multiple of the bound it was drawn in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.parameters import matrices


class WeightClipping(Method):
    """theta <- clip(theta, -kappa * s, kappa * s) after every step, for the weights and biases of all layers.

    s = 1 / sqrt(fan_in) of the layer is the bound of PyTorch's uniform initialisation, of weight and bias alike; it is
    taken for layers that a model draws otherwise, too. Norms, positions and class tokens are not clipped.

    Args:
        strength: kappa. The smaller, the stronger; below 1 initial weights are clipped.
        output: whether the layer that gives the scores is among them.

    Source: Elsayed et al. 2024, arXiv 2407.01704, with the bounds of its public code.
    """

    grid = (1.0, 2.0, 3.0, 4.0, 5.0)

    def __init__(self, context: Context, *, strength: float = 2.0, output: bool = True):
        super().__init__(context)
        require_range("weight-clipping", "strength", strength, 0, math.inf)
        self._parameters: list[Tensor] = []
        self._bounds: list[float] = []
        for matrix in matrices(context.model, None if output else context.output):
            bound = strength / math.sqrt(matrix.weight[0].numel())
            for parameter in (matrix.weight, matrix.bias):
                if parameter is not None and parameter.requires_grad:
                    self._parameters.append(parameter)
                    self._bounds.append(bound)
        self._lower = [-bound for bound in self._bounds]

    @torch.no_grad()
    def after_step(self) -> None:
        if self._parameters:
            torch._foreach_clamp_max_(self._parameters, self._bounds)
            torch._foreach_clamp_min_(self._parameters, self._lower)
