"""The report: what runs came to, and how they differ on the same seeds; tests/test_report_groups.py has the groups."""

# ruff: noqa: F811  (fixtures of report_logs, by their names)
from __future__ import annotations

import csv
import math
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from report_logs import NONE, SPECTRAL, cells, groups_of, logs, write_run  # noqa: F401
from scipy import stats

from spectral_ops.continual.report import ReportConfig, main, report_text
from spectral_ops.continual.report.runs import find_runs
from spectral_ops.continual.report.tables import (
    difference_table,
    estimate,
    group_measures,
    markdown,
    paired_differences,
    run_measures,
    summary_table,
)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- runs ----


def test_runs_are_found_once_in_folders_and_below_them(logs):
    runs, problems = find_runs([logs / "none-0", logs, logs / "none-0" / ".." / "none-0"])
    assert len(runs) == 6 and not problems


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected .*gone to be a folder, got none\. Name folders of runs"):
        find_runs([tmp_path / "gone"])
    with pytest.raises(ValueError, match=r"expected a run in .* or below it, got no log\.jsonl"):
        find_runs([tmp_path])
    with pytest.raises(ValueError, match="expected at least one folder, got none"):
        find_runs([])


HEADER = '{"kind": "header", "config": {"method": "none", "seed": 0}}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "read_run: expected .*bad.log.jsonl to begin with a header"),
        (HEADER + "x\n" + HEADER, "read_run: expected line 2 of .*bad.log.jsonl to be JSON"),
        ('{"kind": "header"}\n', "header of .*bad.log.jsonl to hold the configuration of a run, got None"),
        (
            '{"kind": "header", "config": {"seed": 1}}\n',
            "bad.log.jsonl to hold the configuration of a run, got {'seed'",
        ),
        (HEADER + '{"kind": "task", "task": 0}\n', "expected task 0 of .*bad.log.jsonl with its accuracy"),
        (
            HEADER + '{"kind": "task", "task": 1, "accuracy": 0.5}\n',
            "expected task 0 of .* got {'kind': 'task', 'task'",
        ),
        (HEADER + '{"task": 1}\n', "bad.log.jsonl to hold the records of a run, got KeyError"),
        (HEADER + "3\n", "bad.log.jsonl to hold the records of a run, got TypeError"),
        ("[1]\n", "bad.log.jsonl to hold the records of a run, got AttributeError"),
    ],
)
def test_a_damaged_log_is_named_and_the_rest_is_reported(logs, capsys, text, message):
    (logs / "bad").mkdir()
    (logs / "bad" / "log.jsonl").write_text(text)
    assert main(ReportConfig((logs,), logs / "out")) == 1
    shown = capsys.readouterr()
    assert re.search(message, shown.err) and "6 runs in 2 groups" in shown.out
    assert (logs / "out" / "report.md").exists()


# ---- measures and intervals ----


def test_what_a_run_came_to():
    tasks = [
        {"accuracy": a, "online_accuracy": o, "held_out_accuracy": h, "step_seconds": s, "method_seconds": m}
        for a, o, h, s, m in zip(
            [0.9, 0.8, 0.7, 0.6, 0.2],
            [0.5, 0.5, 0.4, 0.4, 0.2],
            [0.3, 0.3, 0.3, 0.3, 0.8],
            [1.0, 2.0, 3.0, 2.0, 9.0],
            [0.5, 0.5, 0.5, 0.2, 0.0],
            strict=True,
        )
    ]
    found = run_measures(tasks)
    assert found == pytest.approx(
        {
            "final_accuracy": 0.2,
            "mean_accuracy": 0.64,
            "last_quarter_accuracy": 0.4,  # the last two of five
            "online_accuracy": 0.4,
            "final_held_out_accuracy": 0.8,
            "mean_held_out_accuracy": 0.4,
            "step_seconds": 2.0,
            "method_share": 0.1,
        }
    )
    bare = run_measures([{"accuracy": 0.5}])
    assert [name for name, value in bare.items() if value is not None] == [
        "final_accuracy",
        "mean_accuracy",
        "last_quarter_accuracy",
    ]


def test_an_interval_takes_two_seeds_and_is_students():
    assert estimate([0.3]) == (0.3, None, 1)
    values = [0.1, 0.5, 0.3, 0.7]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half, n = estimate(values)
    assert (mean - half, mean + half, n) == pytest.approx((low, high, 4), rel=1e-12)
    assert estimate([0.0, 1.0]).half == pytest.approx(12.7062 / 2, rel=1e-5)  # t_1(0.975) sqrt(1/2) / sqrt(2)


