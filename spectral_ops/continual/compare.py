"""`spectral-ops compare`: several methods on the same streams of tasks, and the report of what came out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from spectral_ops.continual.choices import choose
from spectral_ops.continual.jobs import Job
from spectral_ops.continual.optional import require
from spectral_ops.continual.progress import run_shown
from spectral_ops.continual.report import ReportConfig
from spectral_ops.continual.report import main as report_main
from spectral_ops.continual.report.groups import group_runs
from spectral_ops.continual.report.runs import find_runs
from spectral_ops.continual.run_folder import LOG, read_run
from spectral_ops.continual.settings import Settings
from spectral_ops.continual.trainer import run
from spectral_ops.continual.variants import (
    REPORT,
    Table,
    check_jobs,
    named,
    parse_variant,
    plan_jobs,
    resolve_shared,
)
from spectral_ops.continual.workers import RunFunction

BAD_INPUT = (ValueError, TypeError, RuntimeError, OSError)  # before anything has run: one line, exit status 2
Hidden = Annotated[None, tyro.conf.Suppress, tyro.conf.Fixed]  # an option of a single run that has no place here
Report = Callable[[Sequence[Path], Path, Path | None], int]


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """Train by several methods on the same streams of tasks, and report on them.

    Given again, the same command goes on where it stopped: a finished run is not run again. What --config names may
    hold the methods as well, as tables [[methods]].
    """

    out: Path
    """Folder: a run for each method and seed in <method>/seed-<n>, and report/."""
    methods: tuple[str, ...] = ()
    """Each as name,key=value,...: none l2,strength=1e-4 spectral,strength=1e-3,target=2 my.module:Class,period=5. A
    method may have its own strength, lr, optimizer, momentum, model and model_options.x; other keys are its options."""
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    """A run of each method for each of them."""
    baseline: str | None = None
    """The method that the report compares the others with, as its folder is called; default: the first."""
    workers: int = 2
    """Runs at a time, each in a process of its own; 1 runs in this process. Results do not depend on it."""
    dry_run: bool = False
    """Check everything, list the runs, and run nothing."""
    method: Hidden = None
    strength: Hidden = None
    options: Hidden = None
    seed: Hidden = None


def main(config: CompareConfig) -> int:
    """Train by several methods on the same streams of tasks, and report on them."""
    return compare(config)


def compare(config: CompareConfig, *, run: RunFunction = run, report: Report | None = None) -> int:
    """The exit status: 0; 1 where runs failed; 2 for bad input; 130 interrupted. See `run_variants` for the rest."""
    try:
        base, tables, tuned_on = resolve_shared(config)
        if tables and config.methods:
            raise ValueError(f"methods: expected them once, got --methods and those of {config.config}. Drop one.")
        refuse_tuning_seeds(config, tuned_on)
        tables = tables or [parse_variant(text) for text in config.methods]
    except BAD_INPUT as error:
        print(error, file=sys.stderr)
        return 2
    return run_variants("compare", config, base, tables, baseline=config.baseline, run=run, report=report)


def run_variants(
    operation: str,
    config: Any,
    base: Any,
    tables: Sequence[Table],
    *,
    baseline: str | None = None,
    run: RunFunction = run,
    report: Report | None = None,
) -> int:
    """Plans, checks, runs and reports on the variants in `tables`; the exit status.

    Args:
        operation: the command's name.
        config: its out, seeds, workers and dry_run.
        base: the RunConfig that all share.
        tables: of the variants.
        baseline: label of the one that the report compares the others with; None: the first.
        report: as `write_report`; its status counts where all runs finished.
    """
    try:
        if config.workers < 1:
            raise ValueError(f"{operation}: expected workers >= 1, got {config.workers}. Change --workers.")
        variants = {variant.label: variant for variant in named(tables)}
        jobs = plan_jobs(base, list(variants.values()), config.seeds, config.out)
        compared = variants[jobs[0].label] if baseline is None else choose("baseline", baseline, variants)
        check_jobs(jobs)
        for module in ("tqdm", "matplotlib"):
            require(module, operation)  # now, not after hours of training
        if config.dry_run:
            print(plan_text(jobs, config.workers))
            return 0
    except BAD_INPUT as error:
        print(error, file=sys.stderr)
        return 2
    outcome = run_shown(operation, jobs, config.workers, run)
    if outcome.interrupted:
        print(f"Stopped. The same command goes on: {config.out} holds what was done.", file=sys.stderr)
        return outcome.status
    folders = [job.folder for job in jobs if (job.folder / LOG).exists()]
    reported = 0
    if folders:
        of_baseline = next((job.folder for job in jobs if job.label == compared.label and job.folder in folders), None)
        reported = (report or write_report)(folders, config.out / REPORT, of_baseline)
        print(f"{len(outcome.finished)} of {len(jobs)} runs finished, in {config.out}; report in {config.out / REPORT}")
    return outcome.status or reported


def refuse_tuning_seeds(config: Any, tuned_on: Sequence[int]) -> None:
    """What is chosen on a seed looks better there than it is."""
    both = sorted(set(tuned_on) & set(config.seeds))
    if both:
        raise ValueError(
            f"seeds: expected others than {config.config} was chosen on, got {', '.join(map(str, both))}. Change "
            "--seeds."
        )


def write_report(folders: Sequence[Path], out: Path, baseline: Path | None) -> int:
    """The report on runs, as `spectral-ops report` writes it; its exit status.

    Args:
        baseline: the folder of a run of those that the others are compared with, seed by seed.
    """
    groups, _ = group_runs(find_runs(folders)[0])
    labels = [group.label for group in groups if baseline in [run.folder for run in group.runs]]
    compared = labels[0] if labels and len(groups) > 1 else None
    return report_main(ReportConfig(runs=tuple(folders), out=out, baseline=compared))


def plan_text(jobs: Sequence[Job], workers: int) -> str:
    """The runs in the order in which they are begun, each with what is there of it."""
    width = max(len(job.name) for job in jobs)
    lines = [f"{len(jobs)} runs, {min(workers, len(jobs))} at a time:"]
    return "\n".join(lines + [f"  {job.name:<{width}}  {_state(job):<14}  {job.folder}" for job in jobs])


def _state(job: Job) -> str:
    if not (job.folder / LOG).exists():
        return "new"
    there = read_run(job.folder)
    return "finished" if there.finished else f"{len(there.tasks)} of {job.config.tasks} tasks"
