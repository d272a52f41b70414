"""Many seeds at once: all go on after a stop or a crash with the same bits, and what cannot be is refused."""

import json
import os
from dataclasses import replace

import pytest
from ensemble_samples import (
    ADAM,
    FOLDED,
    MODELS,
    SGD,
    SMALL,
    TOLERANCE,
    distance,
    folders,
    same_bits,
    stop_at,
    weights,
    with_seeds,
    without_times,
)

from spectral_ops.continual import checkpoint, steps
from spectral_ops.continual.checkpoint import CURRENT, load_checkpoint
from spectral_ops.continual.ensemble import run_together
from spectral_ops.continual.journal import Journal
from spectral_ops.continual.run_folder import read_run
from spectral_ops.continual.trainer import Stopped, run


@pytest.fixture
def every_step(monkeypatch):
    """A checkpoint, and a look at `stop`, at every step."""
    monkeypatch.setattr(steps, "_PATIENCE", -1.0)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("spectral", ADAM), ("spectral", FOLDED), ("shrink-and-perturb", ADAM), ("l2-init", SGD)],
    ids=["spectral", "folded", "shrink-and-perturb", "l2-init"],
)
def test_all_go_on_with_the_same_bits(tmp_path, every_step, method, optimizer):
    configs = with_seeds(replace(SMALL, **{"method": method} | optimizer))
    whole = run_together(configs, folders(tmp_path / "whole", configs))
    parts = folders(tmp_path / "parts", configs)
    for point in ((0, 4), (1, 1), (1, 7)):
        with pytest.raises(Stopped):
            run_together(configs, parts, resume=True, **stop_at(point))
    resumed = run_together(configs, parts, resume=True)
    for a, b, path, other in zip(whole, resumed, folders(tmp_path / "whole", configs), parts, strict=True):
        assert without_times(a) == without_times(b) == without_times(read_run(other).tasks)
        assert same_bits(weights(path), weights(other))


def test_a_stop_between_two_tasks(tmp_path):
    configs = with_seeds(SMALL)
    paths = folders(tmp_path, configs)
    with pytest.raises(Stopped):
        run_together(configs, paths, **stop_at((1, 0)))
    assert [len(read_run(path).tasks) for path in paths] == [1, 1]
    assert without_times(run_together(configs, paths, resume=True)[0]) == without_times(run_together(configs)[0])


@pytest.mark.parametrize("save", [1, 2, 4, 7])  # before the first step, in a task, at its end, at the end of all
def test_all_go_on_after_a_crash_between_two_folders(tmp_path, every_step, monkeypatch, save):
    configs = with_seeds(replace(SMALL, steps=3), (3, 0, 7))
    whole = run_together(configs, folders(tmp_path / "whole", configs))
    parts, saves, original = folders(tmp_path / "parts", configs), [], Journal.save

    def save_or_crash(journal, content):
        saves.append(journal.folder)
        if saves.count(parts[1]) == save:
            raise KeyboardInterrupt
        original(journal, content)

    monkeypatch.setattr(Journal, "save", save_or_crash)
    with pytest.raises(KeyboardInterrupt):
        run_together(configs, parts)
    assert len(saves) == 3 * save - 1
    saves, save = [], 1  # and once more, at once
    with pytest.raises(KeyboardInterrupt):
        run_together(configs, parts, resume=True)
    monkeypatch.setattr(Journal, "save", original)
    resumed = run_together(configs, parts, resume=True)
    for a, b, path, other in zip(whole, resumed, folders(tmp_path / "whole", configs), parts, strict=True):
        assert without_times(a) == without_times(b) == without_times(read_run(other).tasks)
        assert same_bits(weights(path), weights(other)) and read_run(other).finished


@pytest.mark.parametrize("place", [0, 2])
def test_all_go_on_after_a_damaged_checkpoint_and_a_crash(tmp_path, every_step, monkeypatch, place):
    configs = with_seeds(SMALL, (3, 0, 7))
    whole = run_together(configs, folders(tmp_path / "whole", configs))
    parts = folders(tmp_path / "parts", configs)
    with pytest.raises(Stopped):
        run_together(configs, parts, **stop_at((1, 5)))
    (parts[place] / CURRENT).write_bytes(b"x")
    replaced = os.replace

    def replace_or_crash(source, target):  # the last of a save, of that folder
        if source == parts[place] / (CURRENT + ".tmp"):
            raise KeyboardInterrupt
        replaced(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace_or_crash)
    with pytest.raises(KeyboardInterrupt):
        run_together(configs, parts, resume=True)
    monkeypatch.setattr(checkpoint.os, "replace", replaced)
    resumed = run_together(configs, parts, resume=True)
    for a, b, path, other in zip(whole, resumed, folders(tmp_path / "whole", configs), parts, strict=True):
        assert without_times(a) == without_times(b) == without_times(read_run(other).tasks)
        assert same_bits(weights(path), weights(other))


