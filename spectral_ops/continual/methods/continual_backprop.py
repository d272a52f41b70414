"""continual-backprop: a small share of the least useful units is made anew in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_ops.continual.methods.activations import MeanActivations
from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.unit_reset import UnitReset
from spectral_ops.continual.units import Units


class ContinualBackprop(Method):
    """After every step, in every layer: units grow older by one, their utilities follow

        u_i <- decay * u_i + (1 - decay) * mean |h_i| * sum_k |w_ki|,

    w_ki being the outgoing weights, and of the mature units, those older than `maturity` steps, the share `strength` is
    reset, least utility first. Shares of units add up over steps until they make a whole one. A reset unit begins with
    age and utility 0. What is reset, and how: see `UnitReset`.

    Args:
        strength: the replacement rate, per step.
        decay: of the utility.
        maturity: steps for which a new unit is left alone.
        own_steps: whether Adam counts the steps of a reset entry from its reset on, see `UnitReset`; as in the public
            code it does.

    Means are over the batch and over positions; the features of a unit with two copies (CReLU) contribute each.

    Source: Dohare et al. 2024 (Nature 632), equation 1 and Algorithm 1. Its public code differs in places, see
    docs/methods.md.
    """

    grid = (1e-6, 1e-5, 1e-4, 1e-3)

    def __init__(
        self,
        context: Context,
        *,
        strength: float = 1e-4,
        decay: float = 0.99,
        maturity: int = 100,
        own_steps: bool = True,
    ):
        super().__init__(context)
        require_range("continual-backprop", "strength", strength, 0, 1)
        require_range("continual-backprop", "decay", decay, 0, 1)
        require_range("continual-backprop", "maturity", maturity, 0, float("inf"))
        self.strength, self.decay, self.maturity = strength, decay, maturity
        self._activations, self._reset = MeanActivations(context.units), UnitReset(context, own_steps=own_steps)
        self._utility = [_outgoing(units).new_zeros(units.count) for units in context.units]
        self._age = [torch.zeros(units.count, dtype=torch.int64) for units in context.units]  # on the CPU: no waiting
        self._due = [0.0] * len(context.units)

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._utility:
            return
        self._reset.after_step()
        pairs = zip(self.context.units, self._activations.means(), strict=True)
        contributions = [(mean * _outgoing(units)).sum(0) for units, mean in pairs]
        torch._foreach_lerp_(self._utility, contributions, 1 - self.decay)
        torch._foreach_add_(self._age, 1)
        chosen = [self._choose(layer) for layer in range(len(self._age))]
        self._reset.reset(chosen)
        for age, utility, index in zip(self._age, self._utility, chosen, strict=True):
            if len(index):
                age[index] = 0
                utility[index.to(utility.device)] = 0

    def state_dict(self) -> dict[str, Any]:
        own = {"utility": self._utility, "age": self._age, "due": list(self._due)}
        return {**own, "reset": self._reset.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for own, saved in zip((*self._utility, *self._age), (*state["utility"], *state["age"]), strict=True):
            own.copy_(saved)
        self._due = list(state["due"])
        self._reset.load_state_dict(state["reset"])

    def _choose(self, layer: int) -> Tensor:
        """The units of the layer to reset now."""
        mature = (self._age[layer] > self.maturity).nonzero().flatten()
        self._due[layer] += self.strength * len(mature)
        count = min(int(self._due[layer]), len(mature))
        if count == 0:
            return mature[:0]
        self._due[layer] -= count
        return mature[self._utility[layer].cpu()[mature].argsort(stable=True)[:count]]


def _outgoing(units: Units) -> Tensor:
    """sum_k |w_ki| of every feature, (copies, U)."""
    weight: Any = units.outgoing.weight
    return torch.linalg.vector_norm(units.read_by(weight.detach()), 1, (0, 3))
