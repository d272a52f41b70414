"""Jobs for workers, what happens to them, and what became of all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from spectral_ops.continual.config import RunConfig

WORKER_LOG = "worker.log"  # in the folder of a job's first run: what it printed, and the traceback of its failure


class Job(NamedTuple):
    """A run to do, or several that differ in their seed and share their steps. The label says which, with the seeds."""

    label: str
    config: RunConfig
    folder: Path
    others: tuple[Job, ...] = ()
    """Runs beside this one, by shared steps."""

    @property
    def runs(self) -> tuple[Job, ...]:
        """Each for itself."""
        return self._replace(others=()), *self.others

    @property
    def name(self) -> str:
        seeds = ", ".join(str(run.config.seed) for run in self.runs)
        return f"{self.label} seed{'s' if self.others else ''} {seeds}"

    @property
    def log(self) -> Path:
        return self.folder / WORKER_LOG

    @property
    def steps(self) -> int:
        """Of all its runs."""
        return len(self.runs) * self.config.tasks * self.config.steps


def count_runs(jobs: Iterable[Job]) -> int:
    return sum(len(job.runs) for job in jobs)


@dataclass(frozen=True)
class Event:
    """What happened to a job; `worker` counts from 0."""

    worker: int
    job: Job


class Started(Event):
    """The job has a worker and begins, or goes on from its checkpoint."""


@dataclass(frozen=True)
class Advanced(Event):
    """Several times a second: `step` steps of task `task` are done, of every run of the job."""

    task: int
    step: int


class Finished(Event):
    """The logs hold all of its runs."""


class Halted(Event):
    """The job was stopped between two steps; its checkpoints hold where."""


@dataclass(frozen=True)
class Failed(Event):
    """The job raised an error, or its worker died."""

    reason: str


@dataclass
class Outcome:
    """What became of the jobs; those in neither list were stopped or not begun."""

    finished: list[Job] = field(default_factory=list)
    """Single runs."""
    failures: list[Failed] = field(default_factory=list)
    interrupted: bool = False

    @property
    def status(self) -> int:
        """The exit status: 130 interrupted, 1 with failures, else 0."""
        return 130 if self.interrupted else int(bool(self.failures))
