"""Several runs in memory, each with its own stream, network and method, that take their steps as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from spectral_ops.continual.checkpoint import State
from spectral_ops.continual.ensemble.methods import check_method, stack_method
from spectral_ops.continual.ensemble.optimizers import gather, scatter, stack_optimizer
from spectral_ops.continual.ensemble.stack import Stack
from spectral_ops.continual.ensemble.trees import cat, chunk
from spectral_ops.continual.methods import Context
from spectral_ops.continual.run_folder import Record
from spectral_ops.continual.steps import Progress, Stepper
from spectral_ops.continual.streams.stream import stream_generator
from spectral_ops.continual.trainer import Trainer

_KEPT = 64  # steps whose scores are handed on together: one by one, and run by run, that takes 2 % of a small step


class Ensemble(Stepper[list[Tensor], list[float]]):
    """Runs that differ in their seed alone.

    Each has its `Trainer`, which begins its tasks, measures, and says what a checkpoint holds. Between, in the steps, a
    stack of the networks is trained by one optimizer and one method. `_scatter` brings the trainers up to date with the
    stack, `_gather` the stack with the trainers.

    Raises:
        CannotShare: a model or a method that cannot be stacked.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        self.trainers = list(trainers)
        self.config = config = trainers[0].config
        check_method(config.method)
        self.stack = stack = Stack([trainer.model for trainer in trainers])
        self.optimizer = stack_optimizer(config, stack, [trainer.optimizer for trainer in trainers])
        methods = [trainer.method for trainer in trainers]
        context = Context(stack.model, self.optimizer, [], trainers[0].model.output, torch.Generator(), self._initial)
        self.method = stack_method(stack, context, methods, trainers[0].method_options())
        self.task, self.step = 0, 0
        self.seconds = [0.0, 0.0]  # of all runs together
        self._seen: list[tuple[Tensor, Tensor]] = []  # scores and labels of the last steps
        self._gather()

    def train_task(
        self,
        checkpoint: Callable[[], None] = lambda: None,
        progress: Progress = lambda task, step: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Record]:
        """From the next step to the end of its task; the task's record of every run. See `Trainer.train_task`."""
        self.begin_task()
        ratios: Sequence[float | None] = self.train_steps(checkpoint, progress, stop) or [None] * len(self.trainers)
        self._scatter()
        records = [trainer.finish_task(ratio) for trainer, ratio in zip(self.trainers, ratios, strict=True)]
        self.task, self.step, self.seconds = self.task + 1, 0, [0.0, 0.0]
        progress(self.task, 0)
        return records

    def begin_task(self) -> None:
        self._scatter()
        for trainer in self.trainers:
            trainer.begin_task()
        self._gather()  # what a method did at the boundary
        xs, ys, rows = zip(*(trainer.samples for trainer in self.trainers), strict=True)
        # One tensor of all, so that a step's batches are one look-up.
        self._x = torch.cat(xs)
        self._labels = torch.stack([y[r] for y, r in zip(ys, rows, strict=True)], 1)  # (steps, S, batch)
        starts = accumulate(map(len, ys[:-1]), initial=0)
        self._batches = torch.cat([r + start for r, start in zip(rows, starts, strict=True)], 1)  # (steps, S * batch)

    def state_dicts(self) -> list[State]:
        """Of every run what its `Trainer` would hold had it been trained alone, and nothing of the others."""
        self._scatter()
        return [_own({**trainer.state_dict(), "random": _random(trainer)}) for trainer in self.trainers]

    def load_state_dicts(self, states: Sequence[State]) -> None:
        """States of one point."""
        for trainer, state in zip(self.trainers, states, strict=True):
            trainer.load_state_dict(state)
        first = self.trainers[0]
        self.task, self.step = first.task, first.step
        self.seconds = [sum(parts) for parts in zip(*(trainer.seconds for trainer in self.trainers), strict=True)]
        self._gather()

    # ---- inside ----

    def _initial(self, task: int) -> dict[str, Tensor]:
        return cat([trainer.method.context.initialize(task) for trainer in self.trainers])

    def _gather(self) -> None:
        gather(self.stack, self.optimizer, [trainer.optimizer for trainer in self.trainers])
        self.method.load_state_dict(cat([trainer.method.state_dict() for trainer in self.trainers]))

    def _scatter(self) -> None:
        self._look()
        scatter(self.stack, self.optimizer, [trainer.optimizer for trainer in self.trainers])
        states = chunk(self.method.state_dict(), len(self.trainers))
        for trainer, state in zip(self.trainers, states, strict=True):
            trainer.method.load_state_dict(state)
            trainer.task, trainer.step = self.task, self.step
            trainer.seconds = [seconds / len(self.trainers) for seconds in self.seconds]

    def _backward(self, rows: Tensor) -> None:
        x, y = self.stack.split(self._x.index_select(0, rows)), self._labels[self.step]
        if len(self._seen) == _KEPT:
            self._look()
        self._seen.append((self.stack.backward(x, y), y))

    def _look(self) -> None:
        """Hands what the last steps scored to the runs."""
        if self._seen:
            scores, labels = (torch.stack(x, 1).flatten(1, 2) for x in zip(*self._seen, strict=True))
            for trainer, own, its in zip(self.trainers, scores.unbind(), labels.unbind(), strict=True):
                trainer.online.add(own, its)
            self._seen = []

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.stack.model.parameters()]

    def _ratio(self, before: list[Tensor]) -> list[float]:
        tasks = self._norms(before)
        for old, p in zip(before, self.stack.model.parameters(), strict=True):
            if p.grad is not None:
                old.sub_(p.grad)
        return torch.where(tasks > 0, self._norms(before) / tasks, torch.nan).tolist()

    def _norms(self, stacked: list[Tensor]) -> Tensor:
        """Of every network, all its tensors together."""
        return torch.stack([self.stack.split(x).flatten(1).norm(dim=1) for x in stacked]).norm(dim=0)


def _random(trainer: Trainer) -> Tensor:
    """The random state of a run alone: what it was seeded with, since no step of a stacked network draws from it."""
    seed = stream_generator(trainer.config.seed, 0, "training").initial_seed()
    return torch.Generator().manual_seed(seed).get_state()


def _own(tree: Any) -> Any:
    """Copies of all tensors: a view is saved with the whole of what it looks at."""
    if isinstance(tree, dict):
        return {key: _own(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_own(value) for value in tree)
    return tree.clone() if isinstance(tree, Tensor) else tree
