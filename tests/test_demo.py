"""The demo: streams, records, workers, tables, picture, and the effect it is there to show."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import active_children

import pytest
import torch
import tyro

from spectral_ops import demo
from spectral_ops.continual.data import load_digits
from spectral_ops.demo import DemoConfig, Job, Learner, WorkerError, fill, main, run_jobs, train_stream
from spectral_ops.plots import curves, draw_results, read_results, summary_table, sweep_table

TINY = DemoConfig(tasks=3, samples=60, steps=5, batch=8, hidden=(16,), seeds=(10,), workers=1)
JOBS = [Job("none", 0.0, 10), Job("l2", 1e-3, 10), Job("spectral", 1e-3, 10), Job("reset", 0.0, 10)]


def outcome(records):
    """What must not change between runs: everything but the times, in a fixed order."""
    kept = [{key: value for key, value in r.items() if key != "step_seconds"} for r in records]
    return sorted(kept, key=lambda r: (r["method"], r["seed"], r["task"]))


def test_worker_survives_ctrl_c_and_its_death_is_an_error(capfd):
    # First in this file: where no process was spawned before, spawning the first one unblocks the signal again.
    config = fill(replace(TINY, tasks=2000, workers=2), 1797)
    records = run_jobs(config, JOBS)
    next(records)
    victim = active_children()[0]
    os.kill(victim.pid, signal.SIGINT)
    victim.join(timeout=2)
    assert victim.is_alive() and "KeyboardInterrupt" not in capfd.readouterr().err
    victim.kill()
    with pytest.raises(WorkerError, match="expected every worker to finish, got exit code -9.*--workers 1"):
        for _ in records:
            pass
    assert not active_children()  # the other one is ended too


def test_same_seed_gives_the_same_bits_with_any_number_of_workers_and_threads():
    config = fill(TINY, 1797)
    before = torch.get_num_threads()
    once = outcome(run_jobs(config, JOBS))
    assert len(once) == 4 * 3 and torch.get_num_threads() == before
    torch.set_num_threads(before + 1)
    try:
        torch.rand(3)  # the global generator plays no part
        assert outcome(run_jobs(config, JOBS)) == once
    finally:
        torch.set_num_threads(before)
    assert outcome(run_jobs(replace(config, workers=2), JOBS)) == once
    other = outcome(run_jobs(config, [job._replace(seed=11) for job in JOBS]))
    assert all(a["sigma"] != b["sigma"] for a, b in zip(once, other, strict=True))


def test_methods_start_alike_and_then_differ():
    records = {(r["method"], r["task"]): r for r in run_jobs(fill(TINY, 1797), JOBS)}
    # The first task of reset is that of none; afterwards none carries its network on.
    assert records["none", 0]["sigma"] == records["reset", 0]["sigma"]
    assert records["none", 1]["sigma"] != records["reset", 1]["sigma"]
    for method in ("l2", "spectral"):
        assert records[method, 0]["sigma"] != records["none", 0]["sigma"]
    images = load_digits()[0]
    steps = fill(replace(TINY, steps=1), 1797)
    # Reset draws new weights for every task.
    a, b = (next(iter(Learner(steps, JOBS[3], 64, task).model.parameters())) for task in (0, 1))
    assert not torch.equal(a, b)
    assert len(list(train_stream(steps, JOBS[3], images))) == 3


def test_l2_is_the_gradient_of_strength_times_the_sum_of_squares():
    config = fill(TINY, 1797)
    learner, plain = Learner(config, Job("l2", 0.05, 1), 64), Learner(config, Job("none", 0.0, 1), 64)
    x, labels = torch.randn(60, 64), torch.randint(10, (60,))
    batches = torch.randint(60, (6, 8))
    learner.train(x, labels, batches)
    for rows in batches:  # the same with the penalty written into the loss
        penalty = 0.05 * sum((p**2).sum() for p in plain.model.parameters())
        loss = torch.nn.functional.cross_entropy(plain.model(x[rows]), labels[rows]) + penalty
        plain.optimizer.zero_grad()
        loss.backward()
        plain.optimizer.step()
    for ours, theirs in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_measure_is_exact_and_survives_a_diverged_network():
    learner = Learner(fill(TINY, 1797), JOBS[0], 64)
    weights = {name: p for name, p in learner.model.named_parameters() if p.ndim == 2}
    x, labels = torch.randn(20, 64), torch.randint(10, (20,))
    measured = learner.measure(x, labels)
    assert list(measured["sigma"]) == ["0.weight", "2.weight"]
    for name, w in weights.items():
        assert abs(measured["sigma"][name] - torch.linalg.svdvals(w.double())[0].item()) <= 1e-5
    right = sum(int(learner.model(x[i]).argmax() == labels[i]) for i in range(20))
    assert measured["accuracy"] == right / 20
    weights["0.weight"].data.fill_(math.nan)
    measured = learner.measure(x, labels)
    assert measured["sigma"]["0.weight"] is None and measured["sigma"]["2.weight"] > 0 and measured["loss"] is None
    json.dumps(measured, allow_nan=False)


def test_error_in_a_worker_is_an_error(tmp_path, capfd):
    config = fill(replace(TINY, data="mnist", data_root=tmp_path, workers=2), 1797)
    with pytest.raises(WorkerError, match="got exit code 1. Its traceback is above"):
        list(run_jobs(config, JOBS))
    assert "train-images-idx3-ubyte" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sent, workers", [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGKILL, 2)])
def test_interrupt_leaves_the_finished_tasks_and_no_process(tmp_path, sent, workers):
    config = replace(TINY, tasks=100_000, workers=workers, out=tmp_path)
    program = f"from pathlib import *; from spectral_ops.demo import *; sys.exit(main({config!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", program.replace("PosixPath", "Path")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    results = tmp_path / "results.jsonl"
    give_up = time.monotonic() + 120
    while not (results.exists() and results.read_text().count("\n") > 5) and process.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    # From a terminal Ctrl-C reaches the whole group; a kill reaches the parent alone.
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.kill()
    # It returns once every process that shares stderr has gone: no worker is left.
    error = process.communicate(timeout=120)[1]
    assert process.returncode == (130 if sent == signal.SIGINT else -9), error
    assert "Traceback" not in error
    assert sent == signal.SIGKILL or f"Interrupted. The tasks that were done are in {tmp_path}." in error
    header, records, timing = read_results(results)
    assert len(records) >= 5 and timing is None and header["config"]["tasks"] == 100_000
    assert "-" in summary_table(results)  # an unfinished run can be shown


def test_every_task_is_in_the_file_as_soon_as_it_ends(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"

    def two_tasks(config, jobs):
        for task in range(2):
            yield {"task": task}
            assert [json.loads(line).get("task") for line in path.read_text().splitlines()] == [None, *range(task + 1)]

    monkeypatch.setattr(demo, "run_jobs", two_tasks)
    demo.record_jobs(fill(TINY, 1797), JOBS, path, {}, "test")


@pytest.mark.slow
def test_quick_demo_end_to_end(tmp_path, capsys):
    assert main(DemoConfig(quick=True, out=tmp_path)) == 0
    shown = capsys.readouterr()
    assert "demo: 100%" in shown.err
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    header, tasks, timing = lines[0], lines[1:-1], lines[-1]
    assert set(header) == {"kind", "config", "versions", "machine", "strengths", "sweep", "sweep_seeds"}
    assert header["kind"] == "header" and header["config"]["steps"] == 300 and header["config"]["quick"] is True
    assert header["versions"]["torch"] == torch.__version__ and header["strengths"]["none"] == 0
    keys = {"kind", "method", "strength", "seed", "task", "accuracy", "loss", "sigma", "step_seconds"}
    assert all(set(r) == keys and r["kind"] == "task" and r["seed"] == 10 for r in tasks)
    assert sorted((r["method"], r["task"]) for r in tasks) == sorted((m, t) for m in demo.METHODS for t in range(4))
    for r in tasks:
        assert 0 <= r["accuracy"] <= 1 and r["loss"] > 0 and 0 < r["step_seconds"] < 0.1
        assert list(r["sigma"]) == ["0.weight", "2.weight", "4.weight"] and min(r["sigma"].values()) > 0
    assert timing["kind"] == "timing" and list(timing["step_seconds"]) == ["none", "l2", "spectral"]
    table = [line.split() for line in shown.out.splitlines()]
    assert [row[0] for row in table if row and row[0] in demo.METHODS][-4:] == list(demo.METHODS)
    assert "Shown on other seeds: 10." in shown.out
    table = (tmp_path / "table.txt").read_text()
    assert table.strip() in shown.out and str(tmp_path / "table.txt") in shown.out
    assert "sigma 0  sigma 2" in table and table.splitlines()[-1].startswith("sigma 0, 2, ...: sigma_max of the first")
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 1200 and height >= 500 and len(picture) > 20_000


def test_tune_gives_both_methods_the_same_trials_and_uses_the_best(tmp_path, capsys):
    assert main(replace(TINY, tune=True, tasks=1, out=tmp_path, seeds=(2, 10), l2=0.5)) == 0
    sweep = json.loads((tmp_path / "sweep.json").read_text())
    runs = read_results(tmp_path / "sweep.jsonl")[1]
    for method in ("l2", "spectral"):
        trials = [(r["strength"], r["seed"]) for r in runs if r["method"] == method]
        assert sorted(trials) == [(s, seed) for s in demo.SWEEP_STRENGTHS for seed in (0, 1, 2)]
        mine = [r for r in runs if r["method"] == method]
        means = {s: sum(r["accuracy"] for r in mine if r["strength"] == s) / 3 for s in demo.SWEEP_STRENGTHS}
        assert sweep["mean_accuracy"][method] == {str(s): round(a, 4) for s, a in means.items()}
        assert means[sweep["chosen"][method]] == max(means.values())
    header, records, _ = read_results(tmp_path / "results.jsonl")
    assert header["strengths"] == {"none": 0, "reset": 0, "l2": 0.5, "spectral": sweep["chosen"]["spectral"]}
    assert {r["strength"] for r in records if r["method"] == "l2"} == {0.5}
    shown = capsys.readouterr().out
    assert "used: 0.5 (given by hand)" in shown and "seeds of which 2 also chose the strengths" in shown


@pytest.mark.parametrize("data", demo.STREAMS)
def test_committed_sweeps_are_complete_and_their_best_is_not_on_the_edge(data):
    for method in ("l2", "spectral"):
        means = demo.SWEEPS[demo.SWEEP_OF[data], method]
        assert len(means) == len(demo.SWEEP_STRENGTHS) and all(0.09 <= a <= 1 for a in means)
        assert max(means) not in (means[0], means[-1])


BAD = {
    "tasks": (0, "tasks from 1 to inf, got 0. Change --tasks"),
    "steps": (-1, "steps from 1 to inf, got -1. Change --steps"),
    "samples": (1798, "samples from 2 to 1797, got 1798. Change --samples"),
    "batch": (61, "batch from 1 to 60, got 61. Change --batch"),
    "workers": (0, "workers from 1 to 1024, got 0. Change --workers"),
    "lr": (math.nan, "lr from 1e-08 to 1, got nan. Change --lr"),
    "l2": (-1.0, "l2 from 0 to 1000, got -1.0. Change --l2"),
    "spectral": (math.inf, "spectral from 0 to 1000, got inf. Change --spectral"),
    "hidden": ((16, 0), r"hidden widths >= 1, got \(16, 0\). Change --hidden"),
    "seeds": ((10, 10), r"seeds to be distinct and at least one, got \(10, 10\). Change --seeds"),
}


@pytest.mark.parametrize("name", BAD)
def test_options_out_of_range_are_refused(name):
    value, said = BAD[name]
    with pytest.raises(ValueError, match="demo: expected " + said):
        fill(replace(TINY, **{name: value}), 1797)


def test_main_reports_what_it_cannot_use(tmp_path, capsys, monkeypatch):
    assert main(replace(TINY, tasks=0, out=tmp_path)) == 2
    assert "expected tasks from 1" in capsys.readouterr().err
    assert main(replace(TINY, data="mnist", data_root=tmp_path / "nowhere", out=tmp_path)) == 2
    assert "expected root to be an existing folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(replace(TINY, out=tmp_path)) == 2
    assert "checkout of spectral_ops: pip install '.[continual]'." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_are_typed_flags():
    parsed = tyro.cli(DemoConfig, args=["--data", "mnist", "--data-root", "d", "--seeds", "7", "8", "--quick"])
    assert parsed.data == "mnist" and str(parsed.data_root) == "d" and parsed.seeds == (7, 8) and parsed.quick
    assert fill(parsed, 60000).seeds == (7,) and fill(parsed, 60000).tasks == demo.QUICK["tasks"]
    assert fill(replace(parsed, tasks=9), 60000).tasks == 9  # what is asked for goes before --quick
    full = fill(DemoConfig(), 1797)
    assert {key: getattr(full, key) for key in demo.STREAMS["digits"]} == demo.STREAMS["digits"]


@pytest.fixture
def results(tmp_path):
    """A made file of two seeds and three tasks, of which spectral's second seed has two."""
    lines = [{"kind": "header", "strengths": {"none": 0, "spectral": 0.01, "reset": 0},
              "config": {"data": "digits", "samples": 60, "steps": 5}}]  # fmt: skip
    for method, start in (("reset", 0.5), ("spectral", 0.6), ("none", 0.4)):
        for seed in (11, 10):
            for task in range(2 if (method, seed) == ("spectral", 11) else 3):
                sigma = {"0.weight": 1.0 + task, "2.weight": None if method == "none" else 4.0}
                accuracy = start + 0.1 * task * (seed - 10)
                lines.append({"kind": "task", "method": method, "strength": lines[0]["strengths"][method], "seed": seed,
                              "task": task, "accuracy": accuracy, "loss": 1.0, "sigma": sigma,
                              "step_seconds": 1e-4})  # fmt: skip
    lines.append({"kind": "timing", "step_seconds": {"none": 4e-4, "spectral": 5e-4}})
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_table(results):
    head, *rows = [re.split(" {2,}", line.strip()) for line in summary_table(results).splitlines()[1:]]
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["method"] for row in cells] == ["none", "spectral", "reset"]
    none, spectral, reset = cells
    assert none["task 1"] == "0.400" and none["task 2"] == "0.450" and none["last: min-max"] == "0.400-0.600"
    assert none["all"] == "0.450" and none["sigma 0"] == "3.00" and none["sigma 2"] == "nan"
    assert none["us/step"] == "400" and none["ratio"] == "1.00" and none["strength"] == "-"
    assert spectral["strength"] == "0.01" and spectral["task 3"] == "-" and spectral["ratio"] == "1.25"
    assert spectral["sigma 0"] == "2.50" and spectral["sigma 2"] == "4.00"
    assert reset["all"] == "0.550" and reset["task 1"] == "-" and reset["us/step"] == "-"


