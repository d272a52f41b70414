"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html), in either of two layouts.

Python: a pickle with "data", uint8 (N, 3072), and lists of labels. Binary: records of one byte per label and 3,072 of
pixels. In both an image is its red, green and blue plane, each 32x32 row by row.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_ops.continual.data.dataset import Dataset, check_labels, damaged
from spectral_ops.continual.data.pickles import load_pickle
from spectral_ops.continual.data.root import find_data_root

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_Files = dict[str, tuple[str, ...]]


class Cifar(NamedTuple):
    """The files of one of the sets, and where they keep its labels."""

    python: str  # folder of the layout for Python
    binary: str  # folder of the binary layout, where the names of the files end in .bin
    files: _Files  # by split
    labels: str  # key in a pickle
    label_bytes: int  # of a binary record
    label_byte: int  # which of them
    classes: int

    @property
    def all_files(self) -> list[str]:
        return [file for split in self.files.values() for file in split]

    def candidates(self, root: Path, file: str) -> tuple[Path, Path]:
        return root / self.python / file, root / self.binary / f"{file}.bin"

    def is_complete(self, root: Path) -> bool:
        """Whether every file of both splits is there, in either layout."""
        return all(any(path.is_file() for path in self.candidates(root, file)) for file in self.all_files)


_FILES_10: _Files = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_FILES_100: _Files = {"train": ("train",), "test": ("test",)}
_FOLDERS_100 = ("cifar-100-python", "cifar-100-binary")
CIFAR = {
    "cifar-10": Cifar("cifar-10-batches-py", "cifar-10-batches-bin", _FILES_10, "labels", 1, 0, 10),
    "cifar-100": Cifar(*_FOLDERS_100, _FILES_100, "fine_labels", 2, 1, 100),
    "cifar-100-coarse": Cifar(*_FOLDERS_100, _FILES_100, "coarse_labels", 2, 0, 20),
}


def read_cifar(name: str, root: Path | None, split: str, samples: int | None) -> Dataset:
    """The files of a split one after another, as far as `samples` needs them: the first of CIFAR-10 has 10,000.

    Where a file is there in both layouts the one for Python is read.

    Raises:
        FileNotFoundError: a file that is needed is missing; those after it are not looked at.
        ValueError: a file is not what its name says.
    """
    folder, kind = find_data_root(root), CIFAR[name]
    parts: list[tuple[Tensor, Tensor]] = []
    count = 0
    for file in kind.files[split]:
        if samples is not None and count >= samples:
            break
        parts.append(_read_part(name, kind.candidates(folder, file), samples, count))
        count += len(parts[-1][1])
    images, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Dataset(images, labels, kind.classes)


def _read_part(name: str, candidates: tuple[Path, Path], samples: int | None, count: int) -> tuple[Tensor, Tensor]:
    kind, (python, binary) = CIFAR[name], candidates
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        wanted = "all samples" if samples is None else f"{samples} samples"
        raise FileNotFoundError(
            f"load_cifar: expected {python} or {binary} to exist for {wanted} of {name}, got neither and {count} "
            f"samples in the files before it. Ask for fewer, or fetch it: spectral-ops download {name}."
        )
    images, labels = _read_pickle(path, kind) if path == python else _read_binary(path, kind)
    check_labels("load_cifar", path, labels, kind.classes)
    return images.reshape(-1, *_SHAPE), labels


def _read_pickle(path: Path, kind: Cifar) -> tuple[Tensor, Tensor]:
    content = load_pickle("load_cifar", path)
    if not isinstance(content, dict):
        raise damaged("load_cifar", path, "hold a dict", type(content).__name__)
    # Keys of Python 2 are strings, those of a file that Python 3 wrote may be bytes.
    fields = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in ("data", kind.labels):
        if key not in fields:
            raise damaged("load_cifar", path, f"have the key {key!r}", f"the keys {', '.join(map(str, fields))}")
    return _pixels(path, fields["data"]), _labels(path, fields[kind.labels], len(fields["data"]))


def _pixels(path: Path, data: object) -> Tensor:
    fits = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (_PIXELS,) and len(data) > 0
    if not fits:
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise damaged("load_cifar", path, f"hold its data as uint8 (N > 0, {_PIXELS})", got)
    return torch.from_numpy(np.require(data, requirements="W"))  # torch warns of read-only memory


def _labels(path: Path, labels: object, count: int) -> Tensor:
    values = labels.tolist() if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" else labels
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise damaged("load_cifar", path, f"hold a list of {count} labels, one for every image", got)
    foreign = [value for value in values if type(value) is not int or value.bit_length() > 63]
    if foreign:
        raise damaged("load_cifar", path, "hold whole numbers as labels", repr(foreign[0])[:40])
    return torch.tensor(values, dtype=torch.int64)


def _read_binary(path: Path, kind: Cifar) -> tuple[Tensor, Tensor]:
    content, record = bytearray(path.read_bytes()), kind.label_bytes + _PIXELS
    if len(content) == 0 or len(content) % record:
        raise damaged("load_cifar", path, f"hold records of {record} bytes", f"{len(content)} bytes")
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, record)
    return records[:, kind.label_bytes :], records[:, kind.label_byte].to(torch.int64)
