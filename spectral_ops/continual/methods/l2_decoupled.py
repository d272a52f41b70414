"""l2-decoupled: weight decay beside the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.options import require_range


class L2Decoupled(Method):
    """theta <- (1 - lr * strength) theta before every step, lr being that of the parameter's group.

    Decoupled: the optimizer's moments do not see it. Adam becomes torch.optim.AdamW with weight_decay = strength.

    Args:
        strength: the coefficient of decay per unit of learning rate, as AdamW's weight_decay.

    Source: Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2 as torch has it.
    """

    grid = (1e-3, 1e-2, 1e-1, 1.0)

    def __init__(self, context: Context, *, strength: float = 1e-2):
        super().__init__(context)
        require_range("l2-decoupled", "strength", strength, 0, math.inf)
        self.strength = strength

    @torch.no_grad()
    def after_backward(self) -> None:
        for group in self.context.optimizer.param_groups:  # read anew: a schedule may have changed the rate
            trained: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if trained:
                torch._foreach_mul_(trained, 1 - group["lr"] * self.strength)
