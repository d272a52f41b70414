"""Tasks of fresh random labels for the same images."""

from __future__ import annotations

from torch import nn

from spectral_ops.continual.streams.stream import Stream, Task, task_labels


class RandomLabels(Stream):
    """Every task draws a new label for each image: memorisation, equally hard each time.

    There is nothing to generalise to, so that nothing is held out. Zhang et al. 2017; as a test of plasticity: Lyle et
    al. 2023 (arXiv 2303.01486), Lewandowski et al. 2025.
    """

    holds_out = False

    def task(self, task: int, model: nn.Module | None = None) -> Task:
        return Task(self.x, task_labels(self.seed, task, len(self.x), self.classes))
