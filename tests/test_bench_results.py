"""bench/: cases, the results file, tables, comparison, pictures and commands."""

# ruff: noqa: F811  (fixtures of bench_fixtures, by their names)
from __future__ import annotations

import copy
import functools
import json
import math
import operator
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_fixtures import ROOT, WITHOUT_FLOOR, _one_thread, needs_native, settings  # noqa: F401  fixtures, and bench/'s place
from matplotlib.colors import to_hex
from torch.autograd import DeviceType

from bench import __main__ as command  # noqa: E402
from bench import (  # noqa: E402
    baselines,
    bench_power_iteration,
    compare,
    plot,
    record,
    roofline,
    table,
)
from bench import case as case_module  # noqa: E402
from bench.case import DISAGREES, FLOOR, Case, Contender, Settings, check, measure  # noqa: E402
from bench.device import Device, count_launches  # noqa: E402

# ---- cases ----


@needs_native
def test_a_disagreeing_contender_is_not_timed(settings: Settings) -> None:
    w = torch.ones(4, 4)
    wrong = {"off": Contender(lambda: None, lambda: math.nan, 1e-5), "rough": Contender(lambda: None, lambda: 1.0, 0.1)}
    case = Case("op/model", "", settings.device, [w], [], wrong)
    with pytest.raises(AssertionError, match="op/model, off: expected an error of at most 1e-05 .* got nan"):
        measure(case, settings)
    case.contenders["rough"].approximate = True
    assert check(case, "rough") == 1.0
    assert check(case, FLOOR) is None


class Fails(Contender):
    def __init__(self, message: str, **how: bool):
        def error() -> float:
            raise RuntimeError(message)

        super().__init__(lambda: None, error, **how)


@needs_native
def test_what_a_device_refuses_is_left_out_and_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.ones(4, 4)
    good = Contender(lambda: None, lambda: 0.0)
    contenders = {
        "good": good,
        "refused": Fails("no capture\nand more", optional=True),
        "wrong": Contender(lambda: None, lambda: math.nan, 0.1, optional=True),
        "late": Contender(lambda: None, lambda: 0.0, compiles=True),
    }
    late = Settings(settings.device, quick=True, deadline=time.perf_counter() + 1)
    measured = measure(Case("op/model", "", settings.device, [w], [], contenders, left_out={"x": "needs CUDA"}), late)
    assert [row["name"] for row in measured["rows"]] == ["good", FLOOR]
    assert measured["left_out"] == {
        "x": "needs CUDA",
        "wrong": measured["left_out"]["wrong"],
        "refused": "not possible here: RuntimeError: no capture",
        "late": "the minutes of this run were nearly over",
    }
    assert measured["left_out"]["wrong"].startswith(f"{DISAGREES}: op/model, wrong: expected an error of at most 0.1")
    with pytest.raises(RuntimeError, match="no capture"):
        measure(Case("op/model", "", settings.device, [w], [], {"ours": Fails("no capture")}), settings)
    monkeypatch.setattr(Settings, "on_cuda", True)
    monkeypatch.setattr(case_module, "LONGEST_CALL_S", 0.0)
    slow = {"good": good, "slow": Contender(lambda: None, lambda: 0.0, optional=True)}
    measured = measure(Case("op/model", "", settings.device, [w], [], slow), settings)
    assert measured["left_out"]["slow"].startswith("one call took 0.00 s")
    full = Settings(settings.device, quick=True, full=True)
    assert not measure(Case("op/model", "", settings.device, [w], [], slow), full)["left_out"]


