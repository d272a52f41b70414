"""What a run of the demo shows: its results read back from the file, as tables and as a picture.

Measuring and drawing are separate: everything here works on a `results.jsonl`, finished or not.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spectral_ops.continual.optional import require

# Okabe and Ito's palette, told apart with any colour vision.
COLORS = {"none": "#D55E00", "l2": "#009E73", "spectral": "#0072B2", "reset": "#555555"}
NAMES = {"none": "no penalty", "l2": "L2", "spectral": "spectral", "reset": "fresh network per task"}
CHANCE = 0.1  # ten classes

Record = dict[str, Any]


def read_results(path: str | os.PathLike[str]) -> tuple[Record, list[Record], Record | None]:
    """The header, the task records in the order (method, seed, task), and the timing, None before the run's end.

    A last line cut off by a crash is left out.

    Raises:
        ValueError: the file does not begin with a header, or an earlier line is not JSON.
    """
    records: list[Record] = []
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"read_results: expected line {number} of {path} to be JSON, got {line[:40]!r}. Run the demo again."
            ) from error
    if not records or records[0].get("kind") != "header":
        raise ValueError(
            f"read_results: expected {path} to begin with a header, got {str(records[:1])[:60]}. Run the demo again."
        )
    tasks = sorted(
        (r for r in records if r["kind"] == "task"),
        key=lambda r: (list(NAMES).index(r["method"]), r["seed"], r["task"]),
    )
    return records[0], tasks, next((r for r in records if r["kind"] == "timing"), None)


def curves(records: Iterable[Record], method: str, key: str) -> dict[int, list[float]]:
    """By seed, the series over tasks of "accuracy" or of "sigma" (the largest layer's); nan where not finite."""
    series: dict[int, list[float]] = {}
    for r in records:
        if r["method"] == method:
            value = r[key] if key != "sigma" else max((math.nan if s is None else s) for s in r["sigma"].values())
            series.setdefault(r["seed"], []).append(math.nan if value is None else value)
    return series


def mean_curve(series: dict[int, list[float]]) -> list[float]:
    """The mean over seeds, up to the last task that every seed has reached."""
    return [statistics.fmean(values) for values in zip(*series.values(), strict=False)]


def level(series: dict[int, list[float]]) -> float:
    """The mean over all tasks and seeds."""
    return statistics.fmean(value for values in series.values() for value in values)


def best_strengths(sweep: dict[str, dict[float, float]]) -> dict[str, float]:
    """The strength of the highest mean accuracy, for each method of the sweep."""
    return {method: max(trials, key=lambda strength: trials[strength]) for method, trials in sweep.items()}


def sweep_table(
    sweep: dict[str, dict[float, float]],
    strengths: dict[str, float],
    stream: str,
    sweep_seeds: Sequence[int],
    seeds: Sequence[int],
) -> str:
    """How the strengths were chosen: every trial's figure, and which strength is used on which seeds."""
    trials = " and ".join(f"{len(values)} ({method})" for method, values in sweep.items())
    lines = [
        f"Strengths: best of {trials} trials on {stream} stream, by mean accuracy over its tasks and the seeds "
        f"{_join(sweep_seeds)}:"
    ]
    for method, values in sweep.items():
        line = "  ".join(f"{strength:.0e} {accuracy:.3f}" for strength, accuracy in values.items())
        best = best_strengths(sweep)[method]
        note = "" if strengths[method] == best else " (given by hand)"
        lines.append(f"  {method:<9} {line}   used: {strengths[method]:g}{note}")
        if best in (min(values), max(values)):
            lines.append(f"  {method}: the best lies on the edge of the strengths tried; a better one may lie outside.")
    shared = sorted(set(sweep_seeds) & set(seeds))
    other = "other seeds" if not shared else f"seeds of which {_join(shared)} also chose the strengths"
    lines.append(f"Shown on {other}: {_join(seeds)}.")
    return "\n".join(lines)


def summary_table(path: str | os.PathLike[str]) -> str:
    """Accuracy over the stream, final sigma_max of every layer and step time of each method, means over the seeds."""
    _, records, timing = read_results(path)
    methods = [m for m in NAMES if any(r["method"] == m for r in records)]
    length = max(r["task"] for r in records) + 1
    shown = sorted({round(i * (length - 1) / 4) for i in range(5)})
    layers = list(records[0]["sigma"])
    head = ["method", "strength", *(f"task {t + 1}" for t in shown), "last: min-max", "all"]
    head += [f"sigma {name.removesuffix('.weight')}" for name in layers] + ["us/step", "ratio"]
    rows = [head]
    for method in methods:
        mine = [r for r in records if r["method"] == method]
        series = curves(mine, method, "accuracy")
        mean = mean_curve(series)
        last = [values[-1] for values in series.values()]
        row = [method, f"{mine[0]['strength']:g}" if method in ("l2", "spectral") else "-"]
        if method == "reset":  # its tasks are alike: one level
            row += ["-" for _ in shown] + ["-"]
        else:
            row += [f"{mean[t]:.3f}" if t < len(mean) else "-" for t in shown] + [f"{min(last):.3f}-{max(last):.3f}"]
        row.append(f"{level(series):.3f}")
        final = [r for r in mine if r["task"] == len(series[r["seed"]]) - 1]
        for name in layers:
            sigmas = [math.nan if r["sigma"][name] is None else r["sigma"][name] for r in final]
            row.append(f"{statistics.fmean(sigmas):.2f}")
        seconds = timing["step_seconds"] if timing else {}
        has_time = method in seconds
        row += [f"{seconds[method] * 1e6:.0f}", f"{seconds[method] / seconds['none']:.2f}"] if has_time else ["-", "-"]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    seeds = sorted({r["seed"] for r in records})
    lines.insert(
        0,
        f"Training accuracy at the end of a task and exact sigma_max after the last task, "
        f"means over the seeds {_join(seeds)}; step time alone, interleaved, median:",
    )
    return "\n".join(lines)


def draw_results(path: str | os.PathLike[str], picture: str | os.PathLike[str]) -> None:
    """Draw accuracy and largest sigma_max over the tasks into a PNG: seeds thin, their mean thick."""
    figure_module = require("matplotlib.figure", "draw_results")
    header, records, _ = read_results(path)
    # A Figure of its own draws with Agg and leaves pyplot's backend as the caller has it.
    figure = figure_module.Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    accuracy, sigma = figure.subplots(1, 2)
    for axes, key in ((accuracy, "accuracy"), (sigma, "sigma")):
        for method in NAMES:
            series = curves(records, method, key)
            if not series:
                continue
            strength = header["strengths"][method]
            label = NAMES[method] + (f", strength {strength:g}" if strength else "")
            if method == "reset":
                axes.axhline(level(series), color=COLORS[method], linestyle="--", linewidth=1.5, label=label)
                continue
            for values in series.values():
                axes.plot(range(1, len(values) + 1), values, color=COLORS[method], linewidth=0.8, alpha=0.4)
            mean = mean_curve(series)
            axes.plot(range(1, len(mean) + 1), mean, color=COLORS[method], linewidth=2.4, label=label)
        axes.set_xlabel("task")
        axes.set_xlim(left=0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    accuracy.axhline(CHANCE, color="#999999", linestyle=":", linewidth=1)
    accuracy.text(1, CHANCE - 0.015, "chance", color="#777777", fontsize=8, va="top")
    accuracy.set_ylim(0, 1.02)
    accuracy.set_ylabel("training accuracy at the end of the task")
    accuracy.set_title("Learning random labels, task after task")
    sigma.axhline(1.0, color="#999999", linestyle=":", linewidth=1)
    sigma.text(1, 0.95, "target of the penalty", color="#777777", fontsize=8, va="top")
    sigma.set_ylim(bottom=0)
    sigma.set_ylabel(r"largest $\sigma_{\max}$ of all layers")
    sigma.set_title("Largest singular value")
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    config = header["config"]
    seeds = _join(sorted({r["seed"] for r in records}))
    figure.suptitle(
        f"{config['data']}: {config['samples']} images, {config['steps']} steps per task; mean of seeds {seeds} thick, "
        "single seeds thin",
        fontsize=10,
    )
    figure.savefig(picture)


def _join(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
