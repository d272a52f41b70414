"""CIFAR-10 and CIFAR-100 in both layouts: what is read, what is left unread, and what is refused."""

import io
import os
import pickle
import re
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.data import load_dataset
from spectral_ops.continual.data.cifar import CIFAR
from spectral_ops.continual.data.pickles import load_pickle
from spectral_ops.continual.trainer import make_stream

PLANES = 3 * 32 * 32


def pixels(count: int, first: int = 0) -> np.ndarray:
    """Row i begins with first + i; no other pixel has the value of its neighbour in another channel, row or column."""
    data = (np.arange(count * PLANES, dtype=np.int64) * 7 % 251).astype(np.uint8).reshape(count, PLANES)
    data[:, 0] = first + np.arange(count)
    return data


def content(name: str, count: int = 4, first: int = 0) -> dict[str, Any]:
    """What a pickle of that set holds: `count` images whose labels go round."""
    data: dict[str, Any] = {"data": pixels(count, first), "filenames": [f"{i}.png" for i in range(count)]}
    if name == "cifar-10":
        return {**data, "batch_label": "training batch", "labels": [(first + i) % 10 for i in range(count)]}
    fine = [(first + 33 * i) % 100 for i in range(count)]
    return {**data, "fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}


def write(root: Path, name: str, file: str, data: Any, protocol: int = 2) -> Path:
    path = root / CIFAR[name].python / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(data, protocol))
    return path


def write_binary(root: Path, name: str, file: str, data: dict[str, Any]) -> Path:
    columns = [data["labels"]] if name == "cifar-10" else [data["coarse_labels"], data["fine_labels"]]
    path = root / CIFAR[name].binary / f"{file}.bin"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(np.column_stack([*columns, data["data"]]).astype(np.uint8).tobytes())
    return path


@pytest.mark.parametrize("binary", [False, True], ids=["python", "binary"])
@pytest.mark.parametrize("name, classes", [("cifar-10", 10), ("cifar-100", 100), ("cifar-100-coarse", 20)])
def test_both_layouts_give_images_and_labels(tmp_path, name, classes, binary):
    for split, first in (("train", 0), ("test", 7)):
        for number, file in enumerate(CIFAR[name].files[split]):
            (write_binary if binary else write)(tmp_path, name, file, content(name, first=first + 20 * number))
    for split, first in (("train", 0), ("test", 7)):
        images, labels, found = load_dataset(name, tmp_path, split=split)
        firsts = [first + 20 * number for number in range(len(CIFAR[name].files[split]))]
        assert images.dtype == torch.uint8 and images.shape == (4 * len(firsts), 3, 32, 32)
        expected = np.concatenate([pixels(4, first) for first in firsts]).reshape(-1, 3, 32, 32)
        assert np.array_equal(images, expected)  # channel, row, column
        key = CIFAR[name].labels
        assert labels.dtype == torch.int64 and found == classes
        assert labels.tolist() == [label for first in firsts for label in content(name, first=first)[key]]
    images.zero_()  # memory of its own


def test_only_the_files_that_are_needed_are_read(tmp_path):
    for number in (1, 2, 4):
        write(tmp_path, "cifar-10", f"data_batch_{number}", content("cifar-10", first=number))
    assert len(load_dataset("cifar-10", tmp_path, samples=3).labels) == 4  # all that the first file holds
    assert len(load_dataset("cifar-10", tmp_path, samples=4).labels) == 4
    assert len(load_dataset("cifar-10", tmp_path, samples=5).labels) == 8
    missing = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    said = rf"expected {re.escape(str(missing))} or .*data_batch_3.bin to exist for 9 samples of cifar-10, got neither"
    with pytest.raises(
        FileNotFoundError, match=said + r" and 8 samples .* before it\..* spectral-ops download cifar-10"
    ):
        load_dataset("cifar-10", tmp_path, samples=9)  # the fourth is not taken in its place
    with pytest.raises(FileNotFoundError, match="data_batch_3.* for all samples of cifar-10"):
        load_dataset("cifar-10", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"")
    assert len(load_dataset("cifar-10", tmp_path, samples=4).labels) == 4  # not opened


def test_more_samples_than_all_files_hold_are_refused(tmp_path):
    write(tmp_path, "cifar-100", "test", content("cifar-100"))
    with pytest.raises(ValueError, match=r"expected samples <= 4, the images of cifar-100 \(test\), got 5\. Ask for"):
        load_dataset("cifar-100", tmp_path, split="test", samples=5)


def test_python_layout_is_preferred_and_layouts_may_be_mixed(tmp_path):
    write(tmp_path, "cifar-10", "data_batch_1", content("cifar-10", first=1))
    for number in (1, 2):
        write_binary(tmp_path, "cifar-10", f"data_batch_{number}", content("cifar-10", first=50 * number))
    images = load_dataset("cifar-10", tmp_path, samples=8).images
    assert images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 100, 101, 102, 103]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(tmp_path, protocol):
    data = {key.encode(): value for key, value in content("cifar-10").items()}  # Python 3 code often writes such keys
    data[b"labels"] = np.array(data[b"labels"])
    data[b"data"].flags.writeable = False  # protocol 5 keeps that, and torch warns of it
    write(tmp_path, "cifar-10", "test_batch", data, protocol)
    images, labels, _ = load_dataset("cifar-10", tmp_path, split="test")
    assert np.array_equal(images.flatten(1), pixels(4)) and labels.tolist() == [0, 1, 2, 3]
    images.zero_()  # memory of its own


