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
        self._shares: dict[Tensor, Tensor] = {}  # by parameter, (2, *shape): 1 - beta^t; 1 where no entry was reset
        self._since: dict[Tensor, int] = {}  # steps since the last reset of any entry

    def shares(self, parameter: Tensor) -> list[Tensor]:
        """What is to be set to 0 for entries that are reset now, each of the parameter's shape."""
        if not isinstance(self._optimizer, Adam | AdamW) or not self._optimizer.state.get(parameter):
            return []
        if parameter not in self._shares:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._shares[parameter] = parameter.new_ones((2, *parameter.shape), dtype=dtype)
        self._since[parameter] = 0
        return list(self._shares[parameter].unbind())

    @torch.no_grad()
    def correct(self) -> None:
        if not self._shares:
            return
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._shares and parameter.grad is not None:  # else it took no step
                    self._since[parameter] += 1
                    _correct(parameter, self._shares[parameter], self._optimizer.state[parameter], group)
                    if group["betas"][1] ** self._since[parameter] < _SMALL:
                        del self._shares[parameter], self._since[parameter]

    def state_dict(self) -> dict[str, Any]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._model.named_parameters()}
        shares = {names[parameter]: share for parameter, share in self._shares.items()}
        return {"shares": shares, "since": {names[parameter]: steps for parameter, steps in self._since.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = dict(self._model.named_parameters())
        held = {parameters[name]: share for name, share in state["shares"].items()}
        self._shares = {parameter: share.to(parameter.device, copy=True) for parameter, share in held.items()}
        self._since = {parameters[name]: steps for name, steps in state["since"].items()}


def _correct(parameter: Tensor, shares: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    m, v = state["exp_avg"], state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]

    def length(first: Tensor, second: Tensor) -> Tensor:
        return m / first / (v / second).sqrt_().add_(group["eps"])

    theirs, own = [], []
    for share, beta in zip(shares.unbind(), group["betas"], strict=True):
        share.lerp_(torch.ones((), dtype=share.dtype, device=share.device), 1 - beta)
        steps = state["step"].to(share.device, torch.float64)
        theirs.append(-torch.expm1(steps * math.log(beta)).to(share.dtype))
        own.append(share.minimum(theirs[-1]))  # t is T at most, and T where no entry was reset
    parameter.sub_((length(*own) - length(*theirs)).mul_(group["lr"]))