def test_groups_are_means_over_seeds(logs):
    found = group_measures(groups_of(logs)["none"])
    assert found["final_accuracy"].mean == pytest.approx((0.1 + 0.2 + 0.5) / 3)
    assert found["mean_accuracy"].mean == pytest.approx((0.3 + 0.4 + 0.5) / 3)
    assert found["mean_accuracy"].half == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)  # t_2(0.975)
    assert "mean_held_out_accuracy" not in found


def test_differences_are_paired(logs):
    groups = groups_of(logs)
    found = {d.measure: d for d in paired_differences(groups["spectral 0.001"], groups["none"])}
    assert list(found) == ["final_accuracy", "mean_accuracy", "last_quarter_accuracy", "online_accuracy"]
    for name, take in (("final_accuracy", lambda a: a[-1]), ("mean_accuracy", statistics.fmean)):
        ours, base = [take(SPECTRAL[s]) for s in SPECTRAL], [take(NONE[s]) for s in NONE]
        test = stats.ttest_rel(ours, base)
        interval = test.confidence_interval(0.95)
        mean, half, n = found[name].estimate
        assert n == 3 and mean == pytest.approx(np.subtract(ours, base).mean())
        assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found["final_accuracy"].seeds == [0, 1, 2] and found["final_accuracy"].tasks == 5
    # 0.7 - 0.1, 0.8 - 0.2, 0.4 - 0.5
    assert found["final_accuracy"].estimate.mean == pytest.approx((0.6 + 0.6 - 0.1) / 3)


def test_pairs_are_of_common_seeds_and_common_tasks(tmp_path):
    write_run(tmp_path / "n0", [0.5, 0.5, 0.5, 0.5], seed=0)
    write_run(tmp_path / "n1", [0.4, 0.4], seed=1, tasks=4, finished=False)
    write_run(tmp_path / "n2", [0.9] * 4, seed=2)
    write_run(tmp_path / "n3", [], seed=3, tasks=4, finished=False)
    for seed, accuracies in ((0, [0.6, 0.7, 0.8]), (1, [0.5, 0.7, 0.1, 0.1]), (3, [0.1] * 4), (9, [0.1] * 4)):
        write_run(tmp_path / f"l{seed}", accuracies, seed=seed, method="l2", finished=len(accuracies) == 4, tasks=4)
    groups = groups_of(tmp_path)
    found = {d.measure: d for d in paired_differences(groups["l2"], groups["none"])}
    assert found["final_accuracy"].seeds == [0, 1] and found["final_accuracy"].tasks == 2
    assert found["final_accuracy"].estimate.mean == pytest.approx((0.2 + 0.3) / 2)  # after 2 tasks, which all have
    assert found["mean_accuracy"].estimate.mean == pytest.approx((0.15 + 0.2) / 2)
    (row,) = cells(difference_table(list(groups.values()), groups["none"]))
    assert (row["group"], row["seeds"], row["tasks"]) == ("l2", "2", "2")
    assert row["last task"] == "+0.250 [-0.385, +0.885]"


def test_held_out_accuracies_of_other_samples_are_not_paired(tmp_path):
    for name, count in (("a", 100), ("b", 100), ("c", 0)):
        write_run(tmp_path / name, [0.5], more={"held_out_accuracy": 0.4}, method=name, held_out_samples=count)
    groups = {group.settings["method"]: group for group in groups_of(tmp_path).values()}
    same, other = (paired_differences(groups[name], groups["a"]) for name in "bc")
    left_out = {d.measure for d in same} - {d.measure for d in other}
    assert left_out == {"final_held_out_accuracy", "mean_held_out_accuracy"}


def test_seeds_that_are_not_equally_far_have_a_mean_and_no_interval(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.7], seed=0)
    write_run(tmp_path / "b", [0.1], seed=1, tasks=2, finished=False)
    (group,) = groups_of(tmp_path).values()
    assert group_measures(group)["mean_accuracy"] == (pytest.approx(0.35), None, 2)
    assert cells(summary_table([group]))[0]["tasks"] == "1-2 of 2"


def test_groups_of_another_stream_are_not_compared(logs):
    write_run(logs / "other", [0.9] * 5, seed=0, data="digits")
    groups = groups_of(logs)
    baseline, other = groups["none data=mnist"], groups["none data=digits"]
    with pytest.raises(ValueError, match="expected groups of one stream to be compared by seed, got .*digits"):
        paired_differences(other, baseline)
    (row, _) = cells(difference_table(list(groups.values()), baseline))
    assert row == {**dict.fromkeys(row, "-"), "group": other.label, "seeds": "0"}
    text = report_text([*groups.values()], baseline)
    assert "Not compared, being of another stream: `none data=digits`." in text


