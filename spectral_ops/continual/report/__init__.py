"""`spectral-ops report`: tables, pictures and data frames of runs, from their logs alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from spectral_ops.continual.choices import choose
from spectral_ops.continual.described import described
from spectral_ops.continual.optional import require
from spectral_ops.continual.report.figures import draw_all
from spectral_ops.continual.report.frame import check_file, write_dataframe
from spectral_ops.continual.report.groups import Group, group_runs
from spectral_ops.continual.report.runs import find_runs
from spectral_ops.continual.report.tables import difference_table, summary_table, write_differences, write_summary

_HEAD, _COMPARED = "# Report\n\n", "Difference to `"  # of report.md, by which a later report knows it
_LINK = re.compile(r"^!\[((?:curves|network|sensitivity)[^]/\\]*)\]\(\1\.png\)$", re.MULTILINE)


@dataclass(frozen=True)
@described()
class ReportConfig:
    """Tables and pictures of runs, finished or not, from their logs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or folders with runs below them."""
    out: Path = Path("runs") / "report"
    """Folder for report.md, the tables as CSV and the pictures; those that an earlier report.md there shows are
    replaced."""
    baseline: str | None = None
    """Label of the group that the others are compared with, seed by seed, as the first table has it; or the name of the
    folder that its seeds are in."""
    dataframe: Path | None = None
    """Also write every task of every run to this .csv or .parquet file."""


def main(config: ReportConfig) -> int:
    """Tables and pictures of runs, finished or not, from their logs."""
    try:
        for module in ("scipy.stats", "matplotlib"):
            require(module, "report")
        if config.dataframe is not None:
            check_file(config.dataframe)
        runs, problems = find_runs(config.runs)
        groups, doubled = group_runs(runs)
        problems += doubled
        for problem in problems:
            print(problem, file=sys.stderr)
        if not groups:
            raise ValueError("report: expected a run that can be read, got none. Name other folders.")
        baseline = None
        if config.baseline is not None:
            folders = {run.folder.parent.name: group for group in groups for run in group.runs}
            labels = {group.label: group for group in groups}
            baseline = folders.get(config.baseline) or choose("baseline", config.baseline, labels)
        text = write_report(groups, config.out, baseline)
        if config.dataframe is not None:
            write_dataframe(config.dataframe, groups)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    print(f"Written to {config.out}" + (f" and {config.dataframe}." if config.dataframe else "."))
    return 1 if problems else 0


def write_report(groups: Sequence[Group], out: Path, baseline: Group | None = None) -> str:
    """Everything into the folder: report.md, groups.csv, differences.csv, pictures. Returns the text of the tables.

    Raises:
        OSError: the folder cannot be made or written.
        RuntimeError: scipy or matplotlib is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    for path in _earlier(out):  # this report may have none of that name
        path.unlink(missing_ok=True)
    text = report_text(groups, baseline)
    write_summary(out / "groups.csv", groups)
    if baseline is not None:
        write_differences(out / "differences.csv", groups, baseline)
    pictures = draw_all(groups, out)
    links = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)  # as _LINK finds them
    (out / "report.md").write_text(f"{_HEAD}{text}\n{links}", encoding="utf-8")
    return text


def _earlier(out: Path) -> list[Path]:
    """What an earlier report wrote beside its report.md and this one may not: nothing that it does not show."""
    path = out / "report.md"
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith(_HEAD):
        return []
    tables = [out / "differences.csv"] if _COMPARED in text else []
    return tables + [out / f"{stem}.png" for stem in _LINK.findall(text)]


def report_text(groups: Sequence[Group], baseline: Group | None = None) -> str:
    """The tables with what must be known to read them."""
    seeds = sum(len(group.runs) for group in groups)
    parts = [
        f"{_counted(seeds, 'run')} in {_counted(len(groups), 'group')}. Accuracies are means over seeds, ± half the "
        "width of their 95 % t-interval, which takes two seeds with equally many tasks. They are of the training "
        "samples at the end of a task, online of every batch before the step on it.",
        summary_table(groups),
    ]
    if baseline is not None:
        parts += [
            f"{_COMPARED}{baseline.label}` on the same seeds and tasks, paired, with 95 % t-intervals. Each stands "
            "for itself: of many comparisons some exclude 0 by chance.",
            difference_table(groups, baseline),
        ]
        if others := [group.label for group in groups if group.stream != baseline.stream]:
            parts.append(f"Not compared, being of another stream: {', '.join(f'`{label}`' for label in others)}.")
    unfinished = [(group, run) for group in groups for run in group.runs if not run.finished]
    if unfinished:
        lines = [
            f"- `{group.label}`, seed {run.config['seed']}: {len(run.tasks)} of {run.config.get('tasks', '?')} tasks, "
            f"{run.folder}"
            for group, run in unfinished
        ]
        parts.append("\n".join(["Unfinished, counted as far as they are:", "", *lines]))
    return "\n\n".join(parts)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")