def test_launches_are_what_ran_on_the_device() -> None:
    kernel, region = (SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=x) for x in (False, True))
    on_host = SimpleNamespace(device_type=DeviceType.CPU, is_user_annotation=False)
    assert count_launches([kernel, on_host, region, kernel]) == 2
    device = Device("cpu", 1)
    assert device.launches(lambda: None) is device.host_seconds(lambda: None) is device.peak_bytes(lambda: None) is None


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results file of a quick run of one op."""
    if WITHOUT_FLOOR:
        pytest.skip("the floor of a CPU is csrc's, and it is not built")
    folder = tmp_path_factory.mktemp("results")
    assert command.main(["--quick", "--threads", "1", "--only", "power_iteration", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    return path


def test_results_file(stored: Path) -> None:
    results = record.read(stored)
    assert stored.name.startswith(results["device"]["slug"]) and stored.stem.endswith("-quick")
    assert results["device"]["name"].endswith(f", {torch.backends.cpu.get_cpu_capability()}")
    assert {case["name"] for case in results["cases"]} == {
        f"power_iteration/{m}/float32" for m in ("vit-s", "mlp", "resnet18")
    }
    case = results["cases"][1]
    rows = {row["name"]: row for row in case["rows"]}
    assert case["bytes"] == 4 * (784 * 256 + 256 * 256 + 256 * 10)
    assert rows[FLOOR]["to_floor"]["median"] == rows[case["base"]]["to_base"]["median"] == 1.0
    assert rows["usual"]["gb_per_s"] == pytest.approx(case["bytes"] / rows["usual"]["seconds"]["median"] / 1e9)
    assert results["device"]["threads"] == 1
    assert (case["dtype"], rows["usual"]["launches"], rows["usual"]["host_seconds"]) == ("float32", None, None)
    assert case["left_out"]["usual, graph"] == "needs CUDA"


def test_files_of_version_1_are_read(stored: Path, tmp_path: Path) -> None:
    old = record.read(stored)
    old["version"] = 1
    del old["left_out"]
    for case in old["cases"]:
        case["name"] = case["name"].removesuffix("/float32")
        del case["dtype"], case["left_out"]
        for row in case["rows"]:
            del row["launches"], row["host_seconds"]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    assert record.read(file)["cases"][0]["name"] == record.read(stored)["cases"][0]["name"]
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record.read(path)


def change(results: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one entry replaced, or left out where the value is ..."""
    results = copy.deepcopy(results)
    *outer, last = path
    at = functools.reduce(operator.getitem, outer, results)
    at[last] = value
    if value is ...:
        del at[last]
    return results


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 3, "to be a spectral_ops benchmark file of version 2"),
        (("commit",), ..., r"to hold commit \(str or NoneType\), got nothing"),
        (("device", "threads"), "2", r"device to hold threads \(int\), got '2'"),
        (("cases", 0, "rows", 0, "note"), ..., "to hold note"),
        (("cases", 0, "rows", 0, "seconds", "median"), math.nan, r"seconds to hold median \(float\), got nan"),
        (("cases", 0, "rows", 0, "error"), True, "to hold error"),
        (("cases", 0, "rows", 0, "launches"), 1.5, r"to hold launches \(int or NoneType\), got 1.5"),
        (("cases", 0, "rows", 0, "host_seconds"), math.inf, "to hold host_seconds"),
    ],
)
def test_results_are_checked(stored: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record.check(change(record.read(stored), path, value), "here")


def test_other_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match="pytest-benchmark's own JSON is another format"):
        record.read(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="read: expected .* to be JSON"):
        record.read(file)
    assert record.describe_commit(tmp_path) == (None, None)  # outside git


# ---- text, comparison, picture ----


def test_tables_show_every_row(stored: Path) -> None:
    assert [table.duration(x) for x in (2.5, 0.0123, 1.234e-4, 5e-9)] == ["2.50 s", "12.3 ms", "123 us", "0.005 us"]
    results = record.read(stored)
    for text in (table.as_text(results), table.as_markdown(results)):
        assert "QUICK RUN" in text
        for name in ("power_iteration", "usual", FLOOR):
            assert text.count(name) >= len(results["cases"])
    for load, busy in ((3.0, True), (0.1, False)):
        assert ("BUSY MACHINE" in table.as_text(change(results, ("load", "before"), load))) is busy


def with_launches(results: Any) -> Any:
    """As a CUDA run has it: the first row of the first case made one launch; the others' are not known."""
    made = change(results, ("cases", 0, "rows", 0, "launches"), 1)
    made = change(made, ("cases", 0, "rows", 0, "host_seconds"), 1.5e-5)
    return change(made, ("cases", 0, "rows", 0, "peak_bytes"), 2048)


def test_columns_of_a_cuda_run(stored: Path) -> None:
    results = record.read(stored)
    record.check(with_launches(results), "here")
    columns = ("launches", "host", "peak memory")
    assert not set(columns) & set(table.head(results["cases"][0]))
    case = with_launches(results)["cases"][0]
    assert tuple(table.head(case)[-3:]) == columns
    assert table.cells(case, case["rows"][0])[-3:] == ["1", "15.0 us", "2.0 kB"]
    assert table.cells(case, case["rows"][1])[-3:] == ["-", "-", "-"]
    shown = compare.as_text(results, with_launches(results)).splitlines()
    head = next(line for line in shown if "by the floor" in line)
    assert head.split("by the floor")[1].split() == ["A", "launches", "B", "launches", "A", "host", "B", "host"] + [
        "A", "peak", "B", "peak",
    ]
    assert "launches" not in compare.as_text(results, results)


