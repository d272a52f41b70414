"""`spectral-ops compare`: several methods on the same streams of tasks, and the report of what came out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spectral_ops.continual.choices import choose
from spectral_ops.continual.commands import BAD_INPUT, Hidden, RunsConfig, check_counts, grouped, plan_text, run_planned
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.described import described
from spectral_ops.continual.methods import METHODS
from spectral_ops.continual.optional import require
from spectral_ops.continual.progress import tell_failures
from spectral_ops.continual.report import ReportConfig
from spectral_ops.continual.report import main as report_main
from spectral_ops.continual.report.groups import group_runs
from spectral_ops.continual.report.runs import find_runs
from spectral_ops.continual.run_folder import LOG
from spectral_ops.continual.trainer import run
from spectral_ops.continual.variants import REPORT, Table, check_jobs, named, plan_jobs, resolve_methods
from spectral_ops.continual.workers import RunFunction

Report = Callable[[Sequence[Path], Path, Path | None], int]


@dataclass(frozen=True, kw_only=True)
@described(methods=f"Known: {', '.join(METHODS)}.")
class CompareConfig(RunsConfig):
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
    strength: Hidden = None


def main(config: CompareConfig) -> int:
    """Train by several methods on the same streams of tasks, and report on them."""
    return compare(config)


def compare(config: CompareConfig, *, run: RunFunction = run, report: Report | None = None) -> int:
    """The exit status: 0; 1 where runs failed; 2 for bad input; 130 interrupted. See `run_variants` for the rest."""
    try:
        base, tables, tuned_on = resolve_methods(config)
        refuse_tuning_seeds(config, tuned_on)
    except BAD_INPUT as error:
        print(error, file=sys.stderr)
        return 2
    return run_variants("compare", config, base, tables, baseline=config.baseline, run=run, report=report)


def run_variants(
    operation: str,
    config: RunsConfig,
    base: RunConfig,
    tables: Sequence[Table],
    *,
    baseline: str | None = None,
    run: RunFunction = run,
    report: Report | None = None,
) -> int:
    """Plans, checks, runs and reports on the variants in `tables`; the exit status.

    Args:
        operation: the command's name.
        config: its options.
        base: what all share.
        tables: of the variants.
        baseline: label of the one that the report compares the others with; None: the first.
        report: as `write_report`; its status counts where all runs finished.
    """
    try:
        check_counts(operation, config)
        variants = {variant.label: variant for variant in named(tables)}
        jobs = plan_jobs(base, list(variants.values()), config.seeds, config.out)
        compared = variants[jobs[0].label] if baseline is None else choose("baseline", baseline, variants)
        handed_out, notes = grouped(jobs, config, check_jobs(jobs))
        for module in ("tqdm", "matplotlib"):
            require(module, operation)  # now, not after hours of training
        if config.dry_run:
            print("\n".join([plan_text(handed_out, config.workers), *notes]))
            return 0
    except BAD_INPUT as error:
        print(error, file=sys.stderr)
        return 2
    outcome = run_planned(operation, config, handed_out, run, notes=notes)
    if outcome.interrupted:
        return outcome.status
    folders = [job.folder for job in jobs if (job.folder / LOG).exists()]
    reported = 0
    if folders:
        of_baseline = next((job.folder for job in jobs if job.label == compared.label and job.folder in folders), None)
        reported = (report or write_report)(folders, config.out / REPORT, of_baseline)
        print(f"{len(outcome.finished)} of {len(jobs)} runs finished, in {config.out}; report in {config.out / REPORT}")
    tell_failures(operation, outcome, len(jobs))
    return outcome.status or reported


def refuse_tuning_seeds(config: RunsConfig, tuned_on: Sequence[int]) -> None:
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
