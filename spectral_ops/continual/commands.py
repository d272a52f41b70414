"""What the commands of many runs, compare, sweep and ablate, have in common: options, the plan, the runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from spectral_ops.continual.jobs import Job, Outcome
from spectral_ops.continual.progress import run_shown
from spectral_ops.continual.run_folder import LOG, read_run
from spectral_ops.continual.settings import Settings
from spectral_ops.continual.workers import RunFunction

BAD_INPUT = (ValueError, TypeError, RuntimeError, OSError)  # before anything has run: one line, exit status 2
Hidden = Annotated[None, tyro.conf.Suppress, tyro.conf.Fixed]  # an option of a single run that has no place here


@dataclass(frozen=True, kw_only=True)
class RunsConfig(Settings):
    """Options of all of them; each command says for itself what is in `out` and what `seeds` are for."""

    out: Path
    seeds: tuple[int, ...]
    workers: int = 2
    """Runs at a time, each in a process of its own; 1 runs in this process. Results do not depend on it."""
    dry_run: bool = False
    """Check everything, list the runs, and run nothing."""
    method: Hidden = None
    options: Hidden = None
    seed: Hidden = None


def check_workers(operation: str, config: RunsConfig) -> None:
    if config.workers < 1:
        raise ValueError(f"{operation}: expected workers >= 1, got {config.workers}. Change --workers.")


def plan_text(jobs: Sequence[Job], workers: int) -> str:
    """The runs in the order in which they are begun, each with what is there of it."""
    width = max(len(job.name) for job in jobs)
    lines = [f"{len(jobs)} runs, {min(workers, len(jobs))} at a time:"]
    return "\n".join(lines + [f"  {job.name:<{width}}  {_state(job):<14}  {job.folder}" for job in jobs])


def run_planned(operation: str, config: RunsConfig, jobs: Sequence[Job], run: RunFunction) -> Outcome:
    """`run_shown`, and a line on how to go on where it was interrupted."""
    outcome = run_shown(operation, jobs, config.workers, run)
    if outcome.interrupted:
        print(f"Stopped. The same command goes on: {config.out} holds what was done.", file=sys.stderr)
    return outcome


def _state(job: Job) -> str:
    if not (job.folder / LOG).exists():
        return "new"
    there = read_run(job.folder)
    return "finished" if there.finished else f"{len(there.tasks)} of {job.config.tasks} tasks"
