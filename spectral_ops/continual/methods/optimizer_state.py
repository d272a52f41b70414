"""Forgetting what an optimizer remembers: of everything, or of some entries of a parameter."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def clear_all(optimizer: Optimizer) -> None:
    """Moments and step counters of all parameters; they begin anew, as in a new optimizer, at the next step."""
    optimizer.state.clear()


def moments(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """What the optimizer keeps for every entry of the parameter: Adam's two moments, SGD's momentum.

    Step counters are not among them. torch's Adam has one for the whole parameter: set back to 0, it would correct the
    moments of all other entries as if they were of the first step.
    """
    kept = optimizer.state.get(parameter, {}).values()
    return [value for value in kept if isinstance(value, Tensor) and value.shape == parameter.shape]