def test_results_cut_by_a_crash_are_read_and_others_refused(results):
    whole = read_results(results)
    text = results.read_text()
    results.write_text(text + '{"kind": "ta')
    assert read_results(results) == whole
    order = [("none", 10), ("none", 11), ("spectral", 10), ("spectral", 11), ("reset", 10), ("reset", 11)]
    assert list(dict.fromkeys((r["method"], r["seed"]) for r in whole[1])) == order
    assert curves(whole[1], "spectral", "sigma") == {10: [4.0, 4.0, 4.0], 11: [4.0, 4.0]}
    draw_results(results, results.with_suffix(".png"))  # with None among the values and seeds of unequal length
    results.write_text('{"kind": "ta\n' + text)
    with pytest.raises(ValueError, match="expected line 1 of .*results.jsonl to be JSON, got .* Run the demo again"):
        read_results(results)
    results.write_text(text.split("\n", 1)[1])
    with pytest.raises(ValueError, match="results.jsonl to begin with a header, got .* Run the demo again"):
        read_results(results)


def test_sweep_table_shows_every_trial():
    sweep = {"l2": {1e-3: 0.3, 1e-2: 0.5, 1e-1: 0.4}, "spectral": {1e-3: 0.7, 1e-2: 0.6, 1e-1: 0.5}}
    text = sweep_table(sweep, {"l2": 1e-2, "spectral": 1e-3}, "this", (0, 1, 2), (10, 11))
    assert "1e-03 0.300  1e-02 0.500  1e-01 0.400   used: 0.01" in text and "used: 0.001\n" in text
    assert "  spectral: the best lies on the edge" in text and "  l2: the best" not in text
    assert "3 (l2) and 3 (spectral) trials on this stream" in text and text.endswith("Shown on other seeds: 10, 11.")


@pytest.mark.slow
def test_plasticity_is_lost_without_and_kept_with_the_penalty():
    config = fill(DemoConfig(tasks=12, seeds=(10,), workers=2), 1797)
    last = {r["method"]: r for r in run_jobs(config, [JOBS[0], JOBS[2]]) if r["task"] == 11}
    none, spectral = last["none"], last["spectral"]
    # Measured on the seeds 10, 11, 12: accuracy 0.31-0.38 and 0.78-0.79, largest sigma 7.2-7.6 and 3.0-3.1.
    assert none["accuracy"] <= 0.5 and spectral["accuracy"] >= 0.7
    assert max(none["sigma"].values()) >= 1.8 * max(spectral["sigma"].values())
