"""wasserstein: weight decay toward the initial distribution of every parameter tensor."""

from __future__ import annotations

import math

import torch

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.parameters import gradients, initial, trainable


class Wasserstein(Method):
    """Adds strength * sum over tensors of sum_i (theta_(i) - theta0_(i))^2, theta_(i) being the i-th smallest entry.

    The inner sum is d times the squared 2-Wasserstein distance between the d entries and the d initial ones. A sum and
    not a mean, so that strengths mean the same as those of l2-init, which holds every entry to its own initial value.
    The gradient is 2 * strength * (theta_i - theta0_(rank of theta_i)); coupled. Every weight and bias by itself.

    Args:
        strength: the coefficient of the sum of squares.

    Source: Lewandowski et al. 2023, arXiv 2312.00246; compared in arXiv 2406.06811 and by Chung et al. 2024.
    """

    grid = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

    def __init__(self, context: Context, *, strength: float = 1e-4):
        super().__init__(context)
        require_range("wasserstein", "strength", strength, 0, math.inf)
        self.strength = strength
        self._parameters = trainable(context.model)
        self._sorted = [p.flatten().sort().values for p in initial(context)]

    @torch.no_grad()
    def after_backward(self) -> None:
        targets = []
        for p, values in zip(self._parameters, self._sorted, strict=True):
            order = p.flatten().argsort()
            targets.append(torch.empty_like(values).scatter_(0, order, values).view_as(p))
        distance = torch._foreach_sub(self._parameters, targets)
        torch._foreach_add_(gradients(self._parameters), distance, alpha=2 * self.strength)
