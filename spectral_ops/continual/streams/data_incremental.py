"""Tasks in which the data set grows."""

from __future__ import annotations

from torch import nn

from spectral_ops.continual.streams.stream import Stream, Task


class DataIncremental(Stream):
    """Task t of T has the first (t + 1) / T of the samples: the warm start, training on as more data arrives.

    What it costs to have begun on a part shows as held-out accuracy below that of a network trained on all the data at
    once (method reset). Two tasks are the experiment of Ash and Adams 2020 (arXiv 1910.08475).
    """

    def task(self, task: int, model: nn.Module | None = None) -> Task:
        count = max(1, len(self.x) * (task + 1) // self.tasks)
        return Task(self.x[:count], self.y[:count], self.held_out_x, self.held_out_y)