def test_without_a_common_seed_there_is_no_difference(tmp_path):
    write_run(tmp_path / "a", [0.5], seed=0)
    write_run(tmp_path / "b", [0.5], seed=1, method="l2")
    groups = groups_of(tmp_path)
    assert paired_differences(groups["l2"], groups["none"]) == []
    (row,) = cells(difference_table(list(groups.values()), groups["none"]))
    assert row == {"group": "l2", "seeds": "0", "tasks": "-"}


# ---- tables ----


def test_summary_table(logs):
    held_out = {"held_out_accuracy": 0.5}
    write_run(logs / "l2", [0.25, 0.75], seed=7, method="l2", tasks=9, finished=False, more=held_out)
    write_run(logs / "none-5", [], seed=5, tasks=5, finished=False)
    none, l2, spectral = cells(summary_table(list(groups_of(logs).values())))
    assert none["group"] == "none tasks=5" and none["seeds"] == "3" and none["tasks"] == "5 of 5"  # one is to begin
    assert none["last task"] == "0.267 ± 0.517" and none["mean"] == "0.400 ± 0.248"
    assert none["online"] == "0.200 ± 0.124" and none["last quarter"] == "0.300 ± 0.448"
    assert none["held-out, mean"] == "-" and none["step (us)"] == "200" and none["of it the method (%)"] == "25"
    # One seed: no interval anywhere.
    assert l2["last task"] == "0.750" and l2["held-out, mean"] == "0.500" and l2["tasks"] == "2 of 9"
    assert spectral["group"] == "spectral 0.001 tasks=5" and spectral["tasks"] == "5"


def test_difference_table(logs):
    groups = groups_of(logs)
    (row,) = cells(difference_table(list(groups.values()), groups["none"]))
    # Last task: 0.6, 0.6, -0.1: mean 0.367, s 0.4041, t_2 4.3027.
    assert row["last task"] == "+0.367 [-0.637, +1.371]" and row["seeds"] == "3" and row["tasks"] == "5"
    one = groups["spectral 0.001"]._replace(runs=groups["spectral 0.001"].runs[:1])
    assert cells(difference_table([one], groups["none"]))[0]["last task"] == "+0.600"


def test_markdown_is_aligned_and_a_bar_in_a_label_is_no_column():
    assert markdown([["a|b", "x"], ["c", "1.5"]]) == "| a\\|b |   x |\n| ---- | --: |\n| c    | 1.5 |"


def test_a_group_that_has_only_begun_has_no_figures(tmp_path):
    write_run(tmp_path / "a", [], finished=False, tasks=7)
    groups = list(groups_of(tmp_path).values())
    assert cells(summary_table(groups)) == [{"group": "none", "seeds": "0", "tasks": "0 of 7"}]
    assert main(ReportConfig((tmp_path,), tmp_path / "out")) == 0
    (row,) = rows_of(tmp_path / "out" / "groups.csv")
    assert row["seeds"] == row["final_accuracy"] == "" and row["tasks_most"] == "0"
    assert not list((tmp_path / "out").glob("*.png"))


# ---- the command ----


def test_a_report_end_to_end(logs, tmp_path, capsys):
    write_run(logs / "more" / "late", [0.5, 0.25], seed=3, tasks=5, finished=False)
    out = tmp_path / "out"
    assert main(ReportConfig((logs,), out, baseline="none", dataframe=tmp_path / "all" / "runs.csv")) == 0
    shown, text = capsys.readouterr().out, (out / "report.md").read_text()
    tables = text.split("\n\n", 1)[1].rsplit("\n![", 2)[0].strip()
    assert tables in shown and "7 runs in 2 groups" in tables
    assert re.search(r"- `none`, seed 3: 2 of 5 tasks, .*more/late", tables)
    assert "Difference to `none` on the same seeds and tasks, paired" in tables
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert sorted(pictures) == ["curves.png", "network.png"] and all((out / name).exists() for name in pictures)

    none, spectral = rows_of(out / "groups.csv")
    assert none["seeds"] == "0 1 2 3" and (none["tasks_fewest"], none["tasks_most"]) == ("2", "5")
    assert float(none["final_accuracy"]) == pytest.approx((0.1 + 0.2 + 0.5 + 0.25) / 4, rel=1e-15)
    assert spectral["mean_held_out_accuracy"] == spectral["mean_held_out_accuracy_half_width"] == ""
    first = rows_of(out / "differences.csv")[0]
    interval = stats.ttest_rel([a[-1] for a in SPECTRAL.values()], [a[-1] for a in NONE.values()]).confidence_interval()
    assert (first["group"], first["baseline"], first["measure"]) == ("spectral 0.001", "none", "final_accuracy")
    assert first["seeds"] == "0 1 2" and float(first["mean"]) == pytest.approx(1.1 / 3)
    assert (float(first["low"]), float(first["high"])) == pytest.approx((interval.low, interval.high))
    assert len(rows_of(tmp_path / "all" / "runs.csv")) == 6 * 5 + 2


