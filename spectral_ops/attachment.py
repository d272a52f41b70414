"""What `SpectralRegularizer.attach` returns: the penalty added at the start of every step of an optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from spectral_ops.regularizer import SpectralRegularizer

LARGEST_FLOAT16 = torch.finfo(torch.float16).max


class Attachment:
    """What `attach` returns: `remove()` ends it; `penalty` is strength * R at the last step, None before the first."""

    def __init__(self, reg: SpectralRegularizer, optimizer: Optimizer):
        self.penalty: Tensor | None = None
        self._reg, self._optimizer = reg, optimizer
        self._claim()
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Ends the attachment; further calls do nothing."""
        self._handle.remove()
        self._release()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _release(self) -> None:
        self._reg._owners = {name: owner for name, owner in self._reg._owners.items() if owner is not self}
        self._reg._placed = None

    def _claim(self) -> None:
        """Takes the treated parameters that the optimizer holds now."""
        reg = self._reg
        self._held = self._held_now()
        held = set(self._held)
        names = [entry.name for entry in reg._treated if id(entry.parameter) in held]
        if not names:
            first = reg._treated[0].name
            raise ValueError(
                f"attach: expected optimizer to hold parameters of the regularizer ({first!r}, ...), got none of them. "
                "Attach to the optimizer that was given this model's parameters."
            )
        for name in names:
            if reg._owners.get(name, self) is not self:
                raise RuntimeError(
                    f"attach: expected parameter {name!r} to be attached to no other optimizer, got one that is. Call "
                    "remove() on the first handle."
                )
        self._release()
        reg._owners |= dict.fromkeys(names, self)

    def _held_now(self) -> list[int]:
        return [id(p) for group in self._optimizer.param_groups for p in group["params"]]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # args starts with the optimizer itself.
        if kwargs.get("closure") is not None or any(callable(a) and a is not optimizer for a in args):
            raise RuntimeError(
                "attach: expected optimizer.step() without a closure, got one. A closure computes the gradients anew "
                "and would discard the penalty: add reg() to the loss inside it."
            )
        if self._held_now() != self._held:  # add_param_group
            self._claim()
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        with torch.no_grad():
            self.penalty = self._reg._accumulate(self, scale, found_inf)
            if scale is not None:
                self._saturate()

    def _saturate(self) -> None:
        """GradScaler has looked for infinities already: one that the scaled penalty makes would reach the weights."""
        served = [entry.parameter for entry in self._reg._treated if self._reg._owners.get(entry.name) is self]
        halves = [p for p in served if p.grad is not None and p.grad.dtype == torch.float16]
        if halves:  # one call for all: on a device a launch or two
            torch.nn.utils.clip_grad_value_(halves, LARGEST_FLOAT16)
