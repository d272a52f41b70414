"""What the commands of many runs, compare, sweep and ablate, have in common: options, the plan, the runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from spectral_ops.continual.described import described
from spectral_ops.continual.ensemble.stackable import why_alone
from spectral_ops.continual.jobs import Job, Outcome, count_runs
from spectral_ops.continual.progress import run_watched, tell_failures
from spectral_ops.continual.run_folder import LOG, read_run
from spectral_ops.continual.settings import Settings
from spectral_ops.continual.streams import Stream
from spectral_ops.continual.workers import RunFunction

BAD_INPUT = (ValueError, TypeError, RuntimeError, OSError)  # before anything has run: one line, exit status 2
Hidden = Annotated[None, tyro.conf.Suppress, tyro.conf.Fixed]  # an option of a single run that has no place here


@dataclass(frozen=True, kw_only=True)
@described()
class RunsConfig(Settings):
    """Options of all of them; each command says for itself what is in `out` and what `seeds` are for."""

    out: Path
    seeds: tuple[int, ...]
    workers: int = 2
    """Runs at a time, each in a process of its own; 1 runs in this process. Results do not depend on it."""
    together: int = 1
    """Seeds of a method that share their steps, in one process: small MLPs are up to 3 times faster, convolutions are
    not. Results are those of single runs up to rounding. Of methods that cannot, each seed goes by itself. Best is the
    number that gives every worker a group: 5 for ten seeds in 2 workers."""
    dry_run: bool = False
    """Check everything, list the runs, and run nothing."""
    method: Hidden = None
    options: Hidden = None
    seed: Hidden = None


def check_counts(operation: str, config: RunsConfig) -> None:
    for name in ("workers", "together"):
        if (count := getattr(config, name)) < 1:
            raise ValueError(f"{operation}: expected {name} >= 1, got {count}. Change --{name}.")


def grouped(jobs: Sequence[Job], config: RunsConfig, stream: Stream) -> tuple[list[Job], list[str]]:
    """The jobs with config.together seeds of a variant in each, and a line for each variant whose seeds cannot be, and
    for workers without a group.

    Groups are of all seeds in their order, finished or not, so that a command given again has the same ones.

    Args:
        jobs: single runs.
        stream: of one of them.
    """
    if config.together == 1:
        return list(jobs), []
    variants: dict[str, list[Job]] = {}
    for job in jobs:
        variants.setdefault(job.label, []).append(job)
    reasons = dict(zip(variants, _why_alone([runs[0] for runs in variants.values()], stream), strict=True))
    groups: list[Job] = []
    for label, runs in variants.items():
        size = config.together if reasons[label] is None else 1
        groups += [runs[i]._replace(others=tuple(runs[i + 1 : i + size])) for i in range(0, len(runs), size)]
    notes = [
        f"{label}: each seed by itself. Shared steps expect {reason}" for label, reason in reasons.items() if reason
    ]
    shared = [len(variants[label]) for label, reason in reasons.items() if reason is None]
    notes += _idle_workers(config, len(jobs) - sum(shared), shared)
    place = {job.folder: i for i, job in enumerate(jobs)}
    return sorted(groups, key=lambda job: place[job.folder]), notes


def _why_alone(jobs: Sequence[Job], stream: Stream) -> list[str | None]:
    known: dict[str, str | None] = {}  # by what decides it
    reasons = []
    for config in [job.config for job in jobs]:
        kind = repr([config.method, config.options, config.optimizer, config.model, config.model_options])
        if kind not in known:
            known[kind] = why_alone(config, stream.input_shape, stream.classes)
        reasons.append(known[kind])
    return reasons


def _idle_workers(config: RunsConfig, single: int, shared: Sequence[int]) -> list[str]:
    """A line where smaller groups would give every worker one.

    Args:
        single: runs by themselves.
        shared: the seeds of each variant whose steps are shared.
    """

    def count(size: int) -> int:
        return single + sum(math.ceil(seeds / size) for seeds in shared)

    idle = config.workers - count(config.together)
    enough = [size for size in range(2, config.together) if count(size) >= config.workers]
    if idle <= 0 or not enough:
        return []
    better = min(size for size in enough if count(size) == count(enough[-1]))  # of as few groups the most even ones
    return [f"{idle} of {config.workers} workers will have nothing to do. --together {better} gives each a group"]


def plan_text(jobs: Sequence[Job], workers: int) -> str:
    """The runs in the order in which they are begun, each with what is there of it."""
    width = max(len(run.name) for job in jobs for run in job.runs)
    shared = "" if len(jobs) == count_runs(jobs) else f" in {len(jobs)} groups"
    lines = [f"{count_runs(jobs)} runs{shared}, {min(workers, len(jobs))} at a time:"]
    for job in jobs:
        for run in job.runs:
            beside = f"  beside {len(job.others)}" if job.others else ""
            lines.append(f"  {run.name:<{width}}  {_state(run):<14}  {run.folder}{beside}")
    return "\n".join(lines)


def run_planned(
    operation: str, config: RunsConfig, jobs: Sequence[Job], run: RunFunction, notes: Sequence[str] = ()
) -> Outcome:
    """`run_watched`, with the notes before it, and failures and a line on how to go on where it was interrupted.

    Else its caller tells the failures, at the very end: a report on the others is long.
    """
    for note in notes:
        print(f"{operation}: {note}", file=sys.stderr)
    outcome = run_watched(operation, jobs, config.workers, run)
    if outcome.interrupted:
        tell_failures(operation, outcome, count_runs(jobs))
        print(f"Stopped. The same command goes on: {config.out} holds what was done.", file=sys.stderr)
    return outcome


def _state(job: Job) -> str:
    if not (job.folder / LOG).exists():
        return "new"
    there = read_run(job.folder)
    return "finished" if there.finished else f"{len(there.tasks)} of {job.config.tasks} tasks"
