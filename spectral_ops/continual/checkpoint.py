"""Checkpoints that survive a crash at any moment, also one while they are written."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
DAMAGED = "checkpoint.damaged.pt"
State = dict[str, Any]
# Exactly these: a numpy.float64 is a float, too, and cannot be read.
_READABLE = (bool, int, float, complex, str, bytes, type(None), torch.Tensor)


class RunState(TypedDict):
    """What a checkpoint holds: the trainer's own state, the bytes that its log had, and the seconds until then."""

    trainer: State
    log_size: int
    run_seconds: float


def save_checkpoint(folder: Path, state: RunState) -> None:
    """Writes the state beside the current checkpoint, then takes its place; the current one becomes the previous.

    Raises:
        OSError: the disk is full or the folder not writable; the checkpoints there stay as they were.
    """
    temporary = folder / (CURRENT + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"checkpoint: expected {folder} to be writable with space for a checkpoint, got {error}. Make room, then "
            "run again with --resume: the last checkpoint is as it was."
        ) from error
    if (folder / CURRENT).exists():
        os.replace(folder / CURRENT, folder / PREVIOUS)
    os.replace(temporary, folder / CURRENT)
    _sync(folder)


def read_checkpoint(path: Path) -> RunState:
    """The state in a file. `weights_only`: no code is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged one, or something else.
    """
    try:
        with zipfile.ZipFile(path) as content:
            if (record := content.testzip()) is not None:  # torch does not look at the checksums
                raise ValueError(f"a wrong checksum of {record}")
        state = torch.load(path, weights_only=True)
        missing = [part for part in RunState.__annotations__ if not isinstance(state, dict) or part not in state]
        if missing:
            raise ValueError(f"a {type(state).__name__} without {', '.join(missing)}: of another program")
        return cast(RunState, state)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file makes the unpickler fail in any way: KeyError, EOFError, ...
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
        raise ValueError(f"checkpoint: expected a complete checkpoint, got {path}: {what}.") from error


def unreadable(value: object, name: str) -> str | None:
    """What `read_checkpoint` would not read though it can be saved, as "numpy.float64 at state['rate']"; None: nothing.

    Args:
        value: a state, or a part of it.
        name: what to call it.
    """
    kind = type(value)
    if kind in _READABLE:
        return None
    if isinstance(value, dict) and kind in (dict, OrderedDict):
        parts = ((unreadable(key, f"a key of {name}") or unreadable(v, f"{name}[{key!r}]")) for key, v in value.items())
        return next(filter(None, parts), None)
    if isinstance(value, list | tuple) and kind in (list, tuple):
        return next(filter(None, (unreadable(item, f"{name}[{i}]") for i, item in enumerate(value))), None)
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # a class may forbid to be saved or read in any way
        return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.") + f" at {name}"
    return None


def load_checkpoint(folder: Path) -> RunState | None:
    """The latest checkpoint that can be read, or None where there is none at all.

    A damaged one is reported on standard error, and the one before takes its place: left there, it would become the
    previous one at the next save, and the good one would be lost.

    Raises:
        ValueError: checkpoints are there, and none of them can be read.
        OSError: the damaged one cannot be moved.
    """
    damaged = []
    for name in (CURRENT, PREVIOUS):
        try:
            state = read_checkpoint(folder / name)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged.append(folder / name)
            before = name == CURRENT and (folder / PREVIOUS).exists()
            print(f"{error} The one before is tried." if before else error, file=sys.stderr)
            continue
        if damaged:
            os.replace(folder / CURRENT, folder / DAMAGED)
            os.replace(folder / PREVIOUS, folder / CURRENT)
            print(f"checkpoint: {DAMAGED} in {folder} is the one that could not be read.", file=sys.stderr)
        return state
    if damaged:
        raise ValueError(
            f"checkpoint: expected one that can be read, got {', '.join(map(str, damaged))}, all damaged. Delete the "
            "folder and run again."
        )
    return None


def _sync(folder: Path) -> None:
    """The names of its files on the disk, too. Not every system can open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
