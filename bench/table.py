"""Results as text: a table per case, for the terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.record import Results

# Load average before a run above which its figures are marked: less than one other process at work.
BUSY = 0.5

# A row of the training step: the penalty without the step around it.
ALONE = "accumulate_grad_ alone"

HEAD = ("", "time", "spread", "GB/s", "x floor", "x base", "over base", "error")


def duration(seconds: float) -> str:
    """Three digits with a unit: 12.3 us."""
    magnitude = abs(seconds)
    unit, size = ("s", 1.0) if magnitude >= 1 else ("ms", 1e-3) if magnitude >= 1e-3 else ("us", 1e-6)
    return f"{digits(seconds / size)} {unit}"


def digits(x: float) -> str:
    """Three significant digits, without an exponent where the number is of ordinary size."""
    if x == 0:
        return "0"
    if not 1e-3 <= abs(x) < 1e5:
        return f"{x:.1e}"
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 1 else f"{x:.3f}"


def byte_count(size: float) -> str:
    for name, unit in (("GB", 1e9), ("MB", 1e6)):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def spread(summary: dict[str, float]) -> str:
    """Half the distance of the quartiles, in per cent of the median."""
    return f"{50 * (summary['q75'] - summary['q25']) / summary['median']:.0f} %"


def cells(case: dict[str, Any], row: dict[str, Any]) -> list[str]:
    shown = [
        row["name"],
        duration(row["seconds"]["median"]),
        spread(row["seconds"]),
        digits(row["gb_per_s"]),
        digits(row["to_floor"]["median"]),
        digits(row["to_base"]["median"]),
        duration(row["over_base_seconds"]["median"]),
        "-" if row["error"] is None else f"{row['error']:.0e}",
    ]
    return shown + [text(row) for column, text in EXTRA.items() if is_known(case, column)]


def count(x: int | None) -> str:
    return "-" if x is None else f"{x:,}"


# Columns of CUDA runs: head -> text of a row. Left out where no row of a case knows them.
EXTRA: dict[str, Callable[[dict[str, Any]], str]] = {
    "launches": lambda row: count(row["launches"]),
    "host": lambda row: "-" if row["host_seconds"] is None else duration(row["host_seconds"]),
    "peak memory": lambda row: "-" if row["peak_bytes"] is None else byte_count(row["peak_bytes"]),
}


def is_known(case: dict[str, Any], column: str) -> bool:
    return any(EXTRA[column](row) != "-" for row in case["rows"])


def is_busy(results: Results) -> bool:
    """Whether others were at work when the run began."""
    return (results["load"]["before"] or 0.0) > BUSY


def heading(results: Results) -> list[str]:
    """What was measured on, and what a reader must know before trusting a figure."""
    device, versions, load = results["device"], results["versions"], results["load"]
    commit = "no commit" if results["commit"] is None else results["commit"][:10] + (", dirty" * bool(results["dirty"]))
    lines = [
        f"{device['name']}, {device['cores']} cores, threads: {device['threads']}; torch {versions['torch']}, "
        f"Python {versions['python']}; {commit}; {results['date']}",
        "Time: median of interleaved rounds. Spread: half the distance of the quartiles. Ratios: medians of those "
        "within each round. Error: the largest relative one against float64. "
        f"A large torch copy: {results['copy_gb_per_s']:.1f} GB/s, reads and writes counted.",
    ]
    if device["type"] == "cuda":
        lines.append(
            "Launches: kernels, copies and fills of one call; those of a graph are started by the host at once. Host: "
            "until a call returns, the device not waited for. Peak memory: beyond what is allocated before the call."
        )
    if results["quick"]:
        lines.append("QUICK RUN: small models, few rounds: it shows that everything runs; no time is worth reading.")
    if is_busy(results):
        lines.append(f"BUSY MACHINE: load {load['before']:.1f} when the run began. Times are too high, ratios noisy.")
    return lines


def case_lines(case: dict[str, Any]) -> list[str]:
    """The line over a table, and the lines under it."""
    above = f"{case['bytes']:,} bytes at least, {case['parameters']:,} parameters, {case['rounds']} rounds"
    below = [*case["notes"], *(f"{row['name']}: {row['note']}." for row in case["rows"] if row["note"])]
    below += shares(case)
    below += [f"Left out: {name}: {reason}." for name, reason in case["left_out"].items() if reason != "needs CUDA"]
    if any(row["name"] != case["base"] for row in case["rows"]):
        below.append(f"x base: times the time of {case['base']}; over base: what it takes beyond that.")
    return [above, *below]


def shares(case: dict[str, Any]) -> list[str]:
    """Of a training step, what each contender adds to it: the paired ratio to the step without, less one."""
    if not case["name"].startswith("training_step/"):
        return []
    lines = []
    for row in case["rows"]:
        name, ratio = row["name"], {key: row["to_base"][key] for key in ("median", "q25", "q75")}
        if name in (case["base"], "floor"):
            continue
        if name == ALONE:
            lines.append(f"{name}, by itself, takes {digits(100 * ratio['median'])} % of the time of the step without.")
            continue
        median, low, high = (100 * (x - 1) for x in ratio.values())
        noise = ", not told apart from none" if low <= 0 <= high else ""
        lines.append(f"{name} adds {median:.2f} % to the step (quartiles {low:.2f} and {high:.2f} %{noise}).")
    return lines


def head(case: dict[str, Any]) -> list[str]:
    return [*HEAD, *(column for column in EXTRA if is_known(case, column))]


def as_text(results: Results) -> str:
    lines = heading(results)
    for case in results["cases"]:
        table = [head(case), *(cells(case, row) for row in case["rows"])]
        above, *below = case_lines(case)
        lines += ["", f"{case['title']}  [{case['name']}]: {above}"]
        lines += [f"  {line}" for line in (*aligned(table), *below)]
    lines += ["", *left_out_lines(results)] if results["left_out"] else []
    return "\n".join(lines)


def left_out_lines(results: Results) -> list[str]:
    return [f"NOT MEASURED {name}: {reason}" for name, reason in results["left_out"].items()]


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for first, *rest in table:
        lines.append("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]))
    return lines


def as_markdown(results: Results) -> str:
    lines = [f"# Benchmarks: {results['device']['name']}", ""]
    for line in heading(results):
        lines += [line, ""]
    for case in results["cases"]:
        above, *below = case_lines(case)
        names = head(case)
        lines += [f"## {case['title']}", "", f"`{case['name']}`: {above}.", ""]
        lines += ["| " + " | ".join(names) + " |", "|" + "|".join([" --- ", *[" ---: "] * (len(names) - 1)]) + "|"]
        lines += ["| " + " | ".join(cells(case, row)) + " |" for row in case["rows"]]
        lines += ["", " ".join(below), ""]
    lines += [f"{line}\n" for line in left_out_lines(results)]
    return "\n".join(lines)
