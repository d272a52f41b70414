"""SVHN, cropped street-view house numbers (Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spectral_ops.continual.data.dataset import Dataset, check_labels, damaged
from spectral_ops.continual.data.root import find_data_root
from spectral_ops.continual.optional import require

SVHN_FOLDERS = ("", "SVHN", "svhn")  # torchvision writes into the root itself, people move the files into a folder


def svhn_file(split: str) -> str:
    return f"{split}_32x32.mat"


def find_svhn(root: Path, split: str) -> Path | None:
    """The file of a split in the root or in a folder of its own, None where it is missing."""
    candidates = (root / folder / svhn_file(split) for folder in SVHN_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def read_svhn(root: Path | None, split: str, samples: int | None) -> Dataset:
    """All images of train_32x32.mat (73,257) or test_32x32.mat (26,032), MATLAB 5 files of one piece.

    Raises:
        RuntimeError: scipy is missing.
        FileNotFoundError: the file is missing.
        ValueError: it is not what its name says.
    """
    folder = find_data_root(root)
    path = find_svhn(folder, split)
    if path is None:
        raise FileNotFoundError(
            f"load_svhn: expected {svhn_file(split)} in {folder} or {folder / 'SVHN'}, got neither. "
            "Fetch it: spectral-ops download svhn."
        )
    images, labels = _read_mat(path)
    check_labels("load_svhn", path, labels, classes=10, first=1)
    return Dataset(images, labels % 10, 10)  # 10 stands for the digit 0


def _read_mat(path: Path) -> tuple[Tensor, Tensor]:
    loadmat = require("scipy.io", "load_svhn").loadmat
    try:
        content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # of a foreign or damaged file scipy raises anything from zlib.error to KeyError
        raise damaged("load_svhn", path, "be a MATLAB 5 file", f"{type(error).__name__}: {error}") from error
    x, y = content.get("X"), content.get("y")
    # MATLAB keeps the images last: (rows, columns, channels, N).
    if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3) or x.shape[3] == 0:
        raise damaged("load_svhn", path, "hold X as uint8 (32, 32, 3, N > 0)", _describe(x))
    if y is None or y.dtype.kind not in "iu" or y.shape != (x.shape[3], 1):
        raise damaged("load_svhn", path, f"hold y as whole numbers ({x.shape[3]}, 1)", _describe(y))
    images = np.ascontiguousarray(x.transpose(3, 2, 0, 1))  # (N, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(y[:, 0].astype(np.int64))


def _describe(array: np.ndarray | None) -> str:
    return "no such variable" if array is None else f"{array.dtype} {array.shape}"
