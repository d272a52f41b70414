"""shrink-and-perturb: smaller parameters plus noise."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.optimizer_state import clear_all
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.parameters import initial, trainable


class ShrinkAndPerturb(Method):
    """theta <- (1 - strength) * theta + noise * epsilon for all trainable parameters, at task boundaries.

    The paper's shrink factor lambda is 1 - strength. Buffers, as the running statistics of BatchNorm, are left alone.

    Args:
        strength: how much of every parameter goes away: 0 none, 1 all.
        noise: the factor of epsilon.
        source: of epsilon. "fresh": a freshly initialised network, whose parameters differ in variance as the
            network's own do; "normal": N(0, 1) for every entry, so that noise is the paper's sigma.
        every: "task", or "step" for after every optimizer step; then strength and noise are those of one step.
        reset_optimizer: whether moments and step counters begin anew at a task boundary, as in the public code, which
            makes a new optimizer for every round of training. Nothing is reset after a step.

    Source: Ash & Adams 2020, arXiv 1910.08475; defaults and noise of its public code (shrink 0.4, perturb 0.1). After
    every step, with normal noise: Dohare et al. 2024, which shrinks through l2.
    """

    grid = (0.2, 0.4, 0.6, 0.8)
    task_boundaries = True

    def __init__(
        self,
        context: Context,
        *,
        strength: float = 0.6,
        noise: float = 0.1,
        source: Literal["fresh", "normal"] = "fresh",
        every: Literal["task", "step"] = "task",
        reset_optimizer: bool = True,
    ):
        super().__init__(context)
        require_range("shrink-and-perturb", "strength", strength, 0, 1)
        require_range("shrink-and-perturb", "noise", noise, 0, float("inf"))
        if every == "step" and source == "fresh":
            raise ValueError(
                "shrink-and-perturb: expected source normal with every step, got 'fresh'. A network would be built in "
                "every step: set source=normal, or every=task."
            )
        self.strength, self.noise, self.source, self.every = strength, noise, source, every
        self.task_boundaries = every == "task"
        self.reset_optimizer = reset_optimizer
        self._parameters = trainable(context.model)

    def after_step(self) -> None:
        if self.every == "step":
            self._apply(self._normal())

    def on_task_boundary(self, task: int) -> None:
        if self.every == "task":
            self._apply(initial(self.context, task) if self.source == "fresh" else self._normal())
            if self.reset_optimizer:
                clear_all(self.context.optimizer)

    @torch.no_grad()
    def _apply(self, epsilon: list[Tensor]) -> None:
        torch._foreach_mul_(self._parameters, 1 - self.strength)
        torch._foreach_add_(self._parameters, epsilon, alpha=self.noise)

    def _normal(self) -> list[Tensor]:
        """Drawn in one call, on the CPU, where the generator is: the same numbers on every device."""
        sizes = [p.numel() for p in self._parameters]
        drawn = torch.randn(sum(sizes), generator=self.context.generator).split(sizes)
        return [x.view_as(p).to(p) for x, p in zip(drawn, self._parameters, strict=True)]
