"""Readers of image sets, from files alone. Each returns the integers as they are stored; a stream scales them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from torch import Tensor

from spectral_ops.continual.choices import choose
from spectral_ops.continual.data.cifar import CIFAR, read_cifar
from spectral_ops.continual.data.dataset import Dataset, Reader
from spectral_ops.continual.data.digits import load_digits, read_digits
from spectral_ops.continual.data.idx import load_idx_folder, read_idx
from spectral_ops.continual.data.root import DATA_VARIABLE, choose_data_root, find_data_root
from spectral_ops.continual.data.svhn import read_svhn
from spectral_ops.continual.data.tiny_imagenet import read_tiny_imagenet
from spectral_ops.continual.optional import require

__all__ = [
    "DATASETS",
    "DATA_VARIABLE",
    "Dataset",
    "find_data_root",
    "load_dataset",
    "load_digits",
    "load_idx_folder",
    "load_images",
    "require",
]

DATASETS: dict[str, Reader] = {
    "digits": read_digits,
    "mnist": partial(read_idx, "MNIST"),
    "fashion-mnist": partial(read_idx, "FashionMNIST"),
    **{name: partial(read_cifar, name) for name in CIFAR},
    "svhn": read_svhn,
    "tiny-imagenet": read_tiny_imagenet,
}
SPLITS = {split: split for split in ("train", "test")}


def load_dataset(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    split: str = "train",
    samples: int | None = None,
    download: bool = False,
) -> Dataset:
    """The images and labels of one split of a data set.

    Args:
        name: one of DATASETS.
        root: the data root, with the folders that torchvision writes; None reads the environment variable
            SPECTRAL_OPS_DATA. digits needs none.
        split: "train" or "test"; of tiny-imagenet the test images are its validation set.
        samples: at least so many are needed. Only as many files as that takes are read, and all that they hold is
            returned; None for all there are.
        download: fetch what is missing of the set first, both splits.

    Returns:
        Dataset: images, uint8 (N, C, H, W), labels, int64 (N,), and the number of classes.

    Raises:
        ValueError: an unknown name or split, no data root, more samples than there are, or a file that is not what its
            name says; the text names the file and what was expected.
        FileNotFoundError: the root or a file that is needed is missing.
        RuntimeError: a package is missing: scikit-learn for digits, scipy for svhn, Pillow for tiny-imagenet, pooch to
            download.
        OSError: the download failed.

    Example:
        images, labels, classes = load_dataset("cifar-10", "/data", samples=5000)      # (10000, 3, 32, 32): one file
    """
    reader, split = choose("data", name, DATASETS), choose("split", split, SPLITS)
    if samples is not None and samples < 1:
        raise ValueError(f"load_dataset: expected samples >= 1, got {samples}. Change --samples.")
    if download:
        from spectral_ops.continual.data.download import download_dataset  # a command too, with tyro: seldom needed

        download_dataset(name, choose_data_root(root))
    data = reader(Path(root) if root is not None else None, split, samples)
    if samples is not None and samples > len(data.labels):
        raise ValueError(
            f"load_dataset: expected samples <= {len(data.labels)}, the images of {name} ({split}), got {samples}. "
            "Ask for fewer."
        )
    return data


def load_images(name: str, root: str | os.PathLike[str] | None = None) -> Tensor:
    """All training images of "digits", "mnist" or "fashion-mnist", uint8 (N, H, W); of digits all 1,797."""
    return load_digits()[0] if name == "digits" else load_dataset(name, root).images[:, 0]