def test_the_baseline_may_be_named_by_its_folder(tmp_path, capsys):
    """As the commands of many runs name theirs, whose folders are not labels."""
    for folder, method in (("weights+biases", "spectral"), ("complete", "l2")):
        for seed in (0, 1):
            write_run(tmp_path / folder / f"seed-{seed}", [0.5, 0.4], seed=seed, method=method)
    assert main(ReportConfig((tmp_path,), tmp_path / "out", baseline="weights+biases")) == 0
    assert "Difference to `spectral` on the same seeds" in capsys.readouterr().out


def test_without_a_baseline_nothing_is_compared(logs):
    assert main(ReportConfig((logs,), logs / "out", baseline="none")) == 0
    assert (logs / "out" / "differences.csv").exists()
    with (logs / "out" / "report.md").open("a") as file:
        file.write("\n![curves-l2](curves-l2.png)\n")
    (logs / "out" / "curves-l2.png").write_text("of the earlier report, as its text says")
    assert main(ReportConfig((logs / "none-0",), logs / "out")) == 0
    assert sorted(path.name for path in (logs / "out").iterdir()) == [
        "curves.png", "groups.csv", "network.png", "report.md"
    ]  # fmt: skip
    assert "Difference" not in (logs / "out" / "report.md").read_text()


def test_what_is_not_of_an_earlier_report_is_kept(logs, tmp_path):
    own = ["curves-final.png", "network2.png", "sensitivity.txt", "differences.csv"]
    out = tmp_path / "fig"
    out.mkdir()
    for name in own:
        (out / name).write_text("mine")
    (tmp_path / "curves.png").write_text("mine")
    (out / "report.md").write_text("Mine: Difference to `none`.\n![curves-final](curves-final.png)\n")  # no report
    for _ in range(2):
        assert main(ReportConfig((logs / "none-0",), out)) == 0
        assert {(out / name).read_text() for name in own} == {"mine"}
        with (out / "report.md").open("a") as file:
            file.write("![curves](../curves.png)\n![curves/../../curves](curves/../../curves.png)\n")
    assert (tmp_path / "curves.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "nome"}, "baseline: expected one of none, spectral 0.001, got 'nome'. The nearest is 'none'"),
        ({"dataframe": Path("x.xlsx")}, r"dataframe to end with .csv or .parquet, got 'x.xlsx'. Change --dataframe"),
        ({"runs": ()}, "expected at least one folder, got none"),
        ({"out": Path("/dev/null/x")}, "Not a directory"),
    ],
)
def test_what_cannot_be_done_is_said(logs, capsys, options, message):
    given = {"runs": (logs,), "out": logs / "out"} | options
    assert main(ReportConfig(**given)) == 2
    assert re.search(message, capsys.readouterr().err) and not (logs / "out").exists()


def test_only_damaged_logs_are_no_report(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("")
    assert main(ReportConfig((tmp_path,), tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "to begin with a header" in error and "expected a run that can be read, got none" in error


@pytest.mark.parametrize("module", ["scipy.stats", "matplotlib"])
def test_a_missing_package_is_said_before_anything_is_read(tmp_path, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(ReportConfig((tmp_path / "gone",))) == 2
    assert f"report: expected {module} to be importable" in capsys.readouterr().err


def test_options_are_typed_flags():
    config = tyro.cli(ReportConfig, args=["a", "b/c", "--out", "d", "--baseline", "none", "--dataframe", "e.csv"])
    assert config == ReportConfig((Path("a"), Path("b/c")), Path("d"), "none", Path("e.csv"))
    assert tyro.cli(ReportConfig, args=["a"]) == ReportConfig((Path("a"),), Path("runs/report"))
