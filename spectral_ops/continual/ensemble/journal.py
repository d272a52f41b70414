"""What a run leaves in its folder while it goes on, and the point from which several runs can go on together."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from spectral_ops.continual.checkpoint import CURRENT, PREVIOUS, State, load_checkpoint, save_checkpoint
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.provenance import provenance
from spectral_ops.continual.run_folder import Log, Record, make_folder, to_json

START = (0, 0)  # the task and the step to take next, of a run without a checkpoint


class Journal:
    """The log and the checkpoints of one run.

    Args:
        state: its checkpoint; None: the run begins, and a header is written.
        more: what the header has beside the usual.
    """

    def __init__(self, folder: Path, config: RunConfig, state: State | None, **more: Any):
        make_folder(folder, config)
        self.folder = folder
        self.log = Log(folder, 0 if state is None else state["log_size"])
        self._before = 0.0 if state is None else state["run_seconds"]
        self._begun = time.monotonic()
        if state is None:
            started = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self.log.write({"kind": "header", "config": to_json(config), **provenance(), "started": started, **more})

    @property
    def seconds(self) -> float:
        """Of the run, those before its checkpoint among them."""
        return self._before + time.monotonic() - self._begun

    def save(self, trainer: State) -> None:
        """A checkpoint as `trainer.run` writes it."""
        save_checkpoint(self.folder, {"trainer": trainer, "log_size": self.log.size, "run_seconds": self.seconds})

    def end(self, records: Sequence[Record]) -> None:
        self.log.write({"kind": "end", "tasks": len(records), "seconds": self.seconds})
        _ = self.log.size  # on the disk

    def close(self) -> None:
        self.log.close()


def common_states(folders: Sequence[Path]) -> list[State | None]:
    """The checkpoints of all folders at one point; None for each where there is none yet, which is the start.

    Checkpoints are written folder by folder, so that a crash may leave some one save ahead of the others. Those go back
    to the one before, which becomes their current one.

    Raises:
        ValueError: other points: one of the runs went on without the others.
    """
    states = [load_checkpoint(folder) for folder in folders]
    points = [_point(state) for state in states]
    earliest = min(points, default=START)
    ahead = [i for i, point in enumerate(points) if point > earliest]
    for i in ahead:
        states[i] = _previous(folders[i])
        if states[i] is None or _point(states[i]) != earliest:
            shown = (f"{f.name} task {task} step {step}" for f, (task, step) in zip(folders, points, strict=True))
            raise ValueError(
                f"run_together: expected checkpoints of one point, got {', '.join(shown)}. Go on with each run by "
                "itself: train --resume."
            )
    for i in ahead:  # only now, when all of them can go on
        os.replace(folders[i] / PREVIOUS, folders[i] / CURRENT)
    return states


def _point(state: State | None) -> tuple[int, int]:
    return START if state is None else (state["trainer"]["task"], state["trainer"]["step"])


def _previous(folder: Path) -> State | None:
    try:
        return torch.load(folder / PREVIOUS, weights_only=True)
    except Exception:  # missing, or damaged, which makes the unpickler fail in any way
        return None
