"""Jobs for workers, what happens to them, and what became of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from spectral_ops.continual.config import RunConfig

WORKER_LOG = "worker.log"  # in the folder of a run: what it printed, and the traceback of its failure


class Job(NamedTuple):
    """A run to do. The label says which, together with the seed."""

    label: str
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.label} seed {self.config.seed}"

    @property
    def log(self) -> Path:
        return self.folder / WORKER_LOG


@dataclass(frozen=True)
class Event:
    """What happened to a job; `worker` counts from 0."""

    worker: int
    job: Job


class Started(Event):
    """The job has a worker and begins, or goes on from its checkpoint."""


@dataclass(frozen=True)
class Advanced(Event):
    """Several times a second: `step` steps of task `task` are done."""

    task: int
    step: int


class Finished(Event):
    """The log holds all of the run."""


class Halted(Event):
    """The run was stopped between two steps; its checkpoint holds where."""


@dataclass(frozen=True)
class Failed(Event):
    """The job raised an error, or its worker died."""

    reason: str


@dataclass
class Outcome:
    """What became of the jobs; those in neither list were stopped or not begun."""

    finished: list[Job] = field(default_factory=list)
    failures: list[Failed] = field(default_factory=list)
    interrupted: bool = False

    @property
    def status(self) -> int:
        """The exit status: 130 interrupted, 1 with failures, else 0."""
        return 130 if self.interrupted else int(bool(self.failures))
