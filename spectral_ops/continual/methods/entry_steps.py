"""Step counters of single entries, for optimizers that have one for a whole parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

_SMALL = 2.0**-26  # of a moment: less than this missing, and the bias correction is 1 in float32


class EntrySteps:
    """Adam's bias correction by the steps that an entry has taken since it was reset.

    torch's Adam divides its moments by 1 - beta^T, T the steps of the parameter. `correct`, right after a step, changes
    the entries that were reset to where the step of a fresh Adam would have left them, with t in place of T:

        p <- p - lr (m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + eps) - the same of T)

    Entries that were never reset are left alone, to the bit; a parameter costs nothing before its first reset and once
    beta_2^t is nothing in all of its entries. Of optimizers other than torch's Adam and AdamW (SGD has no counter) all
    is left alone.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module):
        self._optimizer, self._model = optimizer, model
        self._begun: dict[str, Tensor] = {}  # by parameter: its counter when an entry was reset; 0: never
        self._since: dict[str, int] = {}  # steps since the last reset of any entry

    def begun(self, parameter: Tensor) -> tuple[Tensor, float] | None:
        """Where to write, for entries that are reset now, and what; None where nothing is to be corrected."""
        counter = self._optimizer.state.get(parameter, {}).get("step")
        name = self._names().get(parameter)
        if name is None or counter is None or not isinstance(self._optimizer, Adam | AdamW):
            return None
        if name not in self._begun:
            self._begun[name] = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        self._since[name] = 0
        return self._begun[name], float(counter)

    @torch.no_grad()
    def correct(self) -> None:
        if not self._begun:
            return
        names = self._names()
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                name = names.get(parameter, "")
                if name in self._begun and parameter.grad is not None:  # else it took no step
                    self._since[name] += 1
                    _correct(parameter, self._begun[name], self._optimizer.state[parameter], group)
                    if group["betas"][1] ** self._since[name] < _SMALL:
                        del self._begun[name], self._since[name]

    def state_dict(self) -> dict[str, Any]:
        return {"begun": dict(self._begun), "since": dict(self._since)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = dict(self._model.named_parameters())
        self._begun = {name: x.to(parameters[name].device, copy=True) for name, x in state["begun"].items()}
        self._since = dict(state["since"])

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._model.named_parameters()}


def _correct(parameter: Tensor, begun: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    steps = state["step"].to(begun)
    m, v = state["exp_avg"], state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    eps, (beta_1, beta_2) = group["eps"], group["betas"]

    def length(t: Tensor) -> Tensor:
        first, second = (-torch.expm1(t * math.log(beta)) for beta in (beta_1, beta_2))
        return m / first / ((v / second).sqrt() + eps)

    difference = torch.where(begun > 0, length(steps - begun) - length(steps), 0.0)
    parameter.sub_(difference * group["lr"])