def test_what_was_not_measured_is_said(stored: Path) -> None:
    results = change(record.read(stored), ("left_out",), {"op/vit-g": "no minutes"})
    results = change(results, ("cases", 0, "left_out"), {"usual, graph": "needs CUDA", "usual, compiled": "too slow"})
    for text in (table.as_text(results), table.as_markdown(results)):
        assert "NOT MEASURED op/vit-g: no minutes" in text
        assert "Left out: usual, compiled: too slow." in text
        assert "usual, graph" not in text


def test_the_share_of_a_training_step(stored: Path) -> None:
    case = record.read(stored)["cases"][0]
    assert table.shares(case) == []
    case["name"] = "training_step/vit-b/float32"
    row = case["rows"][1]
    row["to_base"] |= {"median": 1.031, "q25": 1.02, "q75": 1.05}
    assert table.shares(case)[0] == (
        f"{row['name']} adds 3.10 % to the step (quartiles 2.00 and 5.00 %)."
    )
    row["to_base"]["q25"] = 0.99
    assert "(quartiles -1.00 and 5.00 %, not told apart from none)" in table.shares(case)[0]
    row["name"], row["to_base"]["median"] = table.ALONE, 0.0123
    assert table.shares(case)[0] == "accumulate_grad_ alone, by itself, takes 1.23 % of the time of the step without."


def slower(results: Any, factor: float) -> Any:
    """The same results with the first row's times and ratios multiplied, without any spread."""
    results = copy.deepcopy(results)
    row = results["cases"][0]["rows"][0]
    for key in ("seconds", "to_floor"):
        row[key] = dict.fromkeys(row[key], factor * row[key]["median"])
    return results


