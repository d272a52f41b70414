"""Checkpoints: whole or not at all, and the one before where one is damaged."""

import contextlib
import errno
import os
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from ensemble_samples import SMALL

from spectral_ops.continual import checkpoint
from spectral_ops.continual.checkpoint import (
    CURRENT,
    DAMAGED,
    PREVIOUS,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    unreadable,
)
from spectral_ops.continual.methods import Method
from spectral_ops.continual.trainer import run


def state(number: int) -> dict:
    tensors = {"w": torch.full((1000,), float(number)), "step": torch.tensor(number)}
    return saved({"number": number, "nested": {"list": [1, 2.5, "x", None], "tensors": tensors}})


def saved(trainer: object) -> dict:
    return {"trainer": trainer, "log_size": 1, "run_seconds": 2.0}


def number_of(loaded: dict) -> int:
    return loaded["trainer"]["number"]


def test_what_was_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path, state(1))
    loaded = load_checkpoint(tmp_path)
    assert number_of(loaded) == 1 and torch.equal(loaded["trainer"]["nested"]["tensors"]["w"], torch.ones(1000))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CURRENT]


def test_none_where_there_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None


def test_the_current_one_becomes_the_previous(tmp_path):
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, state(number))
    assert number_of(load_checkpoint(tmp_path)) == 3
    (tmp_path / CURRENT).unlink()  # as if killed between the two renames
    assert number_of(load_checkpoint(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "another file", "not a dict", "another dict"])
def test_a_damaged_one_falls_back_and_says_so(tmp_path, capsys, damage):
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2))
    path = tmp_path / CURRENT
    content = path.read_bytes()
    if damage == "not a dict":
        torch.save([1, 2], path)
    elif damage == "another dict":
        torch.save({"model": {"w": torch.ones(2)}, "epoch": 3}, path)
    else:
        middle = content.index(torch.full((1000,), 2.0).numpy().tobytes()) + 100  # within the weights
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        new = {"truncated": content[:-300], "empty": b"", "one bit": flipped, "another file": b"hello" * 99}
        path.write_bytes(new[damage])
    content = path.read_bytes()
    assert number_of(load_checkpoint(tmp_path)) == 1
    message = capsys.readouterr().err
    assert f"expected a complete checkpoint, got {path}" in message and "The one before is tried" in message
    assert f"{DAMAGED} in {tmp_path} is the one that could not be read." in message
    assert (tmp_path / DAMAGED).read_bytes() == content
    assert number_of(load_checkpoint(tmp_path)) == 1 and not capsys.readouterr().err


def test_a_damaged_one_never_becomes_the_previous(tmp_path, monkeypatch):
    for number in (1, 2):
        save_checkpoint(tmp_path, state(number))
    (tmp_path / CURRENT).write_bytes(b"x")
    load_checkpoint(tmp_path)
    original, left = os.replace, [1]

    def killed(*paths):  # after the first of a save's renames
        if not left:
            raise KeyboardInterrupt
        original(*paths)
        left.pop()

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):
        save_checkpoint(tmp_path, state(3))
    monkeypatch.undo()
    assert number_of(load_checkpoint(tmp_path)) in (1, 3)
    save_checkpoint(tmp_path, state(4))
    (tmp_path / CURRENT).write_bytes(b"x")
    assert number_of(load_checkpoint(tmp_path)) in (1, 3)


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
    assert number_of(load_checkpoint(tmp_path)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [CURRENT]


class Slotted:
    """Not to be saved."""

    def __reduce__(self):
        raise TypeError("never")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (state(1), None),
        ({"a": OrderedDict(b=(1, True, None, 2.5, 1j, "x", b"x", torch.float32, torch.Size([1])))}, None),
        (torch.nn.Parameter(torch.ones(2)), None),
        ({"a": [{}, {"rate": np.float64(1)}]}, "numpy.float64 at state['a'][1]['rate']"),
        ({"a": np.ones(2)}, "numpy.ndarray at state['a']"),
        ({"a": (1, frozenset([1]))}, "frozenset at state['a'][1]"),
        ({np.int64(1): 2}, "numpy.int64 at a key of state"),
        ({"a": Slotted()}, f"{__name__}.Slotted at state['a']"),
    ],
    ids=range(8),
)
def test_what_cannot_be_read_again_is_known_before(tmp_path, value, what):
    assert unreadable(value, "state") == what
    if what is None:
        save_checkpoint(tmp_path, saved(value))
        read_checkpoint(tmp_path / CURRENT)
    else:
        with pytest.raises((ValueError, TypeError)):
            save_checkpoint(tmp_path, saved(value))
            read_checkpoint(tmp_path / CURRENT)


class Rated(Method):
    """Saves what it should not."""

    def state_dict(self):
        return {"rate": np.float64(0.5)}


def test_a_methods_state_that_could_not_be_read_is_refused_at_the_first_save(tmp_path):
    method = f"{__name__}:Rated"
    message = rf"^checkpoint: expected state_dict\(\) of method {method} to .* got numpy.float64 at state\['rate'\]\."
    with pytest.raises(TypeError, match=message):
        run(replace(SMALL, method=method), tmp_path)
    assert load_checkpoint(tmp_path) is None
