"""`spectral-ops train`: one run."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.described import described
from spectral_ops.continual.optional import require
from spectral_ops.continual.run_folder import LOG, Record, read_run
from spectral_ops.continual.settings import Settings, resolve
from spectral_ops.continual.steps import Stopped
from spectral_ops.continual.trainer import run

TENSORBOARD = "tensorboard"  # in the folder of the run


@dataclass(frozen=True, kw_only=True)
@described()
class TrainConfig(Settings):
    """Train one network on a stream of tasks by one method."""

    out: Path
    """Folder of the run: config.json, log.jsonl, checkpoints."""
    resume: bool = False
    """Go on with an unfinished run in the folder."""
    tensorboard: bool = False
    """Write the log for TensorBoard as well, into the folder."""


def main(config: TrainConfig) -> int:
    """Train one network on a stream of tasks by one method."""
    try:
        finished = (config.out / LOG).exists() and read_run(config.out).finished
        records = train(resolve(config), config)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped:
        print(f"Stopped. {config.out} holds all of it: go on with the same command and --resume.", file=sys.stderr)
        return 130
    if finished:
        print(f"{config.out} holds this run, finished: nothing was run.")
    first, last = records[0], records[-1]
    print(
        f"{len(records)} tasks: accuracy {first['accuracy']:.3f} on the first, {last['accuracy']:.3f} on the last, "
        f"{1e6 * last['step_seconds']:.0f} us a step. The log is {config.out / LOG}."
    )
    return 0


def train(settings: RunConfig, config: TrainConfig) -> list[Record]:
    """The run under a progress bar; Ctrl-C and SIGTERM stop it between two steps."""
    tqdm = require("tqdm", "train").tqdm
    board = Board(config.out) if config.tensorboard else None
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    total, title = settings.tasks * settings.steps, f"{settings.method} seed {settings.seed}"
    bar: Any = None  # until the first step is done: an error before it stands alone

    def progress(task: int, step: int) -> None:
        nonlocal bar
        done = task * settings.steps + step
        if bar is None:  # steps of an earlier time are no part of its rate
            interval = 0.5 if sys.stderr.isatty() else 10
            bar = tqdm(total=total, initial=max(0, done - 1), desc=title, unit="step", mininterval=interval)
        bar.update(done - bar.n)
        if board is not None and step == 0:
            board.update()

    try:
        records = run(settings, config.out, resume=config.resume, progress=progress, stop=stop)
        if bar is not None:
            bar.update(total - bar.n)
        if board is not None:
            board.update()
        return records
    finally:
        if bar is not None:
            bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)


class Board:
    """A run's log as TensorBoard has it: one scalar for every number of a task, over tasks. Made anew at each start."""

    def __init__(self, folder: Path):
        self._make = require("torch.utils.tensorboard", "train --tensorboard").SummaryWriter
        self._run, self._written = folder, 0
        self._writer: Any = None

    def update(self) -> None:
        """Write the tasks that have been logged since."""
        if not (self._run / LOG).exists():
            return
        if self._writer is None:  # now, when the folder is the run's
            shutil.rmtree(self._run / TENSORBOARD, ignore_errors=True)
            self._writer = self._make(self._run / TENSORBOARD)
        for record in read_run(self._run).tasks[self._written :]:
            for name, value in scalars(record):
                self._writer.add_scalar(name, value, record["task"])
            self._written += 1
        self._writer.flush()


def scalars(record: Record) -> list[tuple[str, float]]:
    """The numbers of a task's record, those of layers as name/layer."""
    numbers: list[tuple[str, Any]] = []
    for name, value in record.items():
        numbers += (
            [(f"{name}/{key}", item) for key, item in value.items()] if isinstance(value, dict) else [(name, value)]
        )
    return [(n, v) for n, v in numbers if isinstance(v, int | float) and n != "task"]
