"""The data root, and the readers of digits and IDX files."""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_ops.continual.data import (
    DATASETS,
    digits,
    find_data_root,
    load_dataset,
    load_digits,
    load_idx_folder,
    load_images,
    require,
)


def idx(shape: tuple[int, ...], content: bytes, magic: bytes | None = None) -> bytes:
    """An IDX file of unsigned bytes."""
    return (magic or bytes((0, 0, 8, len(shape)))) + struct.pack(f">{len(shape)}I", *shape) + content


IMAGES = idx((3, 2, 4), bytes(range(24)))
LABELS = idx((3,), bytes((7, 0, 9)))


def write(root: Path, images: bytes | None = IMAGES, labels: bytes | None = LABELS, suffix: str = ".gz") -> Path:
    """A set called "Tiny" below `root`; None leaves a file out. Content is stored as given, compressed for .gz."""
    folder = root / "Tiny" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        if content is not None:
            (folder / (stem + suffix)).write_bytes(gzip.compress(content) if suffix else content)
    return folder


@pytest.mark.parametrize("suffix", [".gz", ""], ids=["compressed", "plain"])
def test_reads_images_and_labels(tmp_path, suffix):
    write(tmp_path, suffix=suffix)
    images, labels = load_idx_folder(tmp_path, "Tiny")
    assert images.dtype == torch.uint8 and torch.equal(images, torch.arange(24, dtype=torch.uint8).view(3, 2, 4))
    assert labels.dtype == torch.int64 and labels.tolist() == [7, 0, 9]
    images[0, 0, 0] = 5  # writable memory of its own


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_what_is_missing_or_damaged_is_fetched_by_a_command_that_is_named(tmp_path, name, folder):
    with pytest.raises(FileNotFoundError, match=rf"got neither\. Fetch it: spectral-ops download {name}\."):
        load_dataset(name, tmp_path)
    write(tmp_path).parent.rename(tmp_path / folder)
    images = tmp_path / folder / "raw" / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-9])
    with pytest.raises(ValueError, match="move it away and fetch it again with spectral-ops download"):
        load_dataset(name, tmp_path)


def test_test_split_reads_the_t10k_files(tmp_path):
    folder = write(tmp_path)
    for file in list(folder.iterdir()):
        file.rename(folder / file.name.replace("train", "t10k"))
    assert len(load_idx_folder(tmp_path, "Tiny", split="test")[0]) == 3
    with pytest.raises(FileNotFoundError):
        load_idx_folder(tmp_path, "Tiny")


def test_compressed_file_wins_over_plain(tmp_path):
    write(tmp_path, images=idx((3, 2, 4), bytes(24)), suffix="")
    write(tmp_path)
    assert load_idx_folder(tmp_path, "Tiny")[0].sum() == sum(range(24))


def damage(content: bytes, at: int) -> bytes:
    return content[:at] + bytes((content[at] ^ 0xFF,)) + content[at + 1 :]


# What is written as it stands under the name of the compressed images, and what the error must say of it.
DAMAGED = {
    "truncated gzip": (gzip.compress(IMAGES)[:-12], "complete gzip file, got EOFError"),
    "gzip cut in its header": (gzip.compress(IMAGES)[:5], "complete gzip file, got EOFError"),
    "wrong checksum": (damage(gzip.compress(IMAGES), -6), "complete gzip file, got BadGzipFile: CRC check failed"),
    "damaged deflate data": (gzip.compress(IMAGES)[:10] + b"\xff" * 20, "complete gzip file, got error"),
    "a web page": (b"<!DOCTYPE html><title>404</title>", "complete gzip file, got BadGzipFile: Not a gzipped file"),
    "an empty file": (b"", "magic number 00 00 08 03 .* got an empty file"),
    "labels under the images' name": (gzip.compress(LABELS), "magic number 00 00 08 03 .* got 00 00 08 01"),
    "floats": (gzip.compress(idx((3, 2, 4), bytes(24), b"\0\0\x0d\x03")), "magic number .* got 00 00 0d 03"),
    "a foreign file": (gzip.compress(b"\x89PNG\r\n\x1a\n" * 9), "magic number .* got 89 50 4e 47"),
    "cut in the IDX header": (gzip.compress(IMAGES[:9]), "header of 16 bytes, got 9 bytes"),
    "too few values": (gzip.compress(IMAGES[:-1]), "3x2x4 = 24 > 0 values that its header states, got 23"),
    "too many values": (gzip.compress(IMAGES + b"\0"), "3x2x4 = 24 > 0 values that its header states, got 25"),
    "other dimensions": (gzip.compress(idx((3, 2, 5), bytes(24))), "3x2x5 = 30 > 0 values .* got 24"),
    "no images": (gzip.compress(idx((0, 2, 4), b"")), "0x2x4 = 0 > 0 values"),
    "an absurd header": (gzip.compress(idx((2**32 - 1,) * 3, bytes(24))), "values that its header states, got 24"),
}


