"""Tasks that exchange the labels of whole classes."""

from __future__ import annotations

import torch
from torch import nn

from spectral_ops.continual.streams.stream import Stream, Task


class LabelFlipping(Stream):
    """Every task renames the classes: with a permutation p drawn anew for each task, label y becomes p(y).

    All samples of a class change alike, so that features learned before stay useful and only what they mean changes;
    an image keeps its neighbours. The first task has the true labels. As "label-permuted" in Elsayed and Mahmood 2024
    (arXiv 2404.00781); in Lewandowski et al. 2025 "label flipping".
    """

    def task(self, task: int, model: nn.Module | None = None) -> Task:
        if task == 0:
            return Task(self.x, self.y, self.held_out_x, self.held_out_y)
        names = torch.randperm(self.classes, generator=self.generator(task, "classes"))
        return Task(self.x, names[self.y], self.held_out_x, names[self.held_out_y])
