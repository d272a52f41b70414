"""Image sets in the IDX format: MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from spectral_ops.continual.data.dataset import FETCH_AGAIN, Dataset, check_labels, damaged
from spectral_ops.continual.data.root import find_data_root

# The IDX format (http://yann.lecun.com/exdb/mnist): two zero bytes, a type code, the number of dimensions, every
# dimension as a big-endian int32, then the values. 0x08 is unsigned byte, the only type these sets use.
_IDX_BYTE = 0x08
_SPLITS = {"train": "train", "test": "t10k"}
_SETS = {"MNIST": "mnist", "FashionMNIST": "fashion-mnist"}  # folders that `spectral-ops download` fills, and its word


def load_idx_folder(root: str | os.PathLike[str] | None, name: str, *, split: str = "train") -> tuple[Tensor, Tensor]:
    """The images and labels of one split of a set in the IDX format, in torchvision's folders.

    Reads `<root>/<name>/raw/train-images-idx3-ubyte` and `train-labels-idx1-ubyte` (`t10k-` for the test split), each
    either with `.gz` or without. Where both are there the `.gz` is read, because it carries a checksum.

    Args:
        root: the data root; None reads the environment variable SPECTRAL_OPS_DATA.
        name: the folder, e.g. "MNIST" or "FashionMNIST".
        split: "train" or "test".

    Returns:
        Images, uint8 (N, H, W), and labels, int64 (N,).

    Raises:
        ValueError: no data root, an unknown split, or a file that is not what its name says: not gzip, truncated, with
            a wrong checksum or magic number, with other sizes than its header states, or a different number of images
            and labels.
        FileNotFoundError: the root or a file is missing.

    Example:
        images, labels = load_idx_folder("/data", "MNIST")      # (60000, 28, 28), (60000,)
    """
    if split not in _SPLITS:
        raise ValueError(
            f"load_idx_folder: expected split to be one of {sorted(_SPLITS)}, got {split!r}. Pass 'train' or 'test'."
        )
    images_file, labels_file = _find_files(root, name, split)
    images = _read_idx(images_file, dimensions=3)  # (N, H, W)
    labels = _read_idx(labels_file, dimensions=1)  # (N,)
    if len(images) != len(labels):
        raise ValueError(
            f"load_idx_folder: expected as many labels as images, got {len(images)} images in {images_file} and "
            f"{len(labels)} labels in {labels_file}. Take both files from the same release and split."
        )
    return images, labels.to(torch.int64)


def read_idx(name: str, root: Path | None, split: str, samples: int | None) -> Dataset:
    """MNIST or a set made to replace it: ten classes at 28x28, one file for each split."""
    images, labels = load_idx_folder(root, name, split=split)
    images_file, labels_file = _find_files(root, name, split)
    if images.shape[1:] != (28, 28):
        raise damaged("load_idx_folder", images_file, "hold images of 28x28", "x".join(map(str, images.shape[1:])))
    check_labels("load_idx_folder", labels_file, labels, classes=10)
    return Dataset(images.unsqueeze(1), labels, 10)


def _find_files(root: str | os.PathLike[str] | None, name: str, split: str) -> tuple[Path, Path]:
    folder, prefix = find_data_root(root) / name / "raw", _SPLITS[split]
    return _find_file(folder, f"{prefix}-images-idx3-ubyte"), _find_file(folder, f"{prefix}-labels-idx1-ubyte")


def _find_file(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    known = _SETS.get(folder.parent.name)
    remedy = f"Fetch it: spectral-ops download {known}" if known else "Put the file there, as torchvision does"
    raise FileNotFoundError(f"load_idx_folder: expected {stem}.gz or {stem} in {folder}, got neither. {remedy}.")


def _read_bytes(path: Path) -> bytes:
    """The content of the file, decompressed where its name ends in .gz."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        got = f"{type(error).__name__}: {error}"
        raise damaged("load_idx_folder", path, "be a complete gzip file", got) from error


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """The unsigned bytes of an IDX file with the given number of dimensions, shape as its header states."""
    content = _read_bytes(path)
    expected_magic = bytes((0, 0, _IDX_BYTE, dimensions))
    if content[:4] != expected_magic:
        raise ValueError(
            f"load_idx_folder: expected {path} to begin with the magic number {expected_magic.hex(' ')} "
            f"(unsigned bytes, {dimensions} dimensions), got {content[:4].hex(' ') or 'an empty file'}. "
            f"Check that images and labels are not exchanged, or {FETCH_AGAIN}."
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(
            f"load_idx_folder: expected {path} to hold a header of {start} bytes, got {len(content)} bytes in all. "
            f"The file is truncated: {FETCH_AGAIN}."
        )
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    count = 1
    for size in shape:
        count *= size
    if count == 0 or len(content) - start != count:
        stated = "x".join(map(str, shape))
        raise ValueError(
            f"load_idx_folder: expected {path} to hold the {stated} = {count} > 0 values that its header states, "
            f"got {len(content) - start}. The file is truncated or altered: {FETCH_AGAIN}."
        )
    # bytearray: torch wants writable memory.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
