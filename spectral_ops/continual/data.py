"""Readers of small image sets, from files alone, and the stream of random-label tasks drawn over them.

A reader returns the stored integers; `stream_inputs` scales them.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import math
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA_VARIABLE = "SPECTRAL_OPS_DATA"

# The IDX format (http://yann.lecun.com/exdb/mnist): two zero bytes, a type code, the number of dimensions, every
# dimension as a big-endian int32, then the values. 0x08 is unsigned byte, the only type these sets use.
_IDX_BYTE = 0x08
_IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_SPLITS = {"train": "train", "test": "t10k"}


def require(module: str, operation: str) -> Any:
    """The module `module`, for `operation`; its absence is an error that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # The whole error is shown: a module that is there but broken fails here too.
        raise RuntimeError(
            f"{operation}: expected {module} to be importable, got {type(error).__name__}: {error}. "
            'Install it with: pip install "spectral_ops[continual]".'
        ) from error


def find_data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The data root: `root` if given, otherwise the environment variable SPECTRAL_OPS_DATA.

    Raises:
        ValueError: neither is given.
        FileNotFoundError: the folder does not exist.
    """
    source = "root" if root is not None else DATA_VARIABLE
    chosen = root if root is not None else os.environ.get(DATA_VARIABLE)
    if not chosen:
        raise ValueError(
            f"find_data_root: expected a data root, got root={root!r} and {DATA_VARIABLE} unset or empty. "
            f"Set {DATA_VARIABLE} (or pass --data-root) to the folder that holds MNIST/raw."
        )
    path = Path(chosen)
    if not path.is_dir():
        raise FileNotFoundError(
            f"find_data_root: expected {source} to be an existing folder, got {path}. "
            f"Point {DATA_VARIABLE} or --data-root at the folder that holds MNIST/raw."
        )
    return path


def load_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits that ship with scikit-learn: no file, no network.

    Returns:
        Images, uint8 (1797, 8, 8) with values 0 to 16, and labels, int64 (1797,).

    Raises:
        RuntimeError: scikit-learn is missing.
    """
    digits = require("sklearn.datasets", "load_digits").load_digits()
    return torch.tensor(digits.images).to(torch.uint8), torch.tensor(digits.target).to(torch.int64)


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
    folder = find_data_root(root) / name / "raw"
    images_file = _find_file(folder, f"{_SPLITS[split]}-images-idx3-ubyte")
    labels_file = _find_file(folder, f"{_SPLITS[split]}-labels-idx1-ubyte")
    images = _read_idx(images_file, dimensions=3)  # (N, H, W)
    labels = _read_idx(labels_file, dimensions=1)  # (N,)
    if len(images) != len(labels):
        raise ValueError(
            f"load_idx_folder: expected as many labels as images, got {len(images)} images in {images_file} and "
            f"{len(labels)} labels in {labels_file}. Take both files from the same release and split."
        )
    return images, labels.to(torch.int64)


def load_images(name: str, root: str | os.PathLike[str] | None = None) -> Tensor:
    """All training images of "digits", "mnist" or "fashion-mnist", uint8 (N, H, W); see the reader of each."""
    return load_digits()[0] if name == "digits" else load_idx_folder(root, _IDX_FOLDERS[name])[0]


def stream_generator(seed: int, task: int, purpose: str) -> torch.Generator:
    """A generator that depends on (seed, task, purpose) alone, not on what was drawn before."""
    digest = hashlib.sha256(f"{seed}/{task}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch's CPU generator takes 32 bits


def task_labels(seed: int, task: int, samples: int) -> Tensor:
    """The random labels of a task, int64 (samples,)."""
    return torch.randint(10, (samples,), generator=stream_generator(seed, task, "labels"))


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


def _find_file(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}.gz", folder / stem):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"load_idx_folder: expected {stem}.gz or {stem} in {folder}, got neither. "
        "Put the original IDX file there, in the folders that torchvision writes."
    )


def _read_bytes(path: Path) -> bytes:
    """The content of the file, decompressed where its name ends in .gz."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"load_idx_folder: expected {path} to be a complete gzip file, got {type(error).__name__}: {error}. "
            "The file is truncated, damaged or something else: fetch it again."
        ) from error


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """The unsigned bytes of an IDX file with the given number of dimensions, shape as its header states."""
    content = _read_bytes(path)
    expected_magic = bytes((0, 0, _IDX_BYTE, dimensions))
    if content[:4] != expected_magic:
        raise ValueError(
            f"load_idx_folder: expected {path} to begin with the magic number {expected_magic.hex(' ')} "
            f"(unsigned bytes, {dimensions} dimensions), got {content[:4].hex(' ') or 'an empty file'}. "
            "Check that images and labels are not exchanged and fetch the original file."
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(
            f"load_idx_folder: expected {path} to hold a header of {start} bytes, got {len(content)} bytes in all. "
            "The file is truncated: fetch it again."
        )
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    count = 1
    for size in shape:
        count *= size
    if count == 0 or len(content) - start != count:
        stated = "x".join(map(str, shape))
        raise ValueError(
            f"load_idx_folder: expected {path} to hold the {stated} = {count} > 0 values that its header states, "
            f"got {len(content) - start}. The file is truncated or altered: fetch it again."
        )
    # bytearray: torch wants writable memory.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
