"""Pictures of groups of runs: learning curves, what strengths do, and how the network changes over the tasks."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spectral_ops.continual.optional import require
from spectral_ops.continual.report.groups import Group, label_settings
from spectral_ops.continual.report.tables import ACCURACIES, run_measures
from spectral_ops.continual.run_folder import Record, Run

# Okabe and Ito's palette, told apart with any colour vision; grey for its yellow, which is lost on white.
# The ninth, Tol's wine, is for `none` at two learning rates beside seven methods.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A", "#882255")
WIDE = 30.0  # largest over smallest value from which on an axis is logarithmic
PANEL = (4.6, 3.7)  # inches
ROW = 0.2  # of a legend, in inches
LETTERS = 11.0  # of a legend in an inch, with the line before it taken for six

Value = Callable[[Record], float]


class Panel(NamedTuple):
    """One axes of a picture: what of a task's record it shows."""

    title: str
    value: Value
    may_be_log: bool = False


def _plain(name: str) -> Value:
    return lambda record: _number(record.get(name))


def _over_layers(name: str, reduce: Callable[[list[float]], float]) -> Value:
    """nan where one layer's is missing: it would be the largest, or not count in a mean."""

    def value(record: Record) -> float:
        layers = [_number(item) for item in (record.get(name) or {}).values()]
        return math.nan if not layers or any(map(math.isnan, layers)) else reduce(layers)

    return value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


LEARNING = (
    Panel("training accuracy at the end of the task", _plain("accuracy")),
    Panel("online accuracy, before each step", _plain("online_accuracy")),
    Panel("held-out accuracy at the end of the task", _plain("held_out_accuracy")),
)
NETWORK = (
    Panel(r"largest $\sigma_{\max}$ of all layers", _over_layers("sigma", max), True),
    Panel("effective rank of the weights, mean of layers", _over_layers("effective_rank", statistics.fmean)),
    Panel("effective rank of the features, mean of layers", _over_layers("feature_rank", statistics.fmean)),
    Panel("share of dormant units, mean of layers", _over_layers("dormant", statistics.fmean)),
)
SENSITIVITY = ("mean_accuracy", "final_accuracy", "mean_held_out_accuracy")


def draw_all(groups: Sequence[Group], folder: Path) -> list[Path]:
    """Every picture there are data for, as PNG: curves, network, sensitivity; with many groups one for each method.

    Raises:
        RuntimeError: matplotlib is missing.
    """
    pictures = []
    for page, of_page in _pages(groups).items():
        for name, panels in (("curves", LEARNING), ("network", NETWORK)):
            path = folder / f"{name}{page}.png"
            if draw_over_tasks(of_page, panels, path):
                pictures.append(path)
    families = _families(groups)
    swept = [family for family in families if len(family.trials) > 1]
    levels = [family for family in families if not family.trials]
    for page, of_page in _pages(swept, len(COLORS) - len(levels)).items():
        path = folder / f"sensitivity{page}.png"
        if draw_sensitivity([*of_page, *levels], path):
            pictures.append(path)
    return pictures


def draw_over_tasks(groups: Sequence[Group], panels: Sequence[Panel], path: Path) -> bool:
    """One axes for each panel there are data for: seeds thin, the mean of them bold. False where there are none.

    The mean goes up to the last task that every seed has reached.
    """
    curves = [[_curves(group.runs, panel) for group in groups] for panel in panels]
    kept = [i for i, of_panel in enumerate(curves) if any(map(_is_number, itertools.chain(*of_panel)))]
    if not kept:
        return False
    figure, axes = _figure(len(kept))
    for ax, i in zip(axes, kept, strict=True):
        for group, color, series in zip(groups, _colors(len(groups)), curves[i], strict=True):
            if len(series) > 1:
                for values in series:
                    _plot(ax, values, color=color, linewidth=0.7, alpha=0.45)
            mean = [statistics.fmean(values) for values in zip(*series, strict=False)]
            _plot(ax, mean, color=color, linewidth=2.2, label=group.label)
        ax.set_title(panels[i].title, fontsize=10)
        ax.set_xlabel("task")
        ax.set_xlim(0.5, max(len(run.tasks) for group in groups for run in group.runs) + 0.5)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if panels[i].may_be_log and _is_wide(curves[i]):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    _finish(figure, axes, groups, "; single seeds thin, their mean bold", path)
    return True


class Family(NamedTuple):
    """Groups that differ only in their strength: by strength above 0, or without one a single level."""

    label: str
    groups: list[Group]

    @property
    def settings(self) -> dict[str, Any]:
        return self.groups[0].settings

    @property
    def trials(self) -> dict[float, Group]:
        return {s: group for group in self.groups if (s := group.settings.get("strength"))}


