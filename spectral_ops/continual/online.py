"""Accuracy and loss while a task is learned: of every batch, before the step that is taken on it."""

from __future__ import annotations

from collections.abc import Sequence
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
        self._correct, self._loss, self._samples = 0, 0.0, 0  # sums

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
        samples = max(self._samples, 1)
        return {"online_accuracy": self._correct / samples, "online_loss": self._loss / samples}

    def reset(self) -> None:
        self._held = 0
        self._correct, self._loss, self._samples = 0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        self._look()
        return {"correct": self._correct, "loss": self._loss, "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._held = 0
        self._correct, self._loss, self._samples = state["correct"], state["loss"], state["samples"]

    @torch.no_grad()
    def _look(self) -> None:
        if self._held == 0:
            return
        scores, labels = self._scores[: self._held].flatten(0, 1), self._labels[: self._held].flatten()
        losses = F.cross_entropy(scores.double(), labels, reduction="none").view(self._held, -1).sum(1)
        self._correct += int((scores.argmax(1) == labels).sum())
        for loss in losses.tolist():  # step by step: the same sum wherever a checkpoint cuts it
            self._loss += loss
        self._samples += len(labels)
        self._held = 0


class OnlineTogether:
    """Of several runs of the same sizes, whose steps are then two copies and not two for each.

    Args:
        members: with nothing held; they go on as they were, to be asked, saved and loaded.
    """

    def __init__(self, members: Sequence[Online]):
        self._members = members
        scores, labels = members[0]._scores, members[0]._labels
        self._scores = scores.new_empty(len(scores), len(members), *scores.shape[1:])
        self._labels = labels.new_empty(len(labels), len(members), *labels.shape[1:])
        for i, member in enumerate(members):
            member._scores, member._labels = self._scores[:, i], self._labels[:, i]

    @torch.no_grad()
    def add(self, scores: Tensor, labels: Tensor) -> None:
        """(S, batch, classes) and (S, batch)."""
        held = self._members[0]._held
        if held == len(self._scores):
            for member in self._members:
                member._look()
            held = 0
        self._scores[held] = scores
        self._labels[held] = labels
        for member in self._members:
            member._held = held + 1