def test_columns_in_fortran_order_are_read(tmp_path):
    data = content("cifar-10") | {"data": np.asfortranarray(pixels(4))}
    write(tmp_path, "cifar-10", "test_batch", data)
    assert np.array_equal(load_dataset("cifar-10", tmp_path, split="test").images.flatten(1), pixels(4))


def python_2(count: int = 3) -> bytes:
    """A batch as Python 2 and the numpy of 2009 wrote it: byte strings throughout, numpy.core.multiarray."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ"
    dtype += b"\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01(K" + bytes((count,)) + b"M" + struct.pack("<H", PLANES) + b"t" + dtype + b"\x89"
    array += state + string(pixels(count).tobytes()) + b"tb"
    labels = b"](" + b"".join(b"K" + bytes((i,)) for i in range(count)) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + labels + b"u."


def test_pickle_of_python_2_is_read(tmp_path):
    path = write(tmp_path, "cifar-10", "test_batch", None)
    path.write_bytes(python_2())
    images, labels, _ = load_dataset("cifar-10", tmp_path, split="test")
    assert np.array_equal(images.flatten(1), pixels(3)) and labels.tolist() == [0, 1, 2]


class Harmful:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_nothing_that_a_pickle_names_is_called(tmp_path):
    made = tmp_path / "made"
    path = write(tmp_path, "cifar-10", "test_batch", {"data": Harmful(os.mkdir, str(made)), "labels": []})
    with pytest.raises(
        ValueError, match=rf"expected {re.escape(str(path))} to hold numpy .* alone, got (posix|nt)\.mkdir\. .* may be"
    ):
        load_dataset("cifar-10", tmp_path, split="test")
    assert not made.exists()
    pickle.loads(path.read_bytes())
    assert made.exists()  # else the test shows nothing


@pytest.mark.parametrize(
    "value, named",
    [
        (Harmful(eval, "1"), "builtins.eval"),
        (Harmful(np.load, "x"), "numpy.load"),
        (np.int64(3), "scalar"),
        (io.BytesIO, "_io.BytesIO"),
        (OrderedDict(), "collections.OrderedDict"),
    ],
    ids=["builtin", "numpy function", "numpy scalar", "class", "instance"],
)
def test_foreign_classes_are_refused_by_name(tmp_path, value, named):
    path = tmp_path / "file"
    path.write_bytes(pickle.dumps([value], 4))
    with pytest.raises(ValueError, match=rf"reader: expected {re.escape(str(path))} to hold .* alone, got .*({named})"):
        load_pickle("reader", path)


def dtype_with(code: str, state: object) -> bytes:
    """Opcodes of numpy.dtype(code) with a state of our choice, which pickle itself would not write."""
    return b"cnumpy\ndtype\n" + pickle.dumps((code,), 0)[:-1] + b"R" + pickle.dumps(state, 0)[:-1] + b"b"


@pytest.mark.parametrize("code, state", [
    ("V8", (3, "|", None, ("a",), {"a": (np.dtype("u1"), 0)}, 8, 1, 63)), ("V1", (3, "|", None, None, None, 999, 1, 0)),
    ("O", None), ("f4", None),
], ids=["fields", "another size", "objects", "floats"])  # fmt: skip
def test_arrays_of_anything_but_whole_numbers_are_refused(tmp_path, code, state):
    """A dtype's state may give memory objects that are not there, or a size that it has not."""
    path = tmp_path / "file"
    path.write_bytes(dtype_with(code, state) + b".")
    with pytest.raises(ValueError, match="be a complete pickle, got UnpicklingError: an array of"):
        load_pickle("reader", path)


def test_no_array_is_made_of_memory_as_it_is_found(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"cnumpy\nndarray\n" + pickle.dumps(((1000,),), 0)[:-1] + b"R.")  # numpy.ndarray((1000,))
    with pytest.raises(ValueError, match="be a complete pickle, got TypeError"):
        load_pickle("reader", path)


def test_bytes_are_decoded_as_latin1_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pickle.dumps(b"\xff\x00", 2))
    assert load_pickle("reader", path) == b"\xff\x00"
    path.write_bytes(path.read_bytes().replace(b"\x06\x00\x00\x00latin1", b"\x05\x00\x00\x00rot13"))
    with pytest.raises(ValueError, match="be a complete pickle, got UnpicklingError: bytes encoded as 'rot13'"):
        load_pickle("reader", path)


