"""`spectral-ops sweep`: strengths and learning rates, chosen with equally many trials for every method."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from spectral_ops.continual.choices import choose
from spectral_ops.continual.commands import BAD_INPUT, Hidden, RunsConfig, check_counts, grouped, plan_text, run_planned
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.described import described
from spectral_ops.continual.jobs import Job
from spectral_ops.continual.methods import METHODS
from spectral_ops.continual.optional import require
from spectral_ops.continual.progress import tell_failures
from spectral_ops.continual.provenance import provenance
from spectral_ops.continual.run_folder import LOG, plain, read_run, to_json, write_text
from spectral_ops.continual.streams import STREAMS
from spectral_ops.continual.toml_text import toml_lines
from spectral_ops.continual.trainer import run
from spectral_ops.continual.trials import Choice, Trial, choose_trial, plan_trials
from spectral_ops.continual.variants import BY_VARIANT, REPORT_SEED, check_jobs, plan_jobs, resolve_methods
from spectral_ops.continual.workers import RunFunction

Select = Literal["accuracy", "online_accuracy", "held_out_accuracy"]


@dataclass(frozen=True, kw_only=True)
@described(methods=f"Known: {', '.join(METHODS)}.")
class SweepConfig(RunsConfig):
    """Choose strength and learning rate of every method on tuning seeds, with equally many trials.

    A trial is one strength and one learning rate, run on every tuning seed. A method of n strengths and m learning
    rates has n * m trials. n and m are those of the longest grids; a shorter grid is filled up by geometric means in
    its widest gaps, so that it has more points and the same range. A method without strength (or with a fixed one,
    strength=1e-3) has n * m learning rates instead, and one with a fixed learning rate n * m strengths; learning rates
    of its own (none,lr=1e-4,3e-4,1e-3) count for m only where there are more of them than trials.

    Chosen is the highest mean over tasks and seeds; of equal ones the lowest strength, then the lowest learning rate.
    `spectral-ops compare --config OUT/best.toml` reports on the choice, on other seeds.
    """

    out: Path
    """Folder: a run for each trial and seed, sweep.json with all figures, best.toml with the choice."""
    methods: tuple[str, ...] = ()
    """Each as name,key=value,... as for compare. strength=1e-4,1e-3 and lr=1e-4,1e-3 are grids of its own, one value is
    fixed."""
    strengths: tuple[float, ...] = ()
    """Strengths of every method that has one and names none; default: those that are usual for the method."""
    lrs: tuple[float, ...] = ()
    """Learning rates of every method that names none; default: lr and half a decade to both sides."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Tuning seeds, below 10: those from 10 on are for reports."""
    select: Select = "accuracy"
    """What is averaged: accuracy after a task's last step, online_accuracy, of each batch before its step, or
    held_out_accuracy, of samples not trained on, on streams that have them."""
    strength: Hidden = None


def main(config: SweepConfig) -> int:
    """Choose strength and learning rate of every method on tuning seeds, with equally many trials."""
    return sweep(config)


def sweep(config: SweepConfig, *, run: RunFunction = run) -> int:
    """The exit status: 0; 1 where runs failed, whose trials are not chosen; 2 for bad input; 130 interrupted."""
    try:
        _check(config)
        base, tables, _ = resolve_methods(config)
        if config.select == "held_out_accuracy" and not choose("stream", base.stream, STREAMS).holds_out:
            raise ValueError(
                f"select: expected accuracy or online_accuracy for {base.stream}, which holds nothing out, got "
                "held_out_accuracy. Change --select."
            )
        trials = plan_trials(tables, lr=base.lr, strengths=config.strengths, lrs=config.lrs)
        jobs = plan_jobs(base, [trial.variant for trial in trials], config.seeds, config.out)
        handed_out, notes = grouped(jobs, config, check_jobs(jobs))
        best_text(base, config, {trial.method: Choice(trial, None, []) for trial in trials}, len(trials))  # can be said
        require("tqdm", "sweep")
        if config.dry_run:
            print("\n".join([plan_text(handed_out, config.workers), *notes]))
            return 0
    except BAD_INPUT as error:
        print(error, file=sys.stderr)
        return 2
    outcome = run_planned("sweep", config, handed_out, run, notes=notes)
    if outcome.interrupted:
        return outcome.status
    status = outcome.status
    try:
        conclude(base, config, trials, jobs)
    except OSError as error:
        print(
            f"sweep: expected {config.out} to be writable, got {error}. Make it so and give the same command again: "
            "what is finished is not run again.",
            file=sys.stderr,
        )
        status = 2
    tell_failures("sweep", outcome, len(jobs))
    return status


