"""Checkpoints: whole or not at all, and the one before where one is damaged."""

import contextlib
import errno
import os

import pytest
import torch

from spectral_ops.continual import checkpoint
from spectral_ops.continual.checkpoint import CURRENT, DAMAGED, PREVIOUS, load_checkpoint, save_checkpoint


def state(number: int) -> dict:
    tensors = {"w": torch.full((1000,), float(number)), "step": torch.tensor(number)}
    return {"number": number, "nested": {"list": [1, 2.5, "x", None], "tensors": tensors}}


def test_what_was_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path, state(1))
    loaded = load_checkpoint(tmp_path)
    assert loaded["number"] == 1 and torch.equal(loaded["nested"]["tensors"]["w"], torch.ones(1000))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CURRENT]


def test_none_where_there_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None


def test_the_current_one_becomes_the_previous(tmp_path):
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, state(number))
    assert load_checkpoint(tmp_path)["number"] == 3
    (tmp_path / CURRENT).unlink()  # as if killed between the two renames
    assert load_checkpoint(tmp_path)["number"] == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "another file", "not a dict"])
def test_a_damaged_one_falls_back_and_says_so(tmp_path, capsys, damage):
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    path = tmp_path / CURRENT
    content = path.read_bytes()
    if damage == "not a dict":
        torch.save([1, 2], path)
    else:
        middle = content.index(torch.full((1000,), 2.0).numpy().tobytes()) + 100  # within the weights
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        new = {"truncated": content[:-300], "empty": b"", "one bit": flipped, "another file": b"hello" * 99}
        path.write_bytes(new[damage])
    content = path.read_bytes()
    assert load_checkpoint(tmp_path)["number"] == 1
    message = capsys.readouterr().err
    assert f"expected a complete checkpoint, got {path}" in message and "The one before is tried" in message
    assert f"{DAMAGED} in {tmp_path} is the one that could not be read." in message
    assert (tmp_path / DAMAGED).read_bytes() == content
    assert load_checkpoint(tmp_path)["number"] == 1 and not capsys.readouterr().err


def test_a_damaged_one_never_becomes_the_previous(tmp_path, monkeypatch):
    for number in (1, 2):
        save_checkpoint(tmp_path, state(number))
    (tmp_path / CURRENT).write_bytes(b"x")
    load_checkpoint(tmp_path)
    replace, left = os.replace, [1]

    def killed(*paths):  # after the first of a save's renames
        if not left:
            raise KeyboardInterrupt
        replace(*paths)
        left.pop()

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(3))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["number"] in (1, 3)
    save_checkpoint(tmp_path, state(4))
    (tmp_path / CURRENT).write_bytes(b"x")
    assert load_checkpoint(tmp_path)["number"] in (1, 3)


def test_only_damaged_ones_are_an_error(tmp_path, capsys):
    for name in (CURRENT, PREVIOUS):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        ValueError, match=rf"expected one that can be read, got .*{CURRENT}.*{PREVIOUS}.*Delete the folder"
    ):
        load_checkpoint(tmp_path)
    assert capsys.readouterr().err.count("The one before") == 1  # not said of the last
    assert sorted(p.name for p in tmp_path.iterdir()) == [PREVIOUS, CURRENT]


def test_no_code_is_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"a": Evil()}, tmp_path / CURRENT)
    with pytest.raises(ValueError, match="expected one that can be read"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("at", ["write", "fsync"])
def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch, at):
    save_checkpoint(tmp_path, state(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "write":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"writable with space for a checkpoint, got .*No space left.*--resume"):
        save_checkpoint(tmp_path, state(2))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["number"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [CURRENT]
