"""Batches whose rows follow from (seed, step) alone: not from a loader's position, nor from the number of processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bench.vit_training.options import IMAGE, Options
from bench.vit_training.processes import Processes
from spectral_ops.continual.data import Dataset, load_dataset
from spectral_ops.continual.streams.stream import stream_generator

SYNTHETIC_SAMPLES = 1024
PATTERN = 8  # side of the pattern that the synthetic images of a class share
# Of ImageNet's training images, in [0, 1]; as every ViT recipe has them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(options: Options) -> Dataset:
    """uint8 images (N, 3, side, side) with their labels.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: what the reader of the data set cannot give; a batch without
            enough images.
    """
    if options.data == "synthetic":
        data = synthetic(options)
    else:
        data = load_dataset(options.data, options.data_root, samples=options.samples)
        if options.side != IMAGE[options.data]:
            size = (options.side, options.side)
            larger = [interpolate(part.float(), size, mode="bilinear").byte() for part in data.images.split(256)]
            data = data._replace(images=torch.cat(larger))
    if options.batch > len(data.labels):
        raise ValueError(
            f"train_vit: expected --batch <= the {len(data.labels)} images, got {options.batch}. Change --samples."
        )
    return data


def synthetic(options: Options) -> Dataset:
    """A coarse pattern for each class under noise of the same strength: something that can be learned in few steps."""
    count = options.samples or SYNTHETIC_SAMPLES
    generator = stream_generator(options.seed, 0, "synthetic")
    labels = torch.arange(count) % options.classes
    patterns = torch.randint(
        128, (min(options.classes, count), 3, PATTERN, PATTERN), generator=generator, dtype=torch.uint8
    )
    shape = (count, 3, options.side, options.side)
    images = torch.randint(128, shape, generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image += interpolate(patterns[label].float().unsqueeze(0), shape[2:])[0].byte()
    return Dataset(images, labels, options.classes)


class Batches:
    """`batches(step)`: this process's images and labels of that step.

    Every epoch is a permutation of all images, cut into whole batches. Images are mirrored at random. They lie on the
    device, as bytes: what a step takes is the same for every penalty, and no loader's time is in it.

    Raises:
        ValueError: processes that do not divide the batch.
    """

    def __init__(self, data: Dataset, options: Options, processes: Processes):
        if options.batch % processes.world:
            raise ValueError(
                f"train_vit: expected --batch to be a multiple of the {processes.world} processes, "
                f"got {options.batch}. Change it."
            )
        self._images, self._labels = (x.to(processes.device) for x in (data.images, data.labels))
        self._seed, self._batch, self._device = options.seed, options.batch, processes.device
        share = options.batch // processes.world
        self._mine = slice(processes.rank * share, (processes.rank + 1) * share)
        self._epoch, self._order = -1, torch.empty(0)
        self._mean, self._std = (torch.tensor(x, device=processes.device).view(3, 1, 1) for x in (MEAN, STD))

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """The images of this process by number, and which of them are mirrored."""
        epoch, at = divmod(step, len(self._labels) // self._batch)
        if epoch != self._epoch:
            generator = stream_generator(self._seed, epoch, "order")
            self._epoch, self._order = epoch, torch.randperm(len(self._labels), generator=generator)
        rows = self._order[at * self._batch : (at + 1) * self._batch]
        mirrored = torch.rand(self._batch, generator=stream_generator(self._seed, step, "mirror")) < 0.5
        return rows[self._mine], mirrored[self._mine]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows, mirrored = (x.to(self._device, non_blocking=True) for x in self.rows(step))
        images = (self._images[rows].float() / 255 - self._mean) / self._std
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images), self._labels[rows]
