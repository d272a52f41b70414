"""l2-init: weight decay toward the initial parameters."""

from __future__ import annotations

import math

import torch

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.parameters import gradients, initial, trainable


class L2Init(Method):
    """Adds strength * sum ||theta - theta_0||^2 over all trainable parameters, theta_0 being what the run began with.

    That is 2 * strength * (theta - theta_0) in the gradient: coupled, as l2.

    Args:
        strength: the coefficient of the sum of squares, without a factor of one half.

    Source: Kumar et al. 2023, arXiv 2308.11958 ("regenerative regularization").
    """

    grid = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

    def __init__(self, context: Context, *, strength: float = 1e-4):
        super().__init__(context)
        require_range("l2-init", "strength", strength, 0, math.inf)
        self.strength = strength
        self._parameters, self._initial = trainable(context.model), initial(context)

    @torch.no_grad()
    def after_backward(self) -> None:
        distance = torch._foreach_sub(self._parameters, self._initial)
        torch._foreach_add_(gradients(self._parameters), distance, alpha=2 * self.strength)
