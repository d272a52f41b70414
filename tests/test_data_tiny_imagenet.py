"""Tiny-ImageNet: JPEG files in folders, made here by Pillow, and what is refused."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spectral_ops.continual.data import load_dataset

WNIDS = ("n00000030", "n00000010", "n00000020")  # in no order of their names
FOLDER = "tiny-imagenet-200"


def write_image(path: Path, value: int, mode: str = "L", side: int = 64) -> None:
    """An image of one value, which JPEG keeps to within 1 or 2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode == "L" else (value, 0, 255 - value)
    Image.new(mode, (side, side), colour).save(path, format="JPEG", quality=95)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Classes of 12, 3 and 5 images; image k of class c has the value 20 * c + k. Five to validate, of 200 and more."""
    folder = tmp_path / FOLDER
    for label, (wnid, count) in enumerate(zip(WNIDS, (12, 3, 5), strict=True)):
        for k in range(count):
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", 20 * label + k)
    (folder / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    lines = []
    for k, label in enumerate((1, 1, 0, 2, 1)):
        write_image(folder / "val" / "images" / f"val_{k}.JPEG", 200 + 10 * k)
        lines.append(f"val_{k}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def values(images: torch.Tensor) -> list[int]:
    return images.double().mean((1, 2, 3)).round().int().tolist()


def test_images_are_spread_evenly_over_classes(root):
    images, labels, classes = load_dataset("tiny-imagenet", root, samples=7)
    assert images.shape == (7, 3, 64, 64) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and labels.dtype == torch.int64 and classes == 3
    assert np.allclose(values(images), [0, 20, 40, 1, 21, 41, 2], atol=1)
    labels = load_dataset("tiny-imagenet", root, samples=12).labels
    assert labels.bincount().tolist() == [5, 3, 4]  # the second class has no more
    images, labels, _ = load_dataset("tiny-imagenet", root)
    assert labels.bincount().tolist() == [12, 3, 5]
    assert np.allclose(values(images[labels == 0]), range(12), atol=1)  # 2 before 10


def test_validation_images_are_the_test_split(root):
    images, labels, classes = load_dataset("tiny-imagenet", root, split="test", samples=4)
    assert labels.tolist() == [0, 1, 2, 1] and classes == 3
    assert np.allclose(values(images), [220, 200, 230, 210], atol=2)
    assert load_dataset("tiny-imagenet", root, split="test").labels.tolist() == [0, 1, 2, 1, 1]


def test_unneeded_images_are_not_decoded(root):
    (root / FOLDER / "train" / WNIDS[1] / "images" / f"{WNIDS[1]}_1.JPEG").write_bytes(b"")
    assert len(load_dataset("tiny-imagenet", root, samples=4).labels) == 4
    with pytest.raises(ValueError, match=f"{WNIDS[1]}_1.JPEG to be a complete JPEG"):
        load_dataset("tiny-imagenet", root, samples=5)


def test_colour_channels_keep_their_order(root):
    write_image(root / FOLDER / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG", 200, "RGB")
    image = load_dataset("tiny-imagenet", root, samples=1).images[0]
    assert (image.double().mean((1, 2)) - torch.tensor([200, 0, 55])).abs().max() <= 3
    grey = load_dataset("tiny-imagenet", root, samples=2).images[1]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_rows_are_not_exchanged_with_columns(root):
    path = root / FOLDER / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:32] = 255  # the upper half
    Image.fromarray(pixels).save(path, quality=95)
    image = load_dataset("tiny-imagenet", root, samples=1).images[0]
    assert image[:, :24].min() >= 240 and image[:, 40:].max() <= 15


def test_too_many_samples_name_the_smallest_class(root):
    said = rf"expected 21 images below .*train, got 20, the fewest \(3\) of class {WNIDS[1]}\. Ask for fewer, or fetch"
    with pytest.raises(FileNotFoundError, match=said):
        load_dataset("tiny-imagenet", root, samples=21)
    with pytest.raises(FileNotFoundError, match=r"expected 6 images below .*val, got 5, the fewest \(1\)"):
        load_dataset("tiny-imagenet", root, split="test", samples=6)


def test_missing_class_is_named(root):
    images = root / FOLDER / "train" / WNIDS[2] / "images"
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"JPEG files in {re.escape(str(images))}, .* got none\. Fetch it: spec"
    ):
        load_dataset("tiny-imagenet", root, samples=1)
    images.rmdir()
    with pytest.raises(FileNotFoundError, match=rf"JPEG files in {re.escape(str(images))}, .* got no such folder"):
        load_dataset("tiny-imagenet", root, samples=1)


@pytest.mark.parametrize("file", ["wnids.txt", "val/val_annotations.txt"])
def test_missing_lists_are_named(root, file):
    (root / FOLDER / file).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"expected .*{file} to exist, got no such file. Fetch it: spectral-ops d"
    ):
        load_dataset("tiny-imagenet", root, split="test")


def test_missing_validation_image_is_named(root):
    (root / FOLDER / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="expected .*val_2.JPEG to exist, as the annotations say, got no such"):
        load_dataset("tiny-imagenet", root, split="test")


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "hold distinct names, at least one, got 0 names in 0 lines"),
        ("n00000010\nn00000010\n", "hold distinct names, at least one, got 1 names in 2 lines"),
        ("n00000010\n../n0001\n", r"hold names like n02124075, one a line, got '\.\./n0001'"),
        ("n0000001\n", "hold names like n02124075, one a line, got 'n0000001'"),
        ("\x89PNG\r\n\x1a\n", "hold names like n02124075, one a line, got "),
    ],
    ids=["empty", "repeated", "path", "short", "foreign"],
)
def test_foreign_lists_of_classes_are_refused(root, content, said):
    (root / FOLDER / "wnids.txt").write_text(content, encoding="latin1")
    with pytest.raises(ValueError, match=f"load_tiny_imagenet: expected .*wnids.txt to {said}"):
        load_dataset("tiny-imagenet", root)


@pytest.mark.parametrize(
    "line", ["val_1.JPEG\tn99999999\t0", "val_1.JPEG", "", "../x.JPEG\tn00000010", "x.png\tn00000010"]
)
def test_foreign_annotations_are_refused(root, line):
    (root / FOLDER / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\t{WNIDS[0]}\n{line}\n")
    said = f"name a JPEG file and a class of wnids.txt in line 2, got {re.escape(repr(line))}"
    with pytest.raises(ValueError, match=f"val_annotations.txt to {said}"):
        load_dataset("tiny-imagenet", root, split="test")


def test_damaged_images_are_refused(root):
    path = root / FOLDER / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG"
    complete = path.read_bytes()
    for content in (b"", complete[:100], complete[:-20], b"<!DOCTYPE html>", b"\x89PNG\r\n\x1a\n" + bytes(99)):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(path))} to be a complete JPEG, got \w+: .*fetch it again"
        ):
            load_dataset("tiny-imagenet", root, samples=1)
    Image.new("RGB", (64, 64)).save(path, format="PNG")  # under a name that promises JPEG
    with pytest.raises(ValueError, match="to be a complete JPEG, got UnidentifiedImageError"):
        load_dataset("tiny-imagenet", root, samples=1)
    write_image(path, 0, side=32)
    with pytest.raises(ValueError, match="to be an image of 64x64, got 32x32"):
        load_dataset("tiny-imagenet", root, samples=1)


def test_without_pillow_the_extra_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(RuntimeError, match=r"load_tiny_imagenet: expected PIL.Image .* pip install '.\[continual\]'"):
        load_dataset("tiny-imagenet", root)


@pytest.mark.data
def test_real_images(data_root):
    images, labels, classes = load_dataset("tiny-imagenet", data_root, samples=500)
    assert images.shape == (500, 3, 64, 64) and classes == 200
    assert labels.bincount(minlength=200).tolist() == [3] * 100 + [2] * 100
    # The published means of the channels are 0.4802, 0.4481, 0.3975; these 500 images differ by 1.6 of 255 at most.
    assert (images.double().mean((0, 2, 3)) - 255 * torch.tensor([0.4802, 0.4481, 0.3975])).abs().max() <= 3
    images, labels, _ = load_dataset("tiny-imagenet", data_root, split="test", samples=250)
    assert images.shape == (250, 3, 64, 64) and labels.unique().numel() >= 190
