"""The point from which several runs can go on together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spectral_ops.continual.checkpoint import CURRENT, PREVIOUS, RunState, load_checkpoint, read_checkpoint

START = (0, 0)  # the task and the step to take next, of a run without a checkpoint


def common_states(folders: Sequence[Path]) -> list[RunState | None]:
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
                f"run_together: expected checkpoints of one point, got {', '.join(shown)}. Leave at_once out, "
                "give --together as it was, or go on with each run by itself: train --resume."
            )
    for i in ahead:  # only now, when all of them can go on
        os.replace(folders[i] / PREVIOUS, folders[i] / CURRENT)
    return states


def _point(state: RunState | None) -> tuple[int, int]:
    return START if state is None else (state["trainer"]["task"], state["trainer"]["step"])


def _previous(folder: Path) -> RunState | None:
    try:
        return read_checkpoint(folder / PREVIOUS)
    except (OSError, ValueError):
        return None