@pytest.mark.parametrize("first", ["together", "alone"])
def test_runs_go_on_alone_or_together(tmp_path, every_step, first):
    configs = with_seeds(replace(SMALL, method="spectral"))
    paths, whole = folders(tmp_path / "parts", configs), folders(tmp_path / "whole", configs)
    records = run_together(configs, whole)
    if first == "together":
        with pytest.raises(Stopped):
            run_together(configs, paths, **stop_at((1, 5)))
        resumed = [run(c, path, resume=True) for c, path in zip(configs, paths, strict=True)]
    else:
        for config, path in zip(configs, paths, strict=True):
            with pytest.raises(Stopped):
                run(config, path, **stop_at((1, 5)))
        resumed = run_together(configs, paths, resume=True)
    for a, b, path, other in zip(records, resumed, whole, paths, strict=True):
        assert [r["accuracy"] for r in a] == [r["accuracy"] for r in b]
        assert distance(weights(path), weights(other)) <= TOLERANCE


def test_finished_runs_are_read_and_the_others_run(tmp_path):
    configs = with_seeds(SMALL, (3, 0, 7))
    paths = folders(tmp_path, configs)
    first = run(configs[1], paths[1])
    records = run_together(configs, paths)
    assert records[1] == first and "together" not in read_run(paths[1]).header
    assert [read_run(paths[i]).header["together"] for i in (0, 2)] == [2, 2]
    assert run_together(configs, paths) == records


def test_a_run_that_went_on_alone_is_refused(tmp_path, every_step):
    configs = with_seeds(SMALL, (3, 0, 7))
    paths = folders(tmp_path, configs)
    with pytest.raises(Stopped):
        run_together(configs, paths, **stop_at((0, 5)))
    with pytest.raises(Stopped):
        run(configs[1], paths[1], resume=True, **stop_at((1, 3)))
    message = "expected checkpoints of one point, got seed-3 task 0 step 5, seed-0 task 1 step 3, .*train --resume"
    with pytest.raises(ValueError, match=message):
        run_together(configs, paths, resume=True)
    assert load_checkpoint(paths[1])["trainer"]["step"] == 3  # nothing was taken back
    with pytest.raises(ValueError, match="Pass --resume"):
        run_together(configs, paths)
    (paths[1] / "checkpoint.previous.pt").write_bytes(b"lost")
    with pytest.raises(ValueError, match="expected checkpoints of one point"):
        run_together(configs, paths, resume=True)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "expected at least one configuration, got none"),
        ([SMALL, replace(SMALL, seed=1, lr=0.5)], "differ in their seed alone, got lr 0.1 and 0.5"),
        ([SMALL, replace(SMALL, seed=1, options={"a": 1})], "differ in their seed alone, got options {} and {'a': 1}"),
        ([SMALL, SMALL], r"expected seeds that differ, got \[0, 0\]"),
        (with_seeds(replace(SMALL, tasks=0)), "expected tasks from 1 to inf, got 0"),
        (with_seeds(replace(SMALL, method="redo")), "methods none, l2, .*, got 'redo'. .* compare with workers"),
        (
            with_seeds(replace(SMALL, method="spectral_ops.continual.methods.wasserstein:Wasserstein")),
            "expected one of the methods none, .*:Wasserstein'. Give each seed a process of its own",
        ),
        (
            with_seeds(
                replace(
                    SMALL, method="shrink-and-perturb", options={"every": "step", "source": "normal", "noise": 1e-3}
                )
            ),
            "expected shrink-and-perturb with every task, got every step",
        ),
        (
            with_seeds(
                replace(
                    SMALL,
                    model="conv",
                    model_options=MODELS["conv"],
                    method="spectral",
                    options={"conv": "operator", "input_size": (1, 8, 8)},
                )
            ),
            "expected spectral with conv reshape, got conv operator",
        ),
        (
            with_seeds(replace(SMALL, model="resnet18", model_options={"width": 4})),
            "without batch statistics, got BatchNorm in 'stem_norm'. Choose another norm",
        ),
    ],
    ids=range(10),
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, configs, message):
    with pytest.raises(ValueError, match=message):
        run_together(configs, folders(tmp_path / "runs", configs))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "a")])
def test_folders_must_be_as_many_and_different(tmp_path, names):
    with pytest.raises(ValueError, match="expected a folder for each of the 3 configurations, got .*a, .*b"):
        run_together(with_seeds(SMALL, (3, 0, 7)), [tmp_path / name for name in names])


def test_a_folder_of_another_configuration_is_refused(tmp_path):
    configs = with_seeds(SMALL)
    paths = folders(tmp_path, configs)
    run(replace(configs[1], lr=0.01), paths[1])
    with pytest.raises(ValueError, match="got one of another"):
        run_together(configs, paths, resume=True)
    assert not paths[0].exists()
    assert json.loads((paths[1] / "config.json").read_text())["lr"] == 0.01
