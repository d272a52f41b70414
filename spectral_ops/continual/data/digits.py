"""The handwritten digits that ship with scikit-learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spectral_ops.continual.data.dataset import Dataset
from spectral_ops.continual.optional import require

# The end is held out as it comes: neighbours tend to be of one writer, and a random split would put every writer on
# both sides.
TRAIN = 1497
FILE = Path("datasets", "data", "digits.csv.gz")  # in scikit-learn


def load_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits that ship with scikit-learn: no file, no network.

    Returns:
        Images, uint8 (1797, 8, 8) with values 0 to 16, and labels, int64 (1797,).

    Raises:
        RuntimeError: scikit-learn is missing.
    """
    # Without importing scikit-learn where its file is where it has always been: that takes 0.8 s of every process.
    path = _file()
    if path is not None:
        rows = np.loadtxt(path, delimiter=",", dtype=np.int64)  # 64 pixels and a label
        images, labels = rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]
    else:
        digits = require("sklearn.datasets", "load_digits").load_digits()
        images, labels = digits.images, digits.target
    return torch.tensor(images).to(torch.uint8), torch.tensor(labels).to(torch.int64)


def _file() -> Path | None:
    try:
        found = importlib.util.find_spec("sklearn")
    except (ImportError, ValueError):
        return None
    places = [] if found is None else [Path(place) / FILE for place in found.submodule_search_locations or ()]
    return next((path for path in places if path.is_file()), None)


def read_digits(root: Path | None, split: str, samples: int | None) -> Dataset:
    """The first 1,497 digits to train on, the last 300 to test."""
    images, labels = load_digits()
    rows = slice(None, TRAIN) if split == "train" else slice(TRAIN, None)
    return Dataset(images[rows].unsqueeze(1), labels[rows], 10)
