"""The ladder as a picture: time, and share of a training step, over model size and over ranks. Measures nothing."""

from __future__ import annotations

import os
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from bench.cost_model import GRADIENT, OPS, OURS, TORCH, VALUE
from bench.plot import subtitle
from bench.record import Results
from bench.table import digits
from bench.vit_shapes import VITS

# Okabe and Ito's palette. A marker each, for who sees no colours.
LOOKS = {VALUE: ("#56B4E9", "v"), GRADIENT: ("#0072B2", "o"), OURS: ("#009E73", "s"), TORCH: ("#E69F00", "D")}
HERE, STORED = "measured in this run", "measured on an H200"
SIZE = (14.0, 10.6)  # inches
# Of the models: from light to dark, told apart in grey too.
LIGHTEST, DARKEST = 0.25, 1.0


def draw(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes a PNG of four panels, in the first dtype of the ladder."""
    ladder = results["ladder"]
    dtype = ladder["dtypes"][0]
    figure = Figure(figsize=SIZE, dpi=130, layout="constrained")
    (times, shares), (rank_times, rank_shares) = figure.subplots(2, 2)
    over_models(times, ladder, dtype, results["device"]["name"])
    share_over_models(shares, ladder, dtype)
    over_ranks(rank_times, ladder, dtype, "time")
    over_ranks(rank_shares, ladder, dtype, "share")
    figure.suptitle(f"The ladder of vision transformers, {dtype}; {subtitle(results)}", fontsize=11)
    figure.savefig(path)


def rows_of(ladder: dict[str, Any], dtype: str, **wanted: Any) -> list[dict[str, Any]]:
    """The predictions of a dtype, from the smallest model up."""
    return [p for p in ladder["predictions"] if p["dtype"] == dtype and all(p[k] == x for k, x in wanted.items())]


def parameters(points: list[dict[str, Any]]) -> list[int]:
    return [VITS[p["model"]].parameters for p in points]


def over_models(axes: Axes, ladder: dict[str, Any], dtype: str, device: str) -> None:
    """Lines: predicted; marks: measured. A device of its own has lines from its own rates."""
    single = rows_of(ladder, dtype, ranks=ladder["ranks"][0])
    for op in reversed(OPS):  # ours over torch's
        colour, marker = LOOKS[op]
        one = [p["seconds"][op] for p in single]
        if ladder["ranks"][0] == 1:
            wide = 4.5 if op == TORCH else 1.6  # what SpectralAdamW takes lies on it
            axes.plot(parameters(single), one, color=colour, linewidth=wide, alpha=0.5 if op == TORCH else 1.0)
        for where, face in (("stored", colour), ("here", "white")):
            points = [p for p in ladder[where] if p["op"] == op and p["dtype"] == dtype]
            xs, ys = [p["parameters"] for p in points], [p["seconds"] for p in points]
            axes.plot(xs, ys, linestyle="", marker=marker, color=colour, markerfacecolor=face, markersize=7)
            if where == "here":
                known = [(p["parameters"], p["predicted_s"]) for p in points if p["predicted_s"] is not None]
                axes.plot([x for x, _ in known], [y for _, y in known], color=colour, linestyle=":", linewidth=1.4)
    handles = [Line2D([], [], color=LOOKS[op][0], marker=LOOKS[op][1], label=op) for op in OPS]
    handles += [Line2D([], [], color="#555555", label="predicted, one H200")]
    handles += [Line2D([], [], color="#555555", linestyle="", marker="o", label=STORED)]
    if ladder["here"]:
        handles += [Line2D([], [], color="#555555", linestyle=":", label=f"predicted, {device}")]
        label = f"{HERE}, {device}"
        handles += [Line2D([], [], color="#555555", linestyle="", marker="o", markerfacecolor="white", label=label)]
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="lower right")
    frame(axes, "Time of one call, one device")
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    name_sizes(axes, ladder["models"])


def share_over_models(axes: Axes, ladder: dict[str, Any], dtype: str) -> None:
    """With gradient over all ranks: the smallest number and the largest, and what the optimizer's step leaves of it."""
    styles = ("-", "--")
    for count, style in zip(dict.fromkeys((ladder["ranks"][0], ladder["ranks"][-1])), styles, strict=False):
        points = rows_of(ladder, dtype, ranks=count)
        ranks = "1 rank" if count == 1 else f"{count:,} ranks"
        for key, op, what in (("share", GRADIENT, "with gradient"), ("share_folded", OURS, "in SpectralAdamW")):
            known = [p for p in points if p[key] > 0]  # 0 has no place on a log axis
            label = f"{what}, {ranks}" + ("" if known else ": 0")
            ys = [p[key] for p in known]
            axes.plot(parameters(known), ys, color=LOOKS[op][0], marker=LOOKS[op][1], linestyle=style, label=label)
    axes.legend(fontsize=8, frameon=False)
    frame(axes, f"Predicted share of a training step, {ladder['images']} images a rank")
    axes.yaxis.set_major_formatter(per_cent)
    name_sizes(axes, ladder["models"])


def over_ranks(axes: Axes, ladder: dict[str, Any], dtype: str, what: str) -> None:
    """A line per model: the penalty with gradient, its time or its share of a training step."""
    models = ladder["models"]
    for i, model in enumerate(models):
        points = rows_of(ladder, dtype, model=model)
        ys = [p["seconds"][GRADIENT] if what == "time" else p["share"] for p in points]
        depth = LIGHTEST + (DARKEST - LIGHTEST) * i / max(1, len(models) - 1)
        colour = tuple(1 - depth * (1 - c) for c in (0.0, 0.27, 0.45))
        axes.plot(ladder["ranks"], ys, color=colour, marker="o", markersize=4, label=model)
    if what == "time":
        reduced = [p["all_reduce_s"] for p in rows_of(ladder, dtype, model=models[-1])]
        known = [(r, s) for r, s in zip(ladder["ranks"], reduced, strict=True) if s > 0]
        if known:
            label = f"of it the all-reduce, {models[-1]}"
            axes.plot(*zip(*known, strict=True), color="#D55E00", linestyle="--", linewidth=1.4, label=label)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    titles = {"time": "Predicted time with gradient, by ranks", "share": "Predicted share of a training step, by ranks"}
    frame(axes, titles[what])
    axes.set_xlabel("ranks (H200, 8 a node)", fontsize=9)
    axes.xaxis.set_major_locator(FixedLocator(ladder["ranks"]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter("s") if what == "time" else per_cent)


def per_cent(x: float, _: int | None = None) -> str:
    return f"{digits(100 * x).rstrip('0').rstrip('.') if x < 1 else round(100 * x)} %"


def frame(axes: Axes, title: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=11, loc="left")
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def name_sizes(axes: Axes, models: list[str]) -> None:
    """The models along the axis, where their sizes are."""
    axes.xaxis.set_major_locator(FixedLocator([VITS[name].parameters for name in models]))
    axes.xaxis.set_major_formatter(lambda x, at: models[at] if at is not None and at < len(models) else "")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("parameters of the block matrices", fontsize=9)
    for label in axes.get_xticklabels():
        label.set(rotation=30, ha="right")
