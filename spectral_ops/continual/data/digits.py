"""The handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spectral_ops.continual.data.dataset import Dataset
from spectral_ops.continual.optional import require

# The end is held out as it comes: neighbours tend to be of one writer, and a random split would put every writer on
# both sides.
TRAIN = 1497


def load_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits that ship with scikit-learn: no file, no network.

    Returns:
        Images, uint8 (1797, 8, 8) with values 0 to 16, and labels, int64 (1797,).

    Raises:
        RuntimeError: scikit-learn is missing.
    """
    digits = require("sklearn.datasets", "load_digits").load_digits()
    return torch.tensor(digits.images).to(torch.uint8), torch.tensor(digits.target).to(torch.int64)


def read_digits(root: Path | None, split: str, samples: int | None) -> Dataset:
    """The first 1,497 digits to train on, the last 300 to test."""
    images, labels = load_digits()
    rows = slice(None, TRAIN) if split == "train" else slice(TRAIN, None)
    return Dataset(images[rows].unsqueeze(1), labels[rows], 10)
