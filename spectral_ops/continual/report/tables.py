"""What groups of runs came to, and how they differ on the same seeds: numbers first, then Markdown and CSV of them."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spectral_ops.continual.optional import require
from spectral_ops.continual.report.groups import Group
from spectral_ops.continual.run_folder import Record, Run

LEVEL = 0.95  # of all intervals

ACCURACIES = {  # and what the tables call them
    "final_accuracy": "last task",
    "mean_accuracy": "mean",
    "last_quarter_accuracy": "last quarter",
    "online_accuracy": "online",
    "final_held_out_accuracy": "held-out, last task",
    "mean_held_out_accuracy": "held-out, mean",
}
MEASURES = {**ACCURACIES, "step_seconds": "step (us)", "method_share": "of it the method (%)"}


class Estimate(NamedTuple):
    """The mean of n values, one a seed; `half` is half the width of its t-interval, None for one value."""

    mean: float
    half: float | None
    n: int


class Difference(NamedTuple):
    """A group minus the baseline, over the seeds that both have, after so many tasks."""

    group: str
    measure: str
    seeds: list[int]
    tasks: int
    estimate: Estimate


def run_measures(tasks: Sequence[Record]) -> dict[str, float | None]:
    """What one run came to after these tasks, of which there is at least one; None where the log has nothing.

    Returns:
        final_accuracy: training accuracy of the last task at its end; mean_accuracy: over all tasks;
        last_quarter_accuracy: over the last quarter of them, rounded up;
        online_accuracy: of every batch before the step on it, over all tasks;
        final_held_out_accuracy, mean_held_out_accuracy: the same of held-out samples;
        step_seconds: the median task's seconds of a step; method_share: of all steps' time, the part in the method.
    """
    quarter = tasks[-math.ceil(len(tasks) / 4) :]
    seconds = _column(tasks, "step_seconds")
    spent, total = _sum(_column(tasks, "method_seconds")), _sum(seconds)
    return {
        "final_accuracy": tasks[-1]["accuracy"],
        "mean_accuracy": _mean(_column(tasks, "accuracy")),
        "last_quarter_accuracy": _mean(_column(quarter, "accuracy")),
        "online_accuracy": _mean(_column(tasks, "online_accuracy")),
        "final_held_out_accuracy": tasks[-1].get("held_out_accuracy"),
        "mean_held_out_accuracy": _mean(_column(tasks, "held_out_accuracy")),
        "step_seconds": statistics.median(seconds) if seconds else None,
        "method_share": spent / total if spent is not None and total else None,
    }


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, with mean -+ t_{n-1}(0.975) s / sqrt(n) where there are two or more.

    The interval takes the values for draws of one normal distribution: seeds, all alike.
    """
    n = len(values)
    if n == 1:
        return Estimate(values[0], None, 1)
    quantile = require("scipy.stats", "report").t.ppf((1 + LEVEL) / 2, n - 1)
    return Estimate(statistics.fmean(values), float(quantile) * statistics.stdev(values) / math.sqrt(n), n)


def group_measures(group: Group) -> dict[str, Estimate]:
    """By measure, over the runs that have tasks; a measure that a run lacks is left out.

    Runs that are not equally far are no draws of one distribution: their means have no interval.
    """
    several = [run_measures(run.tasks) for run in _begun(group)]
    equally_far = len({len(run.tasks) for run in _begun(group)}) == 1
    out = {}
    for name in MEASURES:
        values = [value for measures in several if (value := measures[name]) is not None]
        if values and len(values) == len(several):
            out[name] = estimate(values) if equally_far else Estimate(statistics.fmean(values), None, len(values))
    return out


def paired_differences(group: Group, baseline: Group) -> list[Difference]:
    """The accuracies of a group minus the baseline's, seed by seed; nothing where they share no seed.

    A seed is the same tasks, samples and order of them in both, so the difference varies less than either. Of every
    pair as many tasks are compared as all of them have, so that an unfinished run stands against as much of another.
    Held-out accuracies are left out where the groups held out other samples.

    Raises:
        ValueError: the groups are of different streams.
    """
    if group.stream != baseline.stream:
        raise ValueError(
            f"report: expected groups of one stream to be compared by seed, got {group.stream} and {baseline.stream}. "
            "Choose a baseline on the same stream."
        )
    base = {run.config["seed"]: run.tasks for run in _begun(baseline)}
    pairs = {seed: (run.tasks, base[seed]) for run in _begun(group) if (seed := run.config["seed"]) in base}
    count = min((len(tasks) for pair in pairs.values() for tasks in pair), default=0)
    measures = [(run_measures(ours[:count]), run_measures(theirs[:count])) for ours, theirs in pairs.values()]
    out = []
    same_held_out = group.settings.get("held_out_samples") == baseline.settings.get("held_out_samples")
    for name in ACCURACIES:
        if "held_out" in name and not same_held_out:
            continue
        values = [(a[name], b[name]) for a, b in measures]
        differences = [a - b for a, b in values if a is not None and b is not None]
        if differences and len(differences) == len(values):
            out.append(Difference(group.label, name, list(pairs), count, estimate(differences)))
    return out


