"""`spectral-ops train`: options to a run, exit statuses, what it prints, TensorBoard."""

import json
from types import SimpleNamespace

import pytest

from spectral_ops.cli import main
from spectral_ops.continual import train as module
from spectral_ops.continual.run_folder import read_run
from spectral_ops.continual.train import TENSORBOARD, scalars

SMALL = [
    "--data",
    "digits",
    "--samples",
    "40",
    "--held-out-samples",
    "20",
    "--steps",
    "5",
    "--tasks",
    "2",
    "--batch",
    "8",
]


def train(folder, *options: str) -> int:
    return main(["train", "--out", str(folder), *SMALL, *options])


def test_a_run_from_the_command_line(tmp_path, capsys):
    options = ["--method", "spectral", "--strength", "0.01", "--options", "target=2", "--model-options", "hidden=8,4"]
    assert train(tmp_path, *options) == 0
    run = read_run(tmp_path)
    assert run.finished and run.config["options"] == {"target": 2} and run.config["model_options"] == {"hidden": [8, 4]}
    assert run.config["strength"] == 0.01 and len(run.tasks) == 2
    printed = capsys.readouterr()
    assert "2 tasks: accuracy" in printed.out and "spectral seed 0" in printed.err


def test_a_finished_run_is_said_to_be_finished(tmp_path, capsys):
    assert train(tmp_path) == train(tmp_path) == 0
    assert "holds this run, finished: nothing was run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "spectrall"], "The nearest is 'spectral'"),
        (["--method", "l2", "--options", "period=3"], "method l2: expected options among strength"),
        (["--preset", "mnist"], "preset: expected one of"),
        (["--options", "period"], "options: expected name=value, got 'period'"),
        (["--steps", "0"], "expected steps from 1"),
        (["--data", "mnist", "--data-root", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, options, message):
    assert train(tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1  # no traceback, and no bar of a run that is not
    assert not (tmp_path / "run").exists()


def test_the_bar_of_a_run_that_goes_on_begins_where_it_stopped(tmp_path, capsys, monkeypatch):
    made = []

    class Bar:
        def __init__(self, **given):
            self.n = given["initial"]
            made.append((given["initial"], given["total"], self))

        def update(self, steps):
            self.n += steps

        def close(self):
            self.closed = True

    def run(settings, folder, *, progress, **rest):
        for step in (3, 4):
            progress(1, step)
        return [{"accuracy": 0.5, "step_seconds": 0.0}]

    monkeypatch.setattr(module, "require", lambda *_: SimpleNamespace(tqdm=Bar))
    monkeypatch.setattr(module, "run", run)
    assert train(tmp_path) == 0
    ((initial, total, bar),) = made
    assert (initial, total, bar.n, bar.closed) == (5 + 3 - 1, 10, 10, True)


def test_another_configuration_is_refused(tmp_path, capsys):
    assert train(tmp_path) == 0
    assert train(tmp_path, "--lr", "0.5") == 2
    assert "lr: 0.001 there, 0.5 here" in capsys.readouterr().err


def test_tensorboard_has_every_number_of_every_task(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(tmp_path, "--tensorboard") == 0
    events = accumulator.EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    for record in read_run(tmp_path).tasks:
        for name, value in scalars(record):
            (logged,) = [e.value for e in events.Scalars(name) if e.step == record["task"]]
            assert logged == pytest.approx(value, rel=1e-6, abs=1e-30)  # stored as float32
    assert "accuracy" in events.Tags()["scalars"]


def test_scalars_are_the_numbers_of_a_record():
    record = {"kind": "task", "task": 3, "accuracy": 0.5, "loss": None, "sigma": {"a": 1.0, "b": None}}
    assert scalars(record) == [("accuracy", 0.5), ("sigma/a", 1.0)]
    json.dumps(record)
