"""Tasks in which classes arrive a few at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spectral_ops.continual.streams.stream import Stream, Task


class ClassIncremental(Stream):
    """Task t has the samples of the first (t + 1) * classes_per_task classes, in an order drawn from the seed.

    Args:
        classes_per_task: new ones in each task.
        cumulative: False for the new classes alone.

    Raises:
        ValueError: more tasks than the classes last for, or classes without a sample.

    Source: incremental CIFAR-100 of Dohare et al. 2024 (Nature 632), which is cumulative.
    """

    def __init__(self, *data: Any, classes_per_task: int = 1, cumulative: bool = True, **common: Any):
        super().__init__(*data, **common)
        if not 1 <= classes_per_task <= self.classes:
            raise ValueError(
                f"class-incremental: expected classes_per_task from 1 to {self.classes}, got {classes_per_task}. "
                "Change --stream-options classes_per_task=..."
            )
        possible = -(-self.classes // classes_per_task)
        if self.tasks > possible:
            raise ValueError(
                f"class-incremental: expected at most {possible} tasks of {classes_per_task} new classes among "
                f"{self.classes}, got {self.tasks}. Lower --tasks."
            )
        missing = sorted(set(range(self.classes)) - set(self.y.tolist()))
        if missing:
            raise ValueError(
                f"class-incremental: expected every class among the {len(self.y)} samples, got none of {missing[:5]}. "
                "Raise --samples."
            )
        self.classes_per_task, self.cumulative = classes_per_task, cumulative

    def task(self, task: int, model: nn.Module | None = None) -> Task:
        order = torch.randperm(self.classes, generator=self.generator(0, "classes"))
        begin = 0 if self.cumulative else task * self.classes_per_task
        present = order[begin : (task + 1) * self.classes_per_task]
        rows, held_out = torch.isin(self.y, present), torch.isin(self.held_out_y, present)
        if not held_out.any():  # few samples are held out, and none of these classes
            return Task(self.x[rows], self.y[rows])
        return Task(self.x[rows], self.y[rows], self.held_out_x[held_out], self.held_out_y[held_out])
