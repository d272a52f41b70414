"""Accuracy and loss while a task is learned: of every batch, before the step that is taken on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ELEMENTS = 1 << 20  # scores kept before they are looked at: one copy a step is all that it costs the loop


class Online:
    """Means over the steps of a task.

    Args:
        batch: samples of every step.
        classes: scores of every sample.
    """

    def __init__(self, batch: int, classes: int, device: torch.device):
        room = max(1, _ELEMENTS // (batch * classes))
        self._scores = torch.empty(room, batch, classes, device=device)
        self._labels = torch.empty(room, batch, dtype=torch.int64, device=device)
        self._held = 0
        self._sums = torch.zeros(2, dtype=torch.float64)  # correct ones, losses
        self._samples = 0

    @torch.no_grad()
    def add(self, scores: Tensor, labels: Tensor) -> None:
        if self._held == len(self._scores):
            self._look()
        self._scores[self._held] = scores
        self._labels[self._held] = labels
        self._held += 1

    def means(self) -> dict[str, float]:
        """Of the steps since the last `reset`."""
        self._look()
        accuracy, loss = (self._sums / max(self._samples, 1)).tolist()
        return {"online_accuracy": accuracy, "online_loss": loss}

    def reset(self) -> None:
        self._held = self._samples = 0
        self._sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        self._look()
        return {"sums": self._sums.clone(), "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._held, self._samples = 0, state["samples"]
        self._sums.copy_(state["sums"])

    @torch.no_grad()
    def _look(self) -> None:
        if self._held == 0:
            return
        scores, labels = self._scores[: self._held].flatten(0, 1), self._labels[: self._held].flatten()
        self._sums[0] += (scores.argmax(1) == labels).sum().item()
        # In float64, and step by step the same whenever it is called: a checkpoint in between changes nothing visible.
        self._sums[1] += F.cross_entropy(scores.double(), labels, reduction="sum").item()
        self._samples += len(labels)
        self._held = 0
