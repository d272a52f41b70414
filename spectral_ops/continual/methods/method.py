"""The contract of a method: what the trainer calls, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_ops.continual.units import Units


@dataclass
class Context:
    """What a method works on.

    Args:
        model: the network that is trained.
        optimizer: its optimizer; `optimizer.state[p]` holds moments and step counters.
        units: the model's hidden units, in the order of its layers.
        output: the name of the module that gives the scores, e.g. "layers.4"; its parameters are "layers.4.weight", ...
        generator: the method's own randomness, on the CPU; the trainer saves and restores it.
        initialize: initialize(task) is the state_dict of the model freshly initialised, a function of the run's seed
            and `task` alone; initialize(0) is what the run began with.
    """

    model: nn.Module
    optimizer: Optimizer
    units: list[Units]
    output: str
    generator: torch.Generator
    initialize: Callable[[int], dict[str, Tensor]]


class Method:
    """One way to keep a network trainable: subclass it, override what is needed, and give the options defaults.

        for task in tasks:
            if task > 0: method.on_task_boundary(task)
            for x, y in batches:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                if (penalty := method.penalty()) is not None: penalty.backward()
                method.after_backward()
                optimizer.step()
                method.after_step()

    An option is a keyword argument of `__init__`; `--options period=100` sets it, and its annotation and default are
    what the command line knows of it. `strength` is the one that `sweep` varies.

    Example:
        class Decay(Method):
            def __init__(self, context, *, strength: float = 1e-4):
                super().__init__(context)
                self.strength = strength

            def penalty(self):
                return self.strength * sum(p.square().sum() for p in self.context.model.parameters())
    """

    grid: ClassVar[tuple[float, ...]] = ()  # strengths that are usually tried; empty: the method has none
    task_boundaries: bool = False  # whether it must be told where a task ends

    def __init__(self, context: Context):
        self.context = context

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        """Change the model before its optimizer is made, as a parametrization does."""

    def penalty(self) -> Tensor | None:
        """A differentiable term of the loss, or None."""
        return None

    def after_backward(self) -> None:
        """Gradients are there, weights as they were in the forward pass."""

    def after_step(self) -> None:
        """The optimizer has taken its step."""

    def on_task_boundary(self, task: int) -> None:
        """Task `task` > 0 is about to begin."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beyond model, optimizer and generator: tensors, numbers, strings, and dicts and lists of
        them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the model and the optimizer have been restored before."""
