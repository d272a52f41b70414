"""All that runs logged as a data frame: a row a task."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from report_logs import write_run

from spectral_ops.continual.report.frame import check_file, to_dataframe, write_dataframe
from spectral_ops.continual.report.groups import group_runs
from spectral_ops.continual.report.runs import find_runs

pandas = pytest.importorskip("pandas")


@pytest.fixture
def groups(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.25], seed=4, model_options={"hidden": [8, 6]})
    write_run(tmp_path / "b", [0.75], seed=5, method="l2", strength=1e-3, tasks=2, finished=False,
              more={"sigma": {"other": None}, "penalty_ratio": 0.125})  # fmt: skip
    return group_runs(find_runs([tmp_path])[0])[0]


def test_a_row_is_a_task_with_its_settings(groups):
    frame = to_dataframe(groups)
    assert len(frame) == 3 and list(frame["accuracy"]) == [0.5, 0.25, 0.75] and list(frame["task"]) == [0, 1, 0]
    assert list(frame["seed"]) == [4, 4, 5] and list(frame["finished"]) == [True, True, False]
    assert list(frame["group"]) == ["none model.hidden=8,6"] * 2 + ["l2 0.001"]
    assert list(frame["folder"].map(lambda folder: Path(folder).name)) == ["a", "a", "b"]
    first, last = frame.iloc[0], frame.iloc[2]
    assert first["config.model.hidden"] == "8,6" and last["config.strength"] == 1e-3
    assert frame.iloc[1]["sigma.layers.0.incoming.weight"] == 2.0 and last["penalty_ratio"] == 0.125
    assert pandas.isna(last["sigma.layers.0.incoming.weight"]) and pandas.isna(last["sigma.other"])
    assert "kind" not in frame and "config.seed" not in frame


def test_csv_is_read_back_with_the_same_numbers(groups, tmp_path):
    write_dataframe(tmp_path / "new" / "all.csv", groups)
    frame, back = to_dataframe(groups), pandas.read_csv(tmp_path / "new" / "all.csv")
    assert list(back.columns) == list(frame.columns)
    assert list(back["accuracy"]) == list(frame["accuracy"]) and list(back["group"]) == list(frame["group"])


def test_parquet_is_read_back_with_the_same_numbers(groups, tmp_path):
    pytest.importorskip("pyarrow")
    write_dataframe(tmp_path / "all.parquet", groups)
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "all.parquet"), to_dataframe(groups))


def test_parquet_goes_to_pyarrow(groups, tmp_path, monkeypatch):
    """What is written where pyarrow is missing cannot be looked at; that it is asked for can."""
    asked = []
    monkeypatch.setitem(sys.modules, "pyarrow", sys)
    monkeypatch.setattr(pandas.DataFrame, "to_parquet", lambda frame, path, **options: asked.append((path, options)))
    write_dataframe(tmp_path / "all.parquet", groups)
    assert asked == [(tmp_path / "all.parquet", {"index": False, "engine": "pyarrow"})]


@pytest.mark.parametrize(("package", "file"), [("pandas", "a.csv"), ("pandas", "a.parquet"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch, package, file):
    for name in ("pandas", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    with pytest.raises(RuntimeError, match=rf"expected {package} to be importable for .*: pip install {package}"):
        check_file(Path(file))


def test_another_suffix_is_refused():
    with pytest.raises(ValueError, match=r"expected dataframe to end with .csv or .parquet, got 'a.json'. Change --"):
        check_file(Path("a.json"))
