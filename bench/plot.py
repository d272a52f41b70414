"""A picture of a results file: a bar per contender, the floor a line, times on a log axis where it is near."""

from __future__ import annotations

import math
import os
import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from bench.case import FLOOR
from bench.record import Results
from bench.table import byte_count, digits, duration, is_busy

# Okabe and Ito's palette, told apart with any colour vision; dark and light enough to be told apart in grey, too.
OWN, OTHER, LINE = "#0072B2", "#E69F00", "#000000"
# Rows of ours, by themselves or in a graph; all others are somebody else's code, or ours without what is measured.
OURS = (
    "accumulate_grad_",
    "accumulate_grad_ alone",
    "accumulate_grad_ + AdamW(fused)",
    "attach",
    "native step alone",
    "power_iteration",
    "reg()",
    "spectral_norm",
    "spectral_penalty",
    "SpectralAdamW",
    "together",
    "trainer, spectral",
    "trainer, spectral-adamw",
    "two workers",
    "two workers, five together in each",
)
COLUMNS = 2
BAR_HEIGHT, PANEL_MARGIN, WIDTH = 0.34, 0.95, 13.0  # inches
# How far the axis goes beyond the bars, as a share of its length on the log scale: room for the numbers.
ROOM = 0.5
TITLE = 56  # characters of a line
# A floor so many times below the fastest says nothing of it, and a log axis down to it would make all bars alike: it is
# left out, and the axis begins at 0.
FAR = 100


def draw(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes a PNG with a panel per case, two in a row."""
    cases = results["cases"]
    columns = min(COLUMNS, len(cases))
    rows = math.ceil(len(cases) / columns)
    most = [max(len(case["rows"]) for case in cases[i * columns : (i + 1) * columns]) for i in range(rows)]
    heights = [bars * BAR_HEIGHT + PANEL_MARGIN for bars in most]
    # A Figure of its own draws with Agg and leaves pyplot's backend as the caller has it.
    figure = Figure(figsize=(WIDTH * columns / COLUMNS, sum(heights) + 0.9), dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for i, case in enumerate(cases):
        panel(grid.flat[i], case, most[i // columns])
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    below = "median of interleaved rounds, whiskers: quartiles; number: times the memory floor"
    figure.suptitle(f"{subtitle(results)}\n{below}", fontsize=11)
    key = [Patch(color=OWN, label="spectral_ops"), Patch(color=OTHER, label="others, or without the penalty")]
    figure.legend(handles=key, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.savefig(path)


def is_ours(name: str) -> bool:
    return name.removesuffix(", graph") in OURS


def subtitle(results: Results) -> str:
    """What was measured on, and the warnings that belong beside every figure."""
    device = results["device"]
    quick = "   QUICK RUN: no time is worth reading" if results["quick"] else ""
    busy = "   BUSY MACHINE" if is_busy(results) else ""
    versions = f"torch {results['versions']['torch']}, {results['date'][:10]}"
    return f"{device['name']}, threads: {device['threads']}, {versions}{quick}{busy}"


def panel(axes: Axes, case: dict[str, Any], slots: int) -> None:
    """Horizontal bars, the contender the others are compared with on top, ours in a colour of their own.

    Args:
        slots: how many bars, the floor's label counted as one, the highest panel of this row has.
    """
    bars = [row for row in case["rows"] if row["name"] != FLOOR]
    floor = next(row["seconds"]["median"] for row in case["rows"] if row["name"] == FLOOR)
    times = [row["seconds"]["median"] for row in bars]
    whiskers = [
        [row["seconds"]["median"] - row["seconds"]["q25"] for row in bars],
        [row["seconds"]["q75"] - row["seconds"]["median"] for row in bars],
    ]
    colours = [OWN if is_ours(row["name"]) else OTHER for row in bars]
    names = [row["name"] for row in bars]
    axes.barh(names, times, xerr=whiskers, color=colours, height=0.7, error_kw={"ecolor": "#555555", "capsize": 2.5})
    axes.set_ylim(slots - 0.4, -0.6)  # the first on top, the floor's label below the last
    near, right = floor * FAR > min(times), max(floor, *(row["seconds"]["q75"] for row in bars))
    if near:
        axes.set_xscale("log")
        # A bar on a log axis has no zero: all begin a little left of the floor, or of the fastest.
        left = min(floor, *times) / 2
        axes.set_xlim(left, right * (right / left) ** ROOM)
    else:
        axes.set_xlim(0, right * (1 + ROOM))
    axes.xaxis.set_major_formatter(EngFormatter("s"))
    axes.xaxis.set_minor_formatter(lambda x, _: "")
    for i, row in enumerate(bars):
        text = f"  {duration(row['seconds']['median'])}" + f"   {digits(row['to_floor']['median'])}x" * near
        axes.text(max(row["seconds"]["q75"], floor), i, text, va="center", fontsize=9)
    if near:
        axes.axvline(floor, color=LINE, linestyle="--", linewidth=1.4)
        axes.text(floor, len(bars) - 0.1, f" floor {duration(floor)}", va="center", fontsize=9)
    size = byte_count(case["bytes"]).replace(" ", chr(160))  # a space that no line ends at
    title = textwrap.fill(f"{case['title']}  ({size})", TITLE)
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
