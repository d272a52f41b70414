"""The steps of a task, one network's or those of several at once: what is timed and measured, and where a run stops."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectral_ops import SpectralAdamW
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.methods.method import Method

_PATIENCE = 0.2  # seconds between two calls of progress

Progress = Callable[[int, int], None]
Gradients = TypeVar("Gradients")
Ratio = TypeVar("Ratio")


class Stopped(Exception):
    """The run was asked to stop and did so between two steps; a checkpoint holds where."""


class Stepper(ABC, Generic[Gradients, Ratio]):
    """Takes the steps of a task; what they train, and how its gradients are had, is for those who derive from it."""

    config: RunConfig
    optimizer: Optimizer
    method: Method
    task: int
    step: int  # the next one to take
    seconds: list[float]  # of this task: all, the method's
    _batches: Tensor  # the rows of every step, (steps, rows)

    def train_steps(self, checkpoint: Callable[[], None], progress: Progress, stop: Callable[[], bool]) -> Ratio | None:
        """The steps of the task from the next one on; the penalty's ratio at its last, None where none was left.

        Args:
            checkpoint: called several times a second, not after the last step.
            progress: called with (task, step) as often.
            stop: whether to stop, asked before each checkpoint.

        Raises:
            Stopped: see stop.
        """
        ratio, shown = None, time.perf_counter()
        while self.step < self.config.steps:
            start = time.perf_counter()
            last = self.step == self.config.steps - 1
            ratio = self._step(self._batches[self.step], measure=last)
            self.step += 1
            now = time.perf_counter()
            self.seconds[0] += now - start
            if now - shown > _PATIENCE:
                shown = now
                progress(self.task, self.step)
                if not last:
                    stopping = stop()  # asked first: set in between, it would end the run without a checkpoint of here
                    checkpoint()
                    if stopping:
                        raise Stopped
        if self._batches.is_cuda:  # steps are queued there, not done
            start = time.perf_counter()
            torch.cuda.synchronize(self._batches.device)
            self.seconds[0] += time.perf_counter() - start
        return ratio

    def _step(self, rows: Tensor, *, measure: bool) -> Ratio | None:
        """One optimizer step; with `measure` the norm of the penalty's gradient over that of the task's."""
        self._backward(rows)
        before = self._gradients() if measure else None
        start = time.perf_counter()
        penalty = self.method.penalty()
        if penalty is not None:
            penalty.backward()
        self.method.after_backward()
        middle = time.perf_counter()
        ratio = None if before is None else self._measure(before)
        then = time.perf_counter()
        self.optimizer.step()
        later = time.perf_counter()
        self.method.after_step()
        self.seconds[1] += (middle - start) + (time.perf_counter() - later)
        self.seconds[0] -= then - middle  # the measurement is no part of the step
        return ratio

    def _measure(self, before: Gradients) -> Ratio:
        """The ratio, with what the optimizer takes into its step where it does."""
        if not isinstance(self.optimizer, SpectralAdamW):
            return self._ratio(before)
        added = self.optimizer.penalty_gradients()
        penalised = [entry for entry in self.optimizer.entries if entry.name in added]
        own = [entry.parameter.grad for entry in penalised]
        try:
            for entry, gradient in zip(penalised, own, strict=True):
                more = added[entry.name]
                entry.parameter.grad = more if gradient is None else more.add_(gradient)
            return self._ratio(before)
        finally:
            for entry, gradient in zip(penalised, own, strict=True):
                entry.parameter.grad = gradient

    @abstractmethod
    def _backward(self, rows: Tensor) -> None:
        """The gradients of the task's loss on a batch, in place of those of the step before."""

    @abstractmethod
    def _gradients(self) -> Gradients:
        """Copies: the penalty adds to the gradients themselves."""

    @abstractmethod
    def _ratio(self, before: Gradients) -> Ratio:
        """The norm of what was added since to the gradients, over that of `before`, which is written to; NaN where that
        is 0."""
