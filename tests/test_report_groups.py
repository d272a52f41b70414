"""The report: which runs belong together, and under which label."""

# ruff: noqa: F811  (fixtures of report_logs, by their names)
from __future__ import annotations

import re
from pathlib import Path

from report_logs import NONE, SPECTRAL, cells, groups_of, logs, write_run  # noqa: F401

from spectral_ops.continual.ablate import INITIAL, InitialTarget
from spectral_ops.continual.report.groups import flat_settings, group_runs
from spectral_ops.continual.report.runs import find_runs
from spectral_ops.continual.report.tables import summary_table


def test_runs_that_differ_only_in_their_seed_are_a_group(logs):
    groups = groups_of(logs)
    assert list(groups) == ["none", "spectral 0.001"]
    assert [run.config["seed"] for run in groups["none"].runs] == [0, 1, 2]
    assert "seed" not in groups["none"].settings and groups["spectral 0.001"].settings["strength"] == 1e-3


def test_where_data_lie_and_how_often_is_saved_makes_no_group(tmp_path):
    write_run(tmp_path / "a", [0.5], seed=0, data_root=Path("/x"), checkpoint_seconds=5.0)
    write_run(tmp_path / "b", [0.5], seed=1)
    assert len(groups_of(tmp_path)["none"].runs) == 2


def test_labels_say_what_differs_and_nothing_else(tmp_path):
    configs = [
        {"method": "l2", "strength": 1e-3, "lr": 1e-3},
        {"method": "l2", "strength": 1e-2, "lr": 1e-3},
        {"method": "l2", "strength": 1e-3, "lr": 1e-2},
        {"method": "redo", "options": {"period": 100}, "lr": 1e-3},
        {"method": "none", "lr": 1e-3, "model_options": {"hidden": [8, 8], "norm": "layer"}},
        {"method": "none", "lr": 1e-3, "stream_options": {"share": 0.5}, "batch": 32},
    ]
    for number, config in enumerate(configs):
        write_run(tmp_path / str(number), [0.5], **config)
    assert list(groups_of(tmp_path)) == [
        "none lr=0.001 batch=16 model.hidden=8,8 model.norm=layer",
        "none lr=0.001 batch=32 stream.share=0.5",
        "l2 0.001 lr=0.001 batch=16",
        "l2 0.001 lr=0.01 batch=16",
        "l2 0.01 lr=0.001 batch=16",
        "redo lr=0.001 batch=16 period=100",
    ]


def test_classes_are_called_by_their_names_alone_where_that_tells_them_apart(tmp_path):
    methods = [INITIAL, "my.module:Decay", "none"]
    for method in methods:
        write_run(tmp_path / method.replace(":", "-"), [0.5], method=method, strength=1e-3)
    assert list(groups_of(tmp_path)) == ["none", "Decay", "target-initial"]
    assert INITIAL.rpartition(":")[2] == InitialTarget.__name__
    write_run(tmp_path / "other", [0.5], method="other:Decay", strength=1e-2)
    labels = ["none 0.001", "my.module:Decay 0.001", "other:Decay 0.01", "target-initial 0.001"]
    assert list(groups_of(tmp_path)) == labels


def test_strengths_that_six_digits_do_not_tell_apart_have_labels_of_their_own(tmp_path):
    for strength in (0.1, 0.10000001):
        write_run(tmp_path / str(strength), [0.5], method="l2", strength=strength)
    assert list(groups_of(tmp_path)) == ["l2 0.1", "l2 0.10000001"]


def test_a_number_written_in_two_ways_is_one_configuration(tmp_path):
    for seed, (target, hidden) in enumerate([(2, 100), (2.0, [100]), (2, [100])]):
        options = {"options": {"target": target}, "model_options": {"hidden": hidden}}
        write_run(tmp_path / str(seed), [0.5], seed=seed, method="spectral", strength=1, **options)
    (group,) = groups_of(tmp_path).values()
    assert [run.config["seed"] for run in group.runs] == [0, 1, 2]


def test_groups_that_look_the_same_have_labels_of_their_own(tmp_path):
    for number, (period, accuracy) in enumerate([("2", 0.5), (2, 0.9)]):
        write_run(tmp_path / str(number), [accuracy], method="redo", options={"period": period})
    groups = list(groups_of(tmp_path).values())
    assert [group.label for group in groups] == ["redo #1", "redo #2"]
    assert [row["last task"] for row in cells(summary_table(groups))] == ["0.500", "0.900"]


def test_a_single_group_is_called_after_its_method(tmp_path):
    write_run(tmp_path / "a", [0.5], method="spectral", strength=1e-3)
    assert list(groups_of(tmp_path)) == ["spectral"]


def test_an_option_called_as_a_setting_does_not_replace_it():
    config = {"method": "x", "strength": None, "lr": 0.1, "options": {"lr": 0.5, "strength": 2.0}}
    assert flat_settings(config) == {"method": "x", "strength": 2.0, "lr": 0.1, "options.lr": 0.5}


def test_the_same_seed_twice_is_named_and_counted_once(logs):
    write_run(logs / "again", [0.9] * 5, seed=1)
    groups, problems = group_runs(find_runs([logs])[0])
    assert [len(group.runs) for group in groups] == [3, 3] and len(problems) == 1
    assert re.search(r"one run of a configuration and seed, got .*again and .*none-1\. The second", problems[0])
