"""Tiny-ImageNet: 200 classes of ImageNet at 64x64 (Stanford CS231n, http://cs231n.stanford.edu/tiny-imagenet-200.zip)."""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectral_ops.continual.data.dataset import Dataset, damaged
from spectral_ops.continual.data.root import find_data_root
from spectral_ops.continual.optional import require

FOLDER = "tiny-imagenet-200"
_SIDE = 64
_CLASSES, _TRAIN_PER_CLASS, _VALIDATION = 200, 500, 10_000  # of the original


def read_tiny_imagenet(root: Path | None, split: str, samples: int | None) -> Dataset:
    """As many images as `samples` says, spread evenly over the classes; None for all that are there, of a part as well.

    Labels follow the order of wnids.txt. Test images are those of the validation set: the labels of the test set were
    never published. Grey images become RGB.

    Raises:
        RuntimeError: Pillow is missing.
        FileNotFoundError: a file or the folder of a class is missing, or there are fewer images than asked for.
        ValueError: a file is not what its name says.
    """
    folder = find_data_root(root) / FOLDER
    wnids = _read_wnids(folder / "wnids.txt")
    by_class = _train_files(folder / "train", wnids) if split == "train" else _validation_files(folder / "val", wnids)
    there = sum(map(len, by_class))
    if samples is not None and samples > there:
        fewest = min(range(len(wnids)), key=lambda label: len(by_class[label]))
        raise FileNotFoundError(
            f"load_tiny_imagenet: expected {samples} images below {folder / ('train' if split == 'train' else 'val')}, "
            f"got {there}, the fewest ({len(by_class[fewest])}) of class {wnids[fewest]}. "
            "Ask for fewer, or fetch them: spectral-ops download tiny-imagenet."
        )
    chosen = _spread(by_class)[:samples]
    images = _decode([path for path, _ in chosen])
    return Dataset(images, torch.tensor([label for _, label in chosen]), len(wnids))


def is_complete(root: Path) -> bool:
    """Whether as many images are there as the original has."""
    folder = root / FOLDER
    try:
        wnids = _read_wnids(folder / "wnids.txt")
        by_class = _train_files(folder / "train", wnids)
        validation = list(chain(*_validation_files(folder / "val", wnids)))
    except (FileNotFoundError, ValueError):
        return False
    enough = len(wnids) == _CLASSES and all(len(files) >= _TRAIN_PER_CLASS for files in by_class)
    return enough and len(validation) >= _VALIDATION and all(path.is_file() for path in validation)


def _read_text(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"load_tiny_imagenet: expected {path} to exist, got no such file. "
            "Fetch it: spectral-ops download tiny-imagenet."
        )
    # latin1 takes any bytes: what a foreign file holds is shown by the check of its lines.
    return path.read_text(encoding="latin1").splitlines()


def _read_wnids(path: Path) -> list[str]:
    """The names of the classes in WordNet: n and eight digits."""
    wnids = _read_text(path)
    for wnid in wnids:
        if len(wnid) != 9 or wnid[0] != "n" or not wnid[1:].isdecimal():
            raise damaged("load_tiny_imagenet", path, "hold names like n02124075, one a line", repr(wnid[:40]))
    if not wnids or len(set(wnids)) < len(wnids):
        got = f"{len(set(wnids))} names in {len(wnids)} lines"
        raise damaged("load_tiny_imagenet", path, "hold distinct names, at least one", got)
    return wnids


def _train_files(folder: Path, wnids: list[str]) -> list[list[Path]]:
    """The files of every class in the order of their numbers."""
    by_class = []
    for wnid in wnids:
        images = folder / wnid / "images"
        files = sorted(images.glob("*.JPEG"), key=lambda path: (len(path.name), path.name))  # _2 before _10
        if not files:
            raise FileNotFoundError(
                f"load_tiny_imagenet: expected JPEG files in {images}, one folder for every line of wnids.txt, "
                f"got {'none' if images.is_dir() else 'no such folder'}. "
                "Fetch it: spectral-ops download tiny-imagenet."
            )
        by_class.append(files)
    return by_class


def _validation_files(folder: Path, wnids: list[str]) -> list[list[Path]]:
    """The files of every class in the order of the annotations: file, class and a box, parted by tabs."""
    path = folder / "val_annotations.txt"
    by_class: dict[str, list[Path]] = {wnid: [] for wnid in wnids}
    for number, line in enumerate(_read_text(path), 1):
        file, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in by_class or Path(file).name != file or not file.endswith(".JPEG"):
            expected = f"name a JPEG file and a class of wnids.txt in line {number}"
            raise damaged("load_tiny_imagenet", path, expected, repr(line[:60]))
        by_class[wnid].append(folder / "images" / file)
    return list(by_class.values())


def _spread(by_class: list[list[Path]]) -> list[tuple[Path, int]]:
    """Files with their labels: the first of every class, then the second of every class, and so on."""
    rounds = zip_longest(*by_class)
    return [(path, label) for files in rounds for label, path in enumerate(files) if path is not None]


def _decode(paths: list[Path]) -> Tensor:
    pillow = require("PIL.Image", "load_tiny_imagenet")
    images = torch.empty((len(paths), 3, _SIDE, _SIDE), dtype=torch.uint8)
    for image, path in zip(images, paths, strict=True):
        image.copy_(torch.from_numpy(_decode_one(pillow, path)).permute(2, 0, 1))
    return images


def _decode_one(pillow: Any, path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(
            f"load_tiny_imagenet: expected {path} to exist, as the annotations say, got no such file. "
            "Fetch it: spectral-ops download tiny-imagenet."
        )
    try:
        with pillow.open(path, formats=("JPEG",)) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow says SyntaxError of a broken header
        raise damaged("load_tiny_imagenet", path, "be a complete JPEG", f"{type(error).__name__}: {error}") from error
    if pixels.shape != (_SIDE, _SIDE, 3):
        got = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise damaged("load_tiny_imagenet", path, f"be an image of {_SIDE}x{_SIDE}", got)
    return pixels
