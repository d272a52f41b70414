"""SVHN: MATLAB files, made here by scipy, and what is refused."""

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from spectral_ops.continual.data import load_dataset

LABELS = (1, 10, 9, 10, 5)


def arrays(labels: tuple[int, ...] = LABELS) -> dict[str, np.ndarray]:
    """MATLAB's order: rows, columns, channels, images."""
    x = (np.arange(32 * 32 * 3 * len(labels)) * 7 % 251).astype(np.uint8).reshape(32, 32, 3, len(labels))
    return {"X": x, "y": np.array(labels, dtype=np.uint8)[:, None]}


def write(folder: Path, split: str = "train", compress: bool = True, **variables: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{split}_32x32.mat"
    savemat(path, {**arrays(), **variables}, do_compression=compress)
    return path


@pytest.mark.parametrize("compress", [True, False], ids=["compressed", "plain"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_images_and_labels(tmp_path, split, compress):
    write(tmp_path, split, compress)
    images, labels, classes = load_dataset("svhn", tmp_path, split=split, samples=5)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8 and images.is_contiguous()
    x = arrays()["X"]
    for image, channel, row, column in ((0, 0, 0, 0), (4, 2, 31, 30), (3, 1, 7, 19)):
        assert images[image, channel, row, column] == x[row, column, channel, image]
    assert labels.tolist() == [1, 0, 9, 0, 5] and labels.dtype == torch.int64 and classes == 10


@pytest.mark.parametrize("folder", ["SVHN", "svhn"])
def test_a_folder_of_its_own_is_found(tmp_path, folder):
    write(tmp_path / folder, "test")
    assert len(load_dataset("svhn", tmp_path, split="test").labels) == 5
    with pytest.raises(
        FileNotFoundError, match=r"load_svhn: expected train_32x32.mat in .* got neither\. Fetch it: spec"
    ):
        load_dataset("svhn", tmp_path)


WRONG = {
    "no images": (
        {"X": np.zeros((32, 32, 3, 0), np.uint8)},
        r"hold X as uint8 \(32, 32, 3, N > 0\), got uint8 \(32, 32, 3",
    ),
    "images first": ({"X": np.zeros((5, 32, 32, 3), np.uint8)}, r"hold X as .* got uint8 \(5, 32, 32, 3\)"),
    "a matrix": ({"X": np.zeros((32, 32), np.uint8)}, r"hold X as .* got uint8 \(32, 32\)"),
    "floats": ({"X": np.zeros((32, 32, 3, 5))}, r"hold X as .* got float64 \(32, 32, 3, 5\)"),
    "too few labels": ({"y": np.ones((4, 1), np.uint8)}, r"hold y as whole numbers \(5, 1\), got uint8 \(4, 1\)"),
    "labels in a row": ({"y": np.ones((1, 5), np.uint8)}, r"hold y as .* got uint8 \(1, 5\)"),
    "labels of floats": ({"y": np.ones((5, 1))}, r"hold y as .* got float64 \(5, 1\)"),
    "a label 0": ({"y": np.array([[0], [1], [2], [3], [4]])}, "hold labels from 1 to 10, got 0 to 4"),
    "a label 11": ({"y": np.array([[11], [1], [2], [3], [4]])}, "hold labels from 1 to 10, got 1 to 11"),
}


@pytest.mark.parametrize("variables, said", WRONG.values(), ids=WRONG.keys())
def test_other_arrays_are_refused(tmp_path, variables, said):
    path = write(tmp_path, **variables)
    with pytest.raises(ValueError, match=said) as caught:
        load_dataset("svhn", tmp_path)
    assert str(caught.value).startswith(f"load_svhn: expected {path} to ") and "fetch it again" in str(caught.value)


def test_missing_variables_are_named(tmp_path):
    savemat(tmp_path / "train_32x32.mat", {"y": arrays()["y"]})
    with pytest.raises(ValueError, match="hold X as .* got no such variable"):
        load_dataset("svhn", tmp_path)
    savemat(tmp_path / "train_32x32.mat", {"X": arrays()["X"]})
    with pytest.raises(ValueError, match="hold y as .* got no such variable"):
        load_dataset("svhn", tmp_path)


@pytest.mark.parametrize("compress", [True, False], ids=["compressed", "plain"])
@pytest.mark.parametrize("kept", [0, 60, 128, 200, -300])
def test_truncated_files_are_refused(tmp_path, kept, compress):
    path = write(tmp_path, compress=compress)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="train_32x32.mat to (be a MATLAB 5 file|hold [Xy] as)"):
        load_dataset("svhn", tmp_path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "train_32x32.mat"
    for content in (
        b"<!DOCTYPE html><title>404</title>" * 9,
        zlib.compress(bytes(999)),
        b"\x89HDF\r\n\x1a\n" + bytes(999),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="train_32x32.mat to be a MATLAB 5 file, got [A-Za-z]+: "):
            load_dataset("svhn", tmp_path)


def test_without_scipy_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(RuntimeError, match=r"load_svhn: expected scipy.io .* pip install '.\[continual\]'"):
        load_dataset("svhn", tmp_path)
