"""The contract of a stream of tasks, and what streams are drawn from: generators that depend on their names alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from spectral_ops.continual.data import Dataset


@dataclass(frozen=True)
class Task:
    """One task: what is trained on, and what is only looked at.

    Args:
        x, y: float32 (n, C, H, W) and int64 (n,).
        held_out_x, held_out_y: the same for samples that are not trained on; None where the labels mean nothing for
            them, as random ones do.
    """

    x: Tensor
    y: Tensor
    held_out_x: Tensor | None = None
    held_out_y: Tensor | None = None


class Stream:
    """A sequence of tasks over one data set: a pure function of (seed, task) and, where `reads_model`, of the model.

    The rows of every step follow from (seed, task, step) by `task_batches`. Inputs have every pixel of mean 0 and all
    together variance 1 over the training samples.

    Args:
        train, held_out: images and labels.
        seed: of all that is drawn.
        tasks: how many are wanted.
        samples, held_out_samples: how many are drawn, once for the whole stream; None for all there are.

    Raises:
        ValueError: fewer samples in the data set than asked for, or training images that are all alike.
    """

    reads_model: ClassVar[bool] = False  # whether task() needs the model as it is when the task before has ended
    holds_out: ClassVar[bool] = True  # whether tasks have held-out samples

    def __init__(
        self,
        train: Dataset,
        held_out: Dataset,
        *,
        seed: int,
        tasks: int,
        samples: int | None = None,
        held_out_samples: int | None = None,
    ):
        self.seed, self.tasks, self.classes = seed, tasks, train.classes
        rows, held_out_rows = self._rows(train, samples, "samples"), self._rows(held_out, held_out_samples, "held out")
        x = train.images[rows].float()
        mean = x.mean(0)
        scale = (x - mean).std()
        if not scale > 0:
            raise ValueError(
                f"stream: expected training images that differ, got {len(x)} without any variance. Raise --samples."
            )
        self.x, self.y = (x - mean) / scale, train.labels[rows]
        self.held_out_x = (held_out.images[held_out_rows].float() - mean) / scale
        self.held_out_y = held_out.labels[held_out_rows]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.x.shape[1:])

    def task(self, task: int, model: nn.Module | None = None) -> Task:
        """Task number `task`, from 0."""
        raise NotImplementedError

    def generator(self, task: int, purpose: str) -> torch.Generator:
        """A new one, which depends on (seed, task, purpose) alone: two of one purpose draw the same."""
        return stream_generator(self.seed, task, purpose)

    def _rows(self, data: Dataset, count: int | None, purpose: str) -> Tensor:
        order = torch.randperm(len(data.labels), generator=self.generator(0, purpose))
        if count is not None and not 1 <= count <= len(order):
            name = "samples" if purpose == "samples" else "held_out_samples"
            raise ValueError(
                f"stream: expected {name} from 1 to the {len(order)} images there are, got {count}. Change "
                f"--{name.replace('_', '-')}."
            )
        return order[:count]


def stream_generator(seed: int, task: int, purpose: str) -> torch.Generator:
    """A generator that depends on (seed, task, purpose) alone, not on what was drawn before."""
    digest = hashlib.sha256(f"{seed}/{task}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch's CPU generator takes 32 bits


def task_labels(seed: int, task: int, samples: int, classes: int = 10) -> Tensor:
    """The random labels of a task, int64 (samples,)."""
    return torch.randint(classes, (samples,), generator=stream_generator(seed, task, "labels"))


def task_batches(seed: int, task: int, samples: int, steps: int, batch: int) -> Tensor:
    """The rows of every step, int64 (steps, batch): passes over the shuffled samples, cut into equal batches."""
    generator = stream_generator(seed, task, "batches")
    passes = math.ceil(steps * batch / samples)
    order = torch.cat([torch.randperm(samples, generator=generator) for _ in range(passes)])
    return order[: steps * batch].view(steps, batch)


def stream_inputs(images: Tensor, seed: int, samples: int) -> Tensor:
    """The inputs of a stream, float32 (samples, pixels): every pixel of mean 0, all together of variance 1."""
    rows = torch.randperm(len(images), generator=stream_generator(seed, 0, "samples"))[:samples]
    x = images[rows].flatten(1).float()
    x = x - x.mean(0)
    return x / x.std()
