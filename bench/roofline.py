"""A picture of a results file: achieved GB/s over the bytes that a model's parameters make, under the measured roof.

A panel per op and dtype. Drawn from the file alone; measures nothing.
"""

from __future__ import annotations

import math
import os
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from bench.case import DTYPES, FLOOR
from bench.plot import LINE, is_ours, subtitle
from bench.record import Results
from bench.table import digits

# Of the ops whose bytes are those of one pass, the first two that were measured.
OPS = {
    "accumulate_grad": "Gradient added into .grad",
    "spectral_penalty/value": "Value alone",
    "power_iteration": "One step of power iteration",
    "spectral_penalty/loss": "As a loss term",
}
MOST_OPS = 2
# Okabe and Ito's palette: its blues are ours. A marker each, for who sees no colours.
OURS = (("#0072B2", "o"), ("#56B4E9", "p"), ("#003D5C", "h"), ("#3FA0D0", "<"), ("#1F5A82", ">"), ("#8CCBEF", "*"))
OTHERS = (("#E69F00", "s"), ("#009E73", "v"), ("#D55E00", "^"), ("#CC79A7", "D"), ("#8A6D00", "P"), ("#555555", "X"))
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_ROW = 7.0, 4.6, 0.26  # inches
LEGEND_COLUMNS = 4
# Models nearer to each other than this share of the axis have their names on one line.
NEAR = 0.045

Style = dict[str, Any]


def draw(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes a PNG.

    Raises:
        ValueError: the file holds none of OPS.
    """
    groups = grouped(results)
    if not groups:
        raise ValueError(
            f"draw: expected results of {', '.join(OPS)}, got cases of other ops alone. Measure one: "
            "python -m bench --only accumulate_grad."
        )
    ops = list(dict.fromkeys(op for op, _ in groups))[:MOST_OPS]
    dtypes = [dtype for dtype in DTYPES if any(key == (op, dtype) for key in groups for op in ops)]
    styles = styles_of([case for key, cases in groups.items() if key[0] in ops for case in cases])
    legend_rows = math.ceil((len(styles) + 2) / LEGEND_COLUMNS)
    size = (PANEL_WIDTH * max(len(dtypes), 1.5), PANEL_HEIGHT * len(ops) + LEGEND_ROW * legend_rows + 0.8)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(len(ops), len(dtypes), squeeze=False)
    copy_rate = results["copy_gb_per_s"]
    for i, op in enumerate(ops):
        for j, dtype in enumerate(dtypes):
            if (op, dtype) in groups:
                panel(grid[i, j], groups[op, dtype], styles, copy_rate)
                grid[i, j].set_title(f"{OPS[op]}, {dtype}", fontsize=11, loc="left")
            else:
                grid[i, j].set_visible(False)
    roof = [Line2D([], [], color=LINE, linewidth=1.6, label="floor: the fastest plain pass over the same memory")]
    roof += [Line2D([], [], color=LINE, linestyle=":", label=f"a large torch copy, {digits(copy_rate)} GB/s")]
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    handles += roof
    figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=9, frameon=False)
    figure.suptitle(f"{subtitle(results)}\nhigher is better; the floor of the same run is the roof", fontsize=11)
    figure.savefig(path)


def grouped(results: Results) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Cases by (op, dtype) in the order of OPS, each list from the smallest model to the largest."""
    out: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for op in OPS:
        for case in sorted(results["cases"], key=lambda case: case["bytes"]):
            if op_of(case) == op:
                out.setdefault((op, case["dtype"]), []).append(case)
    return out


def op_of(case: dict[str, Any]) -> str:
    """The name without "/model/dtype"."""
    return case["name"].rsplit("/", 2)[0]


def styles_of(cases: list[dict[str, Any]]) -> dict[str, Style]:
    """How every contender is drawn, in all panels alike: ours thick, a CUDA graph of something dashed and hollow."""
    names = dict.fromkeys(row["name"] for case in cases for row in case["rows"] if row["name"] != FLOOR)
    ours = {name for name in names if is_ours(name)}
    looks: dict[str, tuple[str, str]] = {}
    styles: dict[str, Style] = {}
    for name in sorted(names, key=lambda name: name not in ours):
        plain = name.removesuffix(", graph")
        if plain not in looks:
            kind = OURS if name in ours else OTHERS
            looks[plain] = kind[sum(x in kind for x in looks.values()) % len(kind)]
        colour, marker = looks[plain]
        styles[name] = {"color": colour, "marker": marker, "linewidth": 2.2 if name in ours else 1.1, "markersize": 6}
        if plain != name:
            styles[name] |= {"linestyle": "--", "markerfacecolor": "white"}
    return styles


def panel(axes: Axes, cases: list[dict[str, Any]], styles: dict[str, Style], copy_rate: float) -> None:
    """A line per contender over the models, in which it may be missing from some."""
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for row in case["rows"]:
            points.setdefault(row["name"], []).append((case["bytes"], row["gb_per_s"]))
    for name, style in styles.items():
        if name in points:
            axes.plot(*zip(*points[name], strict=True), label=name, **style)
    axes.plot(*zip(*points[FLOOR], strict=True), color=LINE, linewidth=1.6, marker="_", markersize=9, label=FLOOR)
    axes.axhline(copy_rate, color=LINE, linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = cases[0]["bytes"], cases[-1]["bytes"]
    axes.set_xlim(low / 2, high * 2)
    decades = math.log10(high / low) + 0.6
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda y, _: digits(y))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes counted for one call", fontsize=9)
    axes.set_ylabel("achieved GB/s", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    name_models(axes, [(case["bytes"], case["name"].split("/")[-2]) for case in cases])
    axes.spines[["top", "right"]].set_visible(False)


def name_models(axes: Axes, models: list[tuple[float, str]]) -> None:
    """A faint line and the name of each model along the bottom; those close together share one."""
    left, right = (math.log(x) for x in axes.get_xlim())
    together: list[tuple[float, list[str]]] = []
    for size, name in models:
        at = (math.log(size) - left) / (right - left)
        if together and at - together[-1][0] < NEAR:
            together[-1][1].append(name)
        else:
            together.append((at, [name]))
    # Room below the lowest point, where the names stand.
    low, high = axes.get_ylim()
    axes.set_ylim(low / (high / low) ** 0.3, high)
    for at, names in together:
        axes.axvline(math.exp(left + at * (right - left)), color="#BBBBBB", linewidth=0.8, zorder=0)
        axes.text(
            at, 0.015, " " + ", ".join(names), transform=axes.transAxes, rotation=90, fontsize=8.5, color="#444444",
            ha="right", va="bottom",
        )
