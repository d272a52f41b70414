"""How active units are in training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops.continual.units import Units


class MeanActivations:
    """Mean |activation| of every feature in the last forward pass of training, over samples and positions.

    By forward hooks that do nothing in evaluation mode and keep no graph. The last pass and not all since: what a
    stream or a measure computes between two steps must not count.

    Args:
        units: the layers to look at.
    """

    def __init__(self, units: list[Units]):
        self.recording = True
        """Whether to look at all; hooks that are not needed cost next to nothing then."""
        self._means: list[Tensor | None] = [None] * len(units)
        for layer, unit in enumerate(units):
            unit.activation.register_forward_hook(partial(self._record, layer, unit.dim, unit.copies))

    def means(self) -> list[Tensor]:
        """(copies, U) of every layer."""
        found = [mean for mean in self._means if mean is not None]
        assert len(found) == len(self._means), "after_step without a forward pass in training mode"
        return found

    @torch.no_grad()
    def _record(self, layer: int, dim: int, copies: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.recording and module.training:
            others = [d for d in range(output.ndim) if d != dim % output.ndim]
            total = torch.linalg.vector_norm(output.detach(), 1, others)  # one pass, no copy of |output|
            self._means[layer] = (total * (total.numel() / output.numel())).view(copies, -1)
