"""l2: weight decay through the gradient."""

from __future__ import annotations

import math

import torch

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.parameters import gradients, trainable


class L2(Method):
    """Adds strength * sum ||theta||^2 over all trainable parameters to the loss: 2 * strength * theta to the gradient.

    Coupled: the optimizer sees it as gradient, so that Adam divides it by the root of its second moment. Equal to
    `weight_decay = 2 * strength` of torch.optim.Adam and SGD.

    Args:
        strength: the coefficient of the sum of squares, without a factor of one half.

    Source: Krogh & Hertz 1991; a baseline for plasticity in Dohare et al. 2024, Kumar et al. 2023 (arXiv 2308.11958).
    """

    grid = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)

    def __init__(self, context: Context, *, strength: float = 1e-4):
        super().__init__(context)
        require_range("l2", "strength", strength, 0, math.inf)
        self.strength = strength
        self._parameters = trainable(context.model)

    @torch.no_grad()
    def after_backward(self) -> None:
        torch._foreach_add_(gradients(self._parameters), self._parameters, alpha=2 * self.strength)