@pytest.mark.parametrize("content, said", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files_are_refused_by_name(tmp_path, content, said):
    folder = write(tmp_path)
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_idx_folder(tmp_path, "Tiny")
    assert str(caught.value).startswith(f"load_idx_folder: expected {file} to ")
    assert "etch" in str(caught.value)  # the remedy: fetch the file again


def test_truncated_plain_file_is_refused(tmp_path):
    write(tmp_path, images=IMAGES[:-5], suffix="")
    with pytest.raises(ValueError, match="3x2x4 = 24 > 0 values that its header states, got 19"):
        load_idx_folder(tmp_path, "Tiny")


def test_exchanged_files_are_refused(tmp_path):
    write(tmp_path, images=LABELS, labels=IMAGES)
    with pytest.raises(ValueError, match="images and labels are not exchanged"):
        load_idx_folder(tmp_path, "Tiny")


def test_different_counts_are_refused(tmp_path):
    write(tmp_path, labels=idx((2,), bytes(2)))
    with pytest.raises(ValueError, match="as many labels as images, got 3 images in .* and 2 labels in .*same release"):
        load_idx_folder(tmp_path, "Tiny")


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_missing_file_is_named(tmp_path, missing):
    write(tmp_path, **{missing: None})
    with pytest.raises(FileNotFoundError, match=rf"train-{missing}-idx.-ubyte in .*raw, got neither\. Put"):
        load_idx_folder(tmp_path, "Tiny")


def test_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"split to be one of \['test', 'train'\], got 'val'\. Pass"):
        load_idx_folder(tmp_path, "Tiny", split="val")


def test_data_root_comes_from_the_argument_then_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAL_OPS_DATA", str(tmp_path))
    assert find_data_root() == tmp_path
    other = tmp_path / "other"
    other.mkdir()
    assert find_data_root(other) == other
    with pytest.raises(FileNotFoundError, match="expected root to be an existing folder, got .*nowhere"):
        find_data_root(tmp_path / "nowhere")
    monkeypatch.setenv("SPECTRAL_OPS_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="expected SPECTRAL_OPS_DATA to be an existing folder, got .*nowhere"):
        find_data_root()


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_without_a_data_root_the_variable_is_named(monkeypatch, value):
    monkeypatch.delenv("SPECTRAL_OPS_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("SPECTRAL_OPS_DATA", value)
    with pytest.raises(ValueError, match=r"got root=None and SPECTRAL_OPS_DATA unset .*--data-root"):
        load_idx_folder(None, "MNIST")


def test_digits_are_the_integers_of_scikit_learn():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8) and images.dtype == torch.uint8
    assert (int(images.min()), int(images.max())) == (0, 16)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.equal(load_images("digits"), images)


def test_digits_by_their_file_and_by_scikit_learn(monkeypatch):
    by_file = load_digits()
    monkeypatch.setattr(digits, "FILE", Path("gone"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(by_file, load_digits(), strict=True))


def test_digits_do_not_import_scikit_learn():
    code = "import sys; from spectral_ops.continual.data.digits import load_digits; load_digits(); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('sklearn' in sys.modules)"], check=True)