def test_compare(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = slower(record.read(stored), 1.0)
    spread = {"median": 1.0, "q25": 0.9, "q75": 1.3}
    assert not compare.beyond_noise(spread, {"median": 1.2, "q25": 1.1, "q75": 1.4})  # the quartiles overlap
    assert compare.beyond_noise(spread, {"median": 1.5, "q25": 1.4, "q75": 1.6})
    verdicts = {factor: compare.differences(a, slower(a, factor))[0]["verdict"] for factor in (1.0, 1.04, 1.5, 0.5)}
    assert verdicts == {1.0: "same", 1.04: "same", 1.5: "slower", 0.5: "faster"}
    b = change(change(slower(a, 1.5), ("device", "threads"), 2), ("cases", 2), ...)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, results in zip(paths, (a, b), strict=True):
        record.write(results, path)
    assert command.main(["compare", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "slower" in shown and "1.50" in shown
    assert "device threads differs: 1 and 2" in shown
    assert "only in the first: power_iteration/resnet18/float32" in shown


def test_picture_from_the_file_alone(stored: Path, tmp_path: Path) -> None:
    """Every contender's name and the floor's line are in each panel."""
    picture = tmp_path / "picture.png"
    assert command.main(["plot", str(stored), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = record.read(stored)
    axes = plot.Figure().subplots()
    plot.panel(axes, results["cases"][0], 4)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["power_iteration", "usual", "usual, stacked"]
    assert axes.get_xscale() == "log"
    floor = next(row for row in results["cases"][0]["rows"] if row["name"] == FLOOR)
    assert axes.get_lines()[-1].get_xdata()[0] == floor["seconds"]["median"]


def test_a_picture_tells_ours_from_others_and_leaves_out_a_floor_that_is_far_below() -> None:
    """A step of training is compared with the one without a penalty, which is nothing of ours."""
    times = {"without the penalty": 0.0368, "attach": 0.0371, "usual": 0.062, FLOOR: 2.7e-5}
    seconds = {name: {"median": x, "q25": x, "q75": x} for name, x in times.items()}
    rows = [{"name": name, "seconds": x, "to_floor": {"median": 1e3}} for name, x in seconds.items()]
    axes = plot.Figure().subplots()
    plot.panel(axes, {"title": "a step", "bytes": 10, "base": "without the penalty", "rows": rows}, 4)
    colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colours == [plot.OTHER, plot.OWN, plot.OTHER]
    assert axes.get_xlim()[0] == 0 and axes.get_xscale() == "linear"
    assert not any("x" in text.get_text() for text in axes.texts)


def test_roofline_from_the_file_alone(stored: Path, tmp_path: Path) -> None:
    """Every contender is a line of its own over all models; the floor, the copy's rate and the models are named."""
    picture = tmp_path / "roofline.png"
    assert command.main(["roofline", str(stored), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = record.read(stored)
    (cases,) = roofline.grouped(results).values()
    assert [case["bytes"] for case in cases] == sorted(case["bytes"] for case in results["cases"])
    styles = roofline.styles_of(cases)
    axes = plot.Figure().subplots()
    roofline.panel(axes, cases, styles, 40.0)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"power_iteration", "usual", "usual, stacked", FLOOR} <= set(lines)
    x, y = lines["usual"].get_data()
    rows = [row for case in cases for row in case["rows"] if row["name"] == "usual"]
    assert [*x] == [case["bytes"] for case in cases] and [*y] == [row["gb_per_s"] for row in rows]
    assert any([*line.get_ydata()] == [40.0, 40.0] for line in axes.get_lines())
    named = ", ".join(text.get_text().strip() for text in axes.texts)
    assert sorted(named.split(", ")) == ["mlp", "resnet18", "vit-s"]
    other = change(results, ("cases",), [case | {"name": "spectral_norm/vit-s-init/float32"} for case in cases])
    with pytest.raises(ValueError, match="draw: expected results of accumulate_grad, .* got cases of other ops alone"):
        roofline.draw(other, picture)


def test_roofline_tells_every_contender_apart() -> None:
    """Ours thick, graphs dashed; no two contenders of a panel look alike."""
    names = ["reg()", "reg(), graph", *baselines.PENALTIES]
    rows = [{"name": name} for name in ("accumulate_grad_", "accumulate_grad_, graph", *names, FLOOR)]
    loss = {"base": "reg()", "rows": [{"name": "reg()"}]}
    styles = roofline.styles_of([{"base": "accumulate_grad_", "rows": rows}, loss])
    assert set(styles) == {row["name"] for row in rows} - {FLOOR}
    looks = {(s["color"], s["marker"], s.get("linestyle"), s["linewidth"]) for s in styles.values()}
    assert len(looks) == len(styles)
    assert {name for name, s in styles.items() if s.get("linestyle") == "--"} == {n for n in styles if ", graph" in n}
    assert {name for name, s in styles.items() if s["linewidth"] > 2} == {
        "accumulate_grad_", "accumulate_grad_, graph", "reg()", "reg(), graph",
    }


def test_roofline_keeps_names_apart() -> None:
    """Models next to each other share a line of text instead of writing over each other."""
    axes = plot.Figure().subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1e6, 1e9)
    axes.set_ylim(1, 10)
    roofline.name_models(axes, [(2e6, "a"), (2.1e6, "b"), (1e8, "c")])
    assert [text.get_text().strip() for text in axes.texts] == ["a, b", "c"]


# ---- commands ----


@needs_native
def test_a_wrong_baseline_is_left_out_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.problem.TOLERANCE", 0.0)  # of the usual code; ours keeps its own
    monkeypatch.setattr("bench.problem.VARIANTS", {"usual, stacked": baselines.Variant(stacked=True)})
    options = ["--quick", "--threads", "1", "--only", "power_iteration", "--models", "mlp", "--out", str(tmp_path)]
    assert command.main(options) == 1
    (path,) = tmp_path.glob("*.json")
    (case,) = record.read(path)["cases"]
    assert case["left_out"]["usual, stacked"].startswith(DISAGREES)
    assert [row["name"] for row in case["rows"]] == ["power_iteration", FLOOR]


def test_a_failing_case_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(settings: Settings) -> Any:
        def broken() -> Case:
            raise RuntimeError("no memory")

        yield "broken", broken
        yield "late", broken

    monkeypatch.setattr(bench_power_iteration, "cases", cases)
    monkeypatch.setattr(Settings, "remaining_s", property(lambda self: next(left)))
    left = iter([1.0, 0.0])
    arguments = ["--quick", "--only", "power_iteration", "--minutes", "5", "--out", str(tmp_path), "--roofline"]
    assert command.main(arguments) == 1
    (path,) = tmp_path.glob("*.json")
    assert record.read(path)["left_out"] == {
        "power_iteration/broken": "RuntimeError: no memory",
        "power_iteration/late": "the 5 minutes of this run were over; --minutes gives more, --only chooses",
    }
    assert "no picture: draw: expected results of" in capsys.readouterr().err


def test_a_run_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "Device: expected a CUDA device, got none that torch can use. Use --device cpu." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--only", "training_step", "--models", "mlp"])
    assert "expected --only, --models and --dtypes to leave a case, got none" in capsys.readouterr().err