def conclude(base: RunConfig, config: SweepConfig, trials: Sequence[Trial], jobs: Sequence[Job]) -> None:
    """Reads the runs, prints what was chosen, and writes sweep.json and best.toml. OSError where they cannot be."""
    scores = {trial.variant.label: _scores(trial, jobs, config.select) for trial in trials}
    means = {label: _mean(values) for label, values in scores.items()}
    by_method: dict[str, list[Trial]] = {}
    for trial in trials:
        by_method.setdefault(trial.method, []).append(trial)
    choices = {method: choose_trial(mine, means) for method, mine in by_method.items()}
    count = len(next(iter(by_method.values())))
    content = {
        "select": config.select,
        "seeds": config.seeds,
        "trials_per_method": count,
        "config": {name: value for name, value in to_json(base).items() if name not in BY_VARIANT},
        **provenance(),
        "trials": [
            {
                "method": trial.method,
                "label": trial.variant.label,
                "strength": trial.strength,
                "lr": trial.lr,
                "mean": means[trial.variant.label],
                "by_seed": scores[trial.variant.label],
            }
            for trial in trials
        ],
        "chosen": {method: _chosen(choice) for method, choice in choices.items()},
    }
    print(summary(choices, config, count), flush=True)  # first: on a full disk it is all there is
    config.out.mkdir(parents=True, exist_ok=True)  # where every run failed before it made its folder
    write_text(config.out / "sweep.json", json.dumps(plain(content), indent=2, allow_nan=False) + "\n")
    lost = [method for method, choice in choices.items() if choice.trial is None]
    if lost:
        print(f"No best.toml: no trial of {', '.join(lost)} has finished. All figures: {config.out / 'sweep.json'}")
        return
    write_text(config.out / "best.toml", best_text(base, config, choices, count))
    print(
        f"All figures: {config.out / 'sweep.json'}. Next, on other seeds: "
        f"spectral-ops compare --config {config.out / 'best.toml'} --out <folder>"
    )


def summary(choices: Mapping[str, Choice], config: SweepConfig, count: int) -> str:
    """What was chosen, in a line for each method, and what lies on an edge."""
    seeds = ", ".join(map(str, config.seeds))
    lines = [f"Best of {count} trials each, by the mean of {config.select} over the tasks and the seeds {seeds}:"]
    width = max(map(len, choices))
    for method, choice in choices.items():
        if choice.trial is None:
            lines.append(f"  {method:<{width}}  no trial has finished")
            continue
        strength = "" if choice.trial.strength is None else f"strength {choice.trial.strength:g}, "
        lines.append(f"  {method:<{width}}  {choice.mean:.4f}  {strength}lr {choice.trial.lr:g}{_fewer(choice, count)}")
        lines += [f"  {'':<{width}}  its {edge} tried: a better one may lie beyond" for edge in choice.edges]
    return "\n".join(lines)


def best_text(base: RunConfig, config: SweepConfig, choices: Mapping[str, Choice], count: int) -> str:
    """The text of best.toml: what all methods share, and each at its best."""
    seeds = ", ".join(map(str, config.seeds))
    shared = {name: v for name, v in asdict(base).items() if name not in (*BY_VARIANT, "lr") and v not in (None, {})}
    lines = [
        f"# The best of {count} trials of each method, by the mean of {config.select} over the tasks and the seeds "
        f"{seeds}. Report on other seeds.",
        *toml_lines({"tuning_seeds": config.seeds, **shared}),
    ]
    for choice in choices.values():
        if choice.trial is not None:
            mean = "" if choice.mean is None else f"  # {choice.mean:.4f}{_fewer(choice, count)}"
            lines += ["", f"[[methods]]{mean}", *toml_lines(choice.trial.full_table)]
    return "\n".join(lines) + "\n"


def _fewer(choice: Choice, count: int) -> str:
    """A best of fewer trials is no equal one: a method some of whose trials failed was not given its share."""
    return "" if choice.finished == count else f", the best of {choice.finished} trials that finished"


def _check(config: SweepConfig) -> None:
    check_counts("sweep", config)
    reported = [seed for seed in config.seeds if seed >= REPORT_SEED]
    if reported:
        raise ValueError(
            f"sweep: expected seeds below {REPORT_SEED}, got {', '.join(map(str, reported))}. Change --seeds: the "
            "others are for reports, and what is chosen on a seed looks better there than it is."
        )


def _scores(trial: Trial, jobs: Sequence[Job], select: Select) -> dict[str, float | None]:
    """By seed the mean over the tasks of a finished run; None where it has not finished or is not finite."""
    scores: dict[str, float | None] = {}
    for job in jobs:
        if job.label == trial.variant.label:
            there = read_run(job.folder) if (job.folder / LOG).exists() else None
            values = [task[select] for task in there.tasks] if there is not None and there.finished else []
            if select == "held_out_accuracy":  # a task may have no sample of its classes held out
                values = [value for value in values if value is not None]
            complete = bool(values) and None not in values
            scores[str(job.config.seed)] = statistics.fmean(values) if complete else None
    return scores


def _mean(scores: Mapping[str, float | None]) -> float | None:
    """Over all seeds or not at all: trials on fewer seeds are no equal ones."""
    values = [value for value in scores.values() if value is not None]
    return statistics.fmean(values) if len(values) == len(scores) else None


def _chosen(choice: Choice) -> dict[str, Any] | None:
    trial = choice.trial
    if trial is None:
        return None
    label, (strength, lr) = trial.variant.label, (trial.strength, trial.lr)
    return {"label": label, "strength": strength, "lr": lr, "mean": choice.mean, "on_the_edge": choice.edges}