# ---- Markdown ----


def summary_table(groups: Sequence[Group]) -> str:
    """Every group with its seeds, its tasks and the mean of each measure over its seeds."""
    found = {group.label: group_measures(group) for group in groups}
    shown = [name for name in MEASURES if any(name in measures for measures in found.values())]
    rows = [["group", "seeds", "tasks", *(MEASURES[name] for name in shown)]]
    for group in groups:
        measures = found[group.label]
        cells = [_cell(name, measures[name]) if name in measures else "-" for name in shown]
        rows.append([group.label, str(len(_begun(group))), _tasks(group.runs), *cells])
    return markdown(rows)


def difference_table(groups: Sequence[Group], baseline: Group) -> str:
    """Every other group minus the baseline, where they share a stream and a seed."""
    found: dict[str, list[Difference]] = {
        group.label: paired_differences(group, baseline) if group.stream == baseline.stream else []
        for group in groups
        if group is not baseline
    }
    shown = [name for name in ACCURACIES if any(d.measure == name for several in found.values() for d in several)]
    rows = [["group", "seeds", "tasks", *(ACCURACIES[name] for name in shown)]]
    for label, several in found.items():
        of = {d.measure: d for d in several}
        cells = [_signed(of[name].estimate) if name in of else "-" for name in shown]
        first = several[0] if several else None
        rows.append([label, str(first.estimate.n if first else 0), str(first.tasks if first else "-"), *cells])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as an aligned table, the first being its head; numbers to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join([lines[0], f"| {rule} |", *lines[1:]])


# ---- CSV ----


def write_summary(path: Path, groups: Iterable[Group]) -> None:
    """A row for every group: its seeds, its tasks, every measure's mean and half width, in full precision."""
    columns = [f"{name}{end}" for name in MEASURES for end in ("", "_half_width")]
    rows = []
    for group in groups:
        counts = [len(run.tasks) for run in _begun(group)]
        seeds = " ".join(str(run.config["seed"]) for run in _begun(group))
        row: dict[str, Any] = {"group": group.label, "seeds": seeds}
        row |= {"tasks_fewest": min(counts, default=0), "tasks_most": max(counts, default=0)}
        for name, found in group_measures(group).items():
            row |= {name: found.mean, f"{name}_half_width": found.half}
        rows.append(row)
    _write(path, ["group", "seeds", "tasks_fewest", "tasks_most", *columns], rows)


def write_differences(path: Path, groups: Iterable[Group], baseline: Group) -> None:
    """A row for every group and measure: the mean difference to the baseline and its interval, in full precision."""
    rows = []
    for group in groups:
        if group is baseline or group.stream != baseline.stream:
            continue
        for d in paired_differences(group, baseline):
            mean, half, _ = d.estimate
            row: dict[str, Any] = {"group": d.group, "baseline": baseline.label, "measure": d.measure}
            row |= {"seeds": " ".join(map(str, d.seeds)), "tasks": d.tasks, "mean": mean}
            row |= {"low": None if half is None else mean - half}
            rows.append(row | {"high": None if half is None else mean + half})
    _write(path, ["group", "baseline", "measure", "seeds", "tasks", "mean", "low", "high"], rows)


def _write(path: Path, head: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, head)
        writer.writeheader()
        writer.writerows(rows)


# ---- cells ----


def _cell(name: str, found: Estimate) -> str:
    scale = {"step_seconds": 1e6, "method_share": 100.0}.get(name)
    if scale is not None:  # a time of one machine: its interval over seeds would say little
        return f"{scale * found.mean:.0f}"
    return f"{found.mean:.3f}" + ("" if found.half is None else f" ± {found.half:.3f}")


def _signed(found: Estimate) -> str:
    mean, half, _ = found
    return f"{mean:+.3f}" + ("" if half is None else f" [{mean - half:+.3f}, {mean + half:+.3f}]")


def _tasks(runs: Sequence[Run]) -> str:
    counts = [len(run.tasks) for run in runs if run.tasks] or [0]
    low, high = min(counts), max(counts)
    done = str(low) if low == high else f"{low}-{high}"
    return done if all(run.finished for run in runs) else f"{done} of {runs[0].config.get('tasks', '?')}"


# ---- columns ----


def _begun(group: Group) -> list[Run]:
    """What its figures are of."""
    return [run for run in group.runs if run.tasks]


def _column(tasks: Iterable[Record], name: str) -> list[float]:
    """The values that are there."""
    return [record[name] for record in tasks if record.get(name) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _sum(values: Sequence[float]) -> float | None:
    return math.fsum(values) if values else None
