"""Tasks made to contradict what was learned before."""

from __future__ import annotations

import torch
from torch import nn

from spectral_ops.continual.streams.stream import Stream, Task

_ROWS = 512  # images the model looks at together


class NextLabel(Stream):
    """Task t has the labels (y + t) mod C: every one of them wrong in the task before."""

    def task(self, task: int, model: nn.Module | None = None) -> Task:
        y, held_out_y = ((labels + task) % self.classes for labels in (self.y, self.held_out_y))
        return Task(self.x, y, self.held_out_x, held_out_y)


class LeastLikelyLabel(Stream):
    """Every task after the first gives each image the class that the model, as it is then, finds least likely.

    The model is read in evaluation mode and left as it was. Nothing is held out: the labels of other images would be
    those of the model's judgement, too.
    """

    reads_model = True
    holds_out = False

    def task(self, task: int, model: nn.Module | None = None) -> Task:
        if task == 0:
            return Task(self.x, self.y)
        if model is None:
            raise ValueError(f"least-likely-label: expected a model for task {task}, got None. Pass task(t, model).")
        device, training = next(model.parameters()).device, model.training
        model.eval()
        with torch.no_grad():
            y = torch.cat([model(rows.to(device)).argmin(1).cpu() for rows in self.x.split(_ROWS)])
        model.train(training)
        return Task(self.x, y)
