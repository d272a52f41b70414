"""Tasks that shuffle the pixels of all images alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_ops.continual.streams.stream import Stream, Task


class PermutedPixels(Stream):
    """Every task has a new permutation of the pixels, the same for all images and channels; labels are the true ones.

    Goodfellow et al. 2013 (arXiv 1312.6211).
    """

    def task(self, task: int, model: nn.Module | None = None) -> Task:
        order = torch.randperm(self.x[0, 0].numel(), generator=self.generator(task, "pixels"))

        def permuted(x: Tensor) -> Tensor:
            return x.flatten(2)[:, :, order].view_as(x)

        return Task(permuted(self.x), self.y, permuted(self.held_out_x), self.held_out_y)