def test_digits_are_split_into_train_and_test():
    images, labels = load_digits()
    train, test = load_dataset("digits"), load_dataset("digits", split="test", samples=300)
    assert train.images.shape == (1497, 1, 8, 8) and test.images.shape == (300, 1, 8, 8)
    assert torch.equal(torch.cat([train.images, test.images])[:, 0], images)
    assert torch.equal(torch.cat([train.labels, test.labels]), labels) and train.classes == test.classes == 10


def write_mnist(root: Path, side: int = 28, labels: bytes = bytes((7, 0, 9))) -> Path:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = bytes(i % 251 for i in range(3 * side * side))
    (folder / "train-images-idx3-ubyte").write_bytes(idx((3, side, side), pixels))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx((3,), labels))
    return folder


def test_load_dataset_gives_images_with_a_channel(tmp_path):
    write_mnist(tmp_path)
    images, labels, classes = load_dataset("mnist", str(tmp_path), samples=3)
    assert images.shape == (3, 1, 28, 28) and images.dtype == torch.uint8
    assert images.flatten().tolist() == [i % 251 for i in range(3 * 28 * 28)]
    assert labels.tolist() == [7, 0, 9] and labels.dtype == torch.int64 and classes == 10
    assert torch.equal(load_images("mnist", tmp_path), images[:, 0])


def test_images_and_labels_of_another_set_are_refused(tmp_path):
    folder = write_mnist(tmp_path, side=32)
    with pytest.raises(ValueError, match=f"{folder}/train-images-idx3-ubyte to hold images of 28x28, got 32x32"):
        load_dataset("mnist", tmp_path)
    write_mnist(tmp_path, labels=bytes((1, 26, 2)))  # letters
    with pytest.raises(ValueError, match=f"{folder}/train-labels-idx1-ubyte to hold labels from 0 to 9, got 1 to 26"):
        load_dataset("mnist", tmp_path)


def test_names_splits_and_counts_are_checked():
    assert list(DATASETS) == [
        "digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100", "cifar-100-coarse", "svhn", "tiny-imagenet"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="data: expected one of digits, .* got 'minst'. The nearest is 'mnist'"):
        load_dataset("minst")
    with pytest.raises(ValueError, match="split: expected one of train, test, got 'val'"):
        load_dataset("digits", split="val")
    with pytest.raises(ValueError, match=r"load_dataset: expected samples >= 1, got 0\. Change --samples"):
        load_dataset("digits", samples=0)
    with pytest.raises(ValueError, match=r"expected samples <= 1497, the images of digits \(train\), got 1498\. Ask"):
        load_dataset("digits", samples=1498)


@pytest.mark.parametrize("missing", [("sklearn", "sklearn.datasets"), ("sklearn.datasets",)], ids=["all", "a part"])
def test_missing_package_names_the_extra(monkeypatch, missing):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(digits, "FILE", Path("gone"))
    with pytest.raises(RuntimeError, match=r"load_digits: expected sklearn.datasets .*pip install '.\[continual\]'"):
        load_digits()
    with pytest.raises(RuntimeError, match="demo: expected no_such_module to be importable, got ModuleNotFoundError"):
        require("no_such_module", "demo")


# Published facts: counts, mean of the pixels / 255, images per class.
REAL = {
    "MNIST": ("mnist", 0.1307, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
    "FashionMNIST": ("fashion-mnist", 0.2860, [6000] * 10),
}


@pytest.mark.data
@pytest.mark.parametrize("folder", REAL)
def test_real_sets(data_root, folder):
    name, mean, histogram = REAL[folder]
    images, labels = load_idx_folder(data_root, folder)
    assert images.shape == (60000, 28, 28) and labels.bincount().tolist() == histogram
    assert abs(float(images.float().mean()) / 255 - mean) <= 5e-5
    images, labels = load_idx_folder(data_root, folder, split="test")
    assert images.shape == (10000, 28, 28) and labels.shape == (10000,) and set(labels.tolist()) == set(range(10))
    assert load_dataset(name, data_root).images.shape == (60000, 1, 28, 28)