COMPLETE = pickle.dumps(content("cifar-10"), 2)
DAMAGED = {
    "truncated": (COMPLETE[:-100], "be a complete pickle, got"),
    "empty": (b"", "be a complete pickle, got EOFError"),
    "a web page": (b"<!DOCTYPE html><title>404</title>", "be a complete pickle, got"),
    "a list": (pickle.dumps([1, 2]), "hold a dict, got list"),
    "labels of another set": (
        pickle.dumps(content("cifar-100")),
        "have the key 'labels', got the keys data, filenames, f",
    ),
    "no data": (pickle.dumps({"labels": [1]}), "have the key 'data', got the keys labels"),
    "data of no array": (pickle.dumps({"data": [1], "labels": [1]}), r"uint8 \(N > 0, 3072\), got list"),
    "floats": (pickle.dumps({"data": pixels(1) / 255, "labels": [1]}), "be a complete pickle, .* an array of float64"),
    "wide numbers": (
        pickle.dumps({"data": pixels(1).astype(np.int64), "labels": [1]}),
        r"uint8 \(N > 0, 3072\), got int64 \(1, 3072\)",
    ),
    "images of another size": (pickle.dumps({"data": pixels(2)[:, :768], "labels": [1, 2]}), r"got uint8 \(2, 768\)"),
    "no images": (pickle.dumps({"data": pixels(0), "labels": []}), r"got uint8 \(0, 3072\)"),
    "too few labels": (
        pickle.dumps({"data": pixels(2), "labels": [1]}),
        "list of 2 labels, one for every image, got 1",
    ),
    "labels in a dict": (pickle.dumps({"data": pixels(1), "labels": {0: 1}}), "list of 1 labels, .* got dict"),
    "labels of floats": (pickle.dumps({"data": pixels(1), "labels": np.ones(1)}), "be a complete pickle, .* float64"),
    "labels of text": (pickle.dumps({"data": pixels(1), "labels": ["cat"]}), "whole numbers as labels, got 'cat'"),
    "labels of truth": (pickle.dumps({"data": pixels(1), "labels": [True]}), "whole numbers as labels, got True"),
    "a label without end": (pickle.dumps({"data": pixels(1), "labels": [2**64]}), "whole numbers as labels, got 184"),
    "a high label": (pickle.dumps({"data": pixels(2), "labels": [0, 10]}), "hold labels from 0 to 9, got 0 to 10"),
    "a negative label": (pickle.dumps({"data": pixels(2), "labels": [-1, 3]}), "hold labels from 0 to 9, got -1 to 3"),
}


@pytest.mark.parametrize("damage, said", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_pickles_are_refused_by_name(tmp_path, damage, said):
    path = write(tmp_path, "cifar-10", "test_batch", None)
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=said) as caught:
        load_dataset("cifar-10", tmp_path, split="test")
    assert str(caught.value).startswith(f"load_cifar: expected {path} to ") and "fetch it again" in str(caught.value)


@pytest.mark.parametrize("size, record", [(0, 3073), (3072, 3073), (2 * 3073 + 1, 3073), (3 * 3074, 3073)])
def test_binary_files_of_other_sizes_are_refused(tmp_path, size, record):
    path = write_binary(tmp_path, "cifar-10", "test_batch", content("cifar-10"))
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"load_cifar: .*bin to hold records of {record} bytes, got {size} bytes"):
        load_dataset("cifar-10", tmp_path, split="test")


def test_binary_labels_out_of_range_are_refused(tmp_path):
    write_binary(tmp_path, "cifar-100", "train", content("cifar-100") | {"coarse_labels": [1, 20, 3, 4]})
    assert len(load_dataset("cifar-100", tmp_path).labels) == 4  # the fine ones are in range
    with pytest.raises(ValueError, match="train.bin to hold labels from 0 to 19, got 1 to 20"):
        load_dataset("cifar-100-coarse", tmp_path)


@pytest.mark.data
def test_real_batches(data_root):
    images, labels, classes = load_dataset("cifar-10", data_root, samples=10_000)
    # The published counts of data_batch_1 and of the test batch, and the first labels of either.
    assert images.shape == (10_000, 3, 32, 32) and classes == 10
    assert labels.bincount().tolist() == [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    images, labels, _ = load_dataset("cifar-10", data_root, split="test")
    assert images.shape == (10_000, 3, 32, 32) and labels.bincount().tolist() == [1000] * 10
    means = images.double().mean((0, 2, 3)) / 255  # of the test set: 0.4942, 0.4851, 0.4504
    assert (means - torch.tensor([0.4942, 0.4851, 0.4504])).abs().max() <= 1e-3
    with pytest.raises(FileNotFoundError, match="data_batch_2"):
        load_dataset("cifar-10", data_root, samples=10_001)


@pytest.mark.parametrize("name", ["random-labels", "least-likely-label"])
def test_a_stream_that_holds_nothing_out_needs_no_test_file(tmp_path, name):
    write(tmp_path, "cifar-10", "data_batch_1", content("cifar-10", 50))
    stream = make_stream(RunConfig(stream=name, data="cifar-10", data_root=tmp_path, samples=50))
    assert len(stream.task(0).y) == 50 and stream.task(0).held_out_x is None
