"""redo: units that are hardly active are made anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spectral_ops.continual.methods.activations import MeanActivations
from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.unit_reset import UnitReset


class ReDo(Method):
    """Every `period` steps, units i of a layer with s_i <= strength are reset,

        s_i = mean |h_i| / (mean over the layer's units k of mean |h_k|),

    means over the batch and, for conv layers and tokens, over positions. A unit with two copies (CReLU) counts with
    their mean. What is reset, and how: see `UnitReset`. The output layer has no units.

    Args:
        strength: tau, the threshold. 0: only units that were 0 throughout the batch.
        period: steps between two looks; the batch of that step is looked at.
        own_steps: whether Adam counts the steps of a reset entry from its reset on, see `UnitReset`; as in the public
            code it does not.

    Source: Sokar et al. 2023, arXiv 2302.12902, Algorithm 1, and its public code, which sets biases of reset units to
    0: here they come from the initialisation as the weights do.
    """

    grid = (0.01, 0.025, 0.1)

    def __init__(self, context: Context, *, strength: float = 0.025, period: int = 1000, own_steps: bool = False):
        super().__init__(context)
        require_range("redo", "strength", strength, 0, 1)
        require_range("redo", "period", period, 1, float("inf"))
        self.strength, self.period = strength, period
        self._activations, self._reset = MeanActivations(context.units), UnitReset(context, own_steps=own_steps)
        self._count_to(0)

    def after_step(self) -> None:
        self._reset.after_step()
        if self._activations.recording:
            self._reset.reset([self._dormant(mean) for mean in self._activations.means()])
        self._count_to(self._step + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "reset": self._reset.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count_to(state["step"])
        self._reset.load_state_dict(state["reset"])

    def _count_to(self, step: int) -> None:
        """`step` steps have been taken; the next one is looked at if the period ends with it."""
        self._step = step
        self._activations.recording = (step + 1) % self.period == 0

    def _dormant(self, features: Tensor) -> Tensor:
        activity = features.mean(0)  # (U,)
        return (activity <= self.strength * activity.mean()).nonzero().flatten().cpu()