def draw_sensitivity(families: Sequence[Family], path: Path) -> bool:
    """Measures over strength, on a logarithmic axis: single seeds as dots, their mean as a line.

    A family without a strength, and a strength of 0, is a dashed level. False where there are no data.
    """
    found = {id(g): [run_measures(run.tasks) for run in g.runs if run.tasks] for f in families for g in f.groups}
    kept = [name for name in SENSITIVITY if any(m[name] is not None for several in found.values() for m in several)]
    if not kept:
        return False
    figure, axes = _figure(len(kept))
    for ax, name in zip(axes, kept, strict=True):
        for family, color in zip(families, _colors(len(families)), strict=True):
            seeds = {id(g): [_number(measures[name]) for measures in found[id(g)]] for g in family.groups}
            trials = {s: seeds[id(g)] for s, g in sorted(family.trials.items()) if seeds[id(g)]}
            means = [statistics.fmean(values) for values in trials.values()]
            if trials:
                ax.plot(list(trials), means, color=color, linewidth=2, marker="o", markersize=5, label=family.label)
            for strength, values in trials.items():
                if len(values) > 1:
                    ax.plot([strength] * len(values), values, ".", color=color, markersize=5, alpha=0.45)
            for group in family.groups:
                if not group.settings.get("strength") and seeds[id(group)]:
                    level = statistics.fmean(seeds[id(group)])
                    ax.axhline(level, color=color, linestyle="--", linewidth=1.6, label=_level_label(family, group))
        _strength_axis(ax, sorted({s for family in families for s in family.trials}))
        ax.set_title(f"accuracy, {ACCURACIES[name]}" + (" of tasks" if name.startswith("mean") else ""), fontsize=10)
    groups = [group for family in families for group in family.groups]
    _finish(figure, axes, groups, "; single seeds as dots, their mean as a line", path)
    return True


def _strength_axis(ax: Any, strengths: Sequence[float]) -> None:
    ax.set_xscale("log")
    ax.set_xlabel("strength")
    if strengths[-1] < 10 * strengths[0]:  # no two decades to label: label what was tried
        ax.set_xticks(strengths, [f"{s:g}" for s in strengths], rotation=30)
    ax.xaxis.set_minor_formatter(require("matplotlib.ticker", "report").NullFormatter())


def _level_label(family: Family, group: Group) -> str:
    strength = group.settings.get("strength")
    if strength is None:
        return family.label + (" (default strength)" if family.trials else "")
    return f"{family.label} (strength 0)"


def _families(groups: Sequence[Group]) -> list[Family]:
    together: dict[str, list[Group]] = {}
    for group in groups:
        rest = {name: value for name, value in group.settings.items() if name != "strength"}
        together.setdefault(json.dumps(rest, sort_keys=True), []).append(group)
    labels = label_settings([json.loads(rest) for rest in together])
    return [Family(label, several) for label, several in zip(labels, together.values(), strict=True)]


# ---- common to all ----


def _pages(items: Sequence[Any], most: int = len(COLORS)) -> dict[str, list[Any]]:
    """What comes into one picture, by what its name ends with: all, or where that is too much, method by method."""
    if len(items) <= most:
        return {"": list(items)} if items else {}
    pages: dict[str, list[Any]] = {}
    for item in items:
        # package.module:Class is a method too, but no part of a file's name.
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in item.settings["method"])
        pages.setdefault(f"-{name}", []).append(item)
    return pages


def _colors(count: int) -> list[Any]:
    """So many, told apart; beyond the palette in the order of the groups, which is that of their numbers."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    colormap = require("matplotlib", "report").colormaps["viridis"]
    return [colormap(0.93 * i / (count - 1)) for i in range(count)]  # its end is too light


def _curves(runs: Sequence[Run], panel: Panel) -> list[list[float]]:
    return [[panel.value(record) for record in run.tasks] for run in runs if run.tasks]


def _is_number(values: Sequence[float]) -> bool:
    return any(map(math.isfinite, values))


def _is_wide(curves: Sequence[Sequence[Sequence[float]]]) -> bool:
    values = [v for of_group in curves for series in of_group for v in series if math.isfinite(v)]
    return min(values) > 0 and max(values) > WIDE * min(values)


def _plot(ax: Any, values: Sequence[float], **style: Any) -> None:
    # A single task is a point, which a line does not show.
    ax.plot(range(1, len(values) + 1), values, marker="o" if len(values) == 1 else None, **style)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    columns = 2 if panels == 4 else min(panels, 3)
    rows = math.ceil(panels / columns)
    # A Figure of its own draws with Agg and leaves pyplot's backend as the caller has it.
    size = (PANEL[0] * max(columns, 2), PANEL[1] * rows + 0.6)
    figure = require("matplotlib.figure", "report").Figure(figsize=size, dpi=130, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _finish(figure: Any, axes: Sequence[Any], groups: Sequence[Group], note: str, path: Path) -> None:
    """The same look, one legend below the axes, and above them what all the groups share; `note` is of seeds."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    width, height = figure.get_size_inches()
    columns = max(1, min(len(handles), int(LETTERS * width / (6 + max(map(len, handles))))))
    labels = [textwrap.fill(label, int(LETTERS * width) - 6) for label in handles]  # else cut off at both edges
    lines = max(label.count("\n") + 1 for label in labels)
    figure.set_size_inches(width, height + ROW * math.ceil(len(handles) / columns) * lines)
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    shared = [
        name
        for key in ("stream", "data", "model", "optimizer")
        if len(names := {str(group.settings.get(key)) for group in groups}) == 1
        for name in names
    ]
    several_seeds = any(len(group.runs) > 1 for group in groups)
    figure.suptitle(", ".join(shared) + (note if several_seeds else ""), fontsize=10)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.07)
    figure.savefig(path)
