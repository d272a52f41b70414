"""Checkpoints by torch.distributed.checkpoint, each process its shards; complete, or not there.

One is written into a folder of another name, brought to the disk, and then takes its own: a run killed at any moment
finds the last complete one. The two newest are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from bench.vit_training.processes import Processes

PREFIX, UNFINISHED, ABOUT = "step-", ".part", "run.json"
KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any], about: dict[str, Any], processes: Processes) -> None:
    """Writes the state after `step` steps; every process calls it. about: what kind of run it is, for `check`."""
    final = folder / f"{PREFIX}{step:08d}"
    unfinished = final.with_name(final.name + UNFINISHED)
    if processes.rank == 0:
        for left_over in folder.glob(f"{PREFIX}*{UNFINISHED}"):  # of a run that was killed
            shutil.rmtree(left_over)
        unfinished.mkdir(parents=True)
    processes.barrier()
    with _alone():
        dcp.save(state, checkpoint_id=unfinished)  # brings its files to the disk
    processes.barrier()
    if processes.rank == 0:
        with (unfinished / ABOUT).open("w") as file:
            json.dump({"step": step, "world": processes.world, "run": about}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(unfinished)
        if final.exists():  # a run that was resumed from an older one comes by here again
            shutil.rmtree(final)
        os.rename(unfinished, final)
        _sync(folder)
        for old in complete(folder)[:-KEPT]:
            shutil.rmtree(old)
    processes.barrier()


def complete(folder: Path) -> list[Path]:
    """The checkpoints there, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(rf"{PREFIX}\d+", path.name))


def find(folder: Path, resume: bool, about: dict[str, Any], processes: Processes) -> Path | None:
    """The checkpoint to go on from, the same one in every process; None to begin.

    Raises:
        ValueError: one is there and was not asked for, or it is another run's.
    """
    names: list[str | None] = [None]
    if processes.rank == 0:
        names = [str(path) for path in complete(folder)[-1:]] or names
    if dist.is_initialized():
        dist.broadcast_object_list(names, 0)
    if names[0] is None:
        return None
    path = Path(names[0])
    if not resume:
        raise ValueError(f"train_vit: expected no checkpoint in {folder}, got {path.name}. Add --resume, or delete it.")
    saved = json.loads((path / ABOUT).read_text())["run"]
    for key, value in about.items():
        if saved.get(key) != value:
            raise ValueError(
                f"train_vit: expected {key} as in {path}, {saved.get(key)}, got {value}. "
                "Give the same, or another --checkpoint."
            )
    return path


def step_of(path: Path) -> int:
    """How many steps were taken before it."""
    return int(path.name.removeprefix(PREFIX))


def load(path: Path, state: dict[str, Any]) -> None:
    """Fills the state's tensors, whatever the number of processes that wrote them, and replaces its other values.

    Raises:
        ValueError: files are missing or damaged.
    """
    try:
        with _alone():
            dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:  # a BaseException, with what each process met
        met = next(iter(error.failures.values()))[0]
        what = f"{type(met).__name__}: {(str(met).splitlines() or [''])[0][:200]}"
        raise ValueError(
            f"train_vit: expected {path} to be a complete checkpoint, got {what}. Delete it: the one before is taken."
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """A process without others is no reason for a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _sync(folder: Path) -> None:
    """The names of its files on the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
