"""What a reader returns, and the checks that all readers share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

FETCH_AGAIN = "move it away and fetch it again with spectral-ops download"  # which overwrites nothing


class Dataset(NamedTuple):
    """Images as they are stored, uint8 (N, C, H, W), and their labels, int64 (N,) from 0 to classes - 1."""

    images: Tensor
    labels: Tensor
    classes: int


# (data root or None, "train" or "test", samples or None): at least `samples` images, None for all there are.
Reader = Callable[[Path | None, str, int | None], Dataset]


def damaged(reader: str, path: Path, expected: str, got: object) -> ValueError:
    """The error for a file that is not what its name says: `expected` continues "expected <path> to"."""
    return ValueError(
        f"{reader}: expected {path} to {expected}, got {got}. "
        f"The file is truncated, damaged or something else: {FETCH_AGAIN}."
    )


def check_labels(reader: str, path: Path, labels: Tensor, classes: int, first: int = 0) -> None:
    """ValueError that names the file when its labels are not all from `first` to `first + classes - 1`."""
    low, high = int(labels.min()), int(labels.max())
    if low < first or high >= first + classes:
        raise damaged(reader, path, f"hold labels from {first} to {first + classes - 1}", f"{low} to {high}")
