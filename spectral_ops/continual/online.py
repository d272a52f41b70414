"""Accuracy and loss while a task is learned: of every batch, before the step that is taken on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores are kept for a while before they are looked at: to keep them is all that it costs the loop.
_ELEMENTS = 1 << 20  # at most
_STEPS = 64  # at most, on a CPU. Each lies in a hole that a freed gradient has left, which the next one then does not
# fit in: of 2000 steps kept the heap grew by 200 MB, and a step had 80 page faults, a fifth of its time.
_CACHED = 1 << 18  # at most, on a CPU: to look at more, at 2 MB of float64, took page faults, too


class Online:
    """Means over the steps of a task.

    Args:
        batch: samples of every step.
        classes: scores of every sample.
    """

    def __init__(self, batch: int, classes: int):
        self._batch, self._room = batch, max(batch, _ELEMENTS // classes)  # samples
        self._few = batch * min(_STEPS, max(1, _CACHED // (classes * batch)))
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._kept = 0  # samples of these
        self._correct, self._loss, self._samples = 0, 0.0, 0  # sums

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Of one step or several in a row; without a graph, and not to be written to from now on."""
        if self._kept >= (self._room if scores.is_cuda else self._few):  # to look waits for the device
            self._look()
        self._scores.append(scores)
        self._labels.append(labels)
        self._kept += len(labels)

    def means(self) -> dict[str, float]:
        """Of the steps since the last `reset`."""
        self._look()
        samples = max(self._samples, 1)
        return {"online_accuracy": self._correct / samples, "online_loss": self._loss / samples}

    def reset(self) -> None:
        self._scores, self._labels, self._kept = [], [], 0
        self._correct, self._loss, self._samples = 0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        self._look()
        return {"correct": self._correct, "loss": self._loss, "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self._correct, self._loss, self._samples = state["correct"], state["loss"], state["samples"]

    @torch.no_grad()
    def _look(self) -> None:
        if not self._scores:
            return
        scores, labels = torch.cat(self._scores), torch.cat(self._labels)
        self._correct += int((scores.argmax(1) == labels).sum())
        # Samples last: 4 times as fast on a CPU, of few classes. Step by step: the same sum wherever a checkpoint cuts.
        by_step = scores.double().unflatten(0, (-1, self._batch)).mT
        losses = F.cross_entropy(by_step, labels.view(-1, self._batch), reduction="none").sum(1)
        for loss in losses.tolist():
            self._loss += loss
        self._samples += len(labels)
        self._scores, self._labels, self._kept = [], [], 0
