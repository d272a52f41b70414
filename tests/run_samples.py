"""Runs that only write a folder as the trainer does, with accuracies known beforehand and a fate of their own.

`sample_run` is importable by its name, which workers in other processes need. The configuration's options say what
becomes of it: {"fate": "raise"}, "exit", "kill", "segfault", "wait" (until it is stopped),
"hang" (until it is killed).
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.jobs import Job
from spectral_ops.continual.run_folder import check_folder, make_folder, read_run, to_json
from spectral_ops.continual.trainer import Stopped

CALLS = "calls"  # a line for each time that a run was begun: its process


def accuracy_of(config: RunConfig, task: int) -> float:
    """Best at strength 1e-3 and learning rate 1e-3, falling from task to task, higher for higher seeds."""
    far = abs(math.log10(config.strength / 1e-3)) if config.strength else 0.0
    return round(0.9 - 0.1 * far - 0.1 * abs(math.log10(config.lr / 1e-3)) - 0.02 * task + 0.01 * config.seed, 6)


def sample_run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool,
    progress: Callable[[int, int], None],
    stop: threading.Event,
) -> None:
    assert resume  # what was begun is gone on with
    if check_folder(folder, config, resume=resume) and read_run(folder).finished:
        return
    make_folder(folder, config)
    with (folder / CALLS).open("a") as file:
        print(os.getpid(), file=file)
    print(f"output of {config.method}")
    progress(0, 1)
    _meet(config.options.get("fate"), config, folder, progress, stop)
    tasks = [
        {
            "kind": "task",
            "task": task,
            "accuracy": accuracy_of(config, task),
            "online_accuracy": 1 - accuracy_of(config, task),
            "held_out_accuracy": None if task == 0 else 1 - accuracy_of(config, task) / 2,
        }
        for task in range(config.tasks)
    ]
    records = [{"kind": "header", "config": to_json(config)}, *tasks, {"kind": "end", "tasks": config.tasks}]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _meet(
    fate: str | None, config: RunConfig, folder: Path, progress: Callable[[int, int], None], stop: threading.Event
) -> None:
    if fate == "raise":
        raise ValueError(f"no good: {config.method}\nsecond line")
    if fate == "exit":
        os._exit(3)
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "segfault":
        faulthandler._sigsegv()  # type: ignore[attr-defined]
    if fate == "hang":
        while True:
            time.sleep(60)
    if fate == "wait":
        for step in range(2, 100_000):
            progress(0, step)
            if stop.is_set():
                (folder / "checkpoint.pt").write_text(str(step))
                raise Stopped
            time.sleep(0.02)


def sample_job(folder: Path, label: str, seed: int = 0, tasks: int = 2, **options: Any) -> Job:
    config = RunConfig(method=label, seed=seed, tasks=tasks, steps=10, options=options)
    return Job(label, config, folder / label / f"seed-{seed}")


def calls(job: Job) -> list[int]:
    path = job.folder / CALLS
    return [int(line) for line in path.read_text().split()] if path.exists() else []
