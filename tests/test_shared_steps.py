"""compare, sweep and ablate with several seeds of a method by shared steps: what is handed to workers, what comes back.
"""

import os
import signal
import sys
from dataclasses import replace
from multiprocessing import active_children

import pytest
import torch

from spectral_ops.continual import steps
from spectral_ops.continual.checkpoint import load_checkpoint
from spectral_ops.continual.compare import CompareConfig, compare
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.ensemble import run_together
from spectral_ops.continual.ensemble.ensemble import Ensemble
from spectral_ops.continual.ensemble.refused import CannotShare
from spectral_ops.continual.ensemble.stackable import why_alone
from spectral_ops.continual.jobs import Advanced, Finished, Halted, Job, Started, count_runs
from spectral_ops.continual.methods import METHODS
from spectral_ops.continual.progress import run_shown, shown
from spectral_ops.continual.run_folder import read_run
from spectral_ops.continual.sweep import SweepConfig, sweep
from spectral_ops.continual.trainer import Trainer
from spectral_ops.continual.variants import resolve_methods
from spectral_ops.continual.workers import run_jobs

TINY = RunConfig(data="digits", model_options={"hidden": (12, 9)}, tasks=2, samples=60, steps=9, batch=8)
SHARED = {"preset": "random-label-digits", "tasks": 2, "steps": 6, "samples": 60, "model_options": ("hidden=9,7",)}
SEEDS = (10, 11, 12, 13, 14)


def compared(out, *methods, **changes):
    return CompareConfig(out=out, methods=methods, **(SHARED | {"seeds": SEEDS, "workers": 1, "together": 3} | changes))


def group(path, seeds=SEEDS[:3], label="none", **changes):
    jobs = [Job(label, replace(TINY, seed=seed, **changes), path / label / f"seed-{seed}") for seed in seeds]
    return jobs[0]._replace(others=tuple(jobs[1:]))


def headers(path, label, seeds=SEEDS):
    return [read_run(path / label / f"seed-{seed}").header.get("together") for seed in seeds]


def weights(folder):
    return load_checkpoint(folder)["trainer"]["model"]


def same_bits(folder, other):
    a, b = weights(folder), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_seeds_share_their_steps_and_methods_that_cannot_go_by_single_seeds(tmp_path, capsys, workers):
    config, reported = compared(tmp_path, "none", "redo", "spectral,strength=1e-2", workers=workers), []
    assert compare(config, report=lambda folders, *_: reported.append(folders) or 0) == 0
    shown = capsys.readouterr()
    assert "compare: redo: each seed by itself. Shared steps expect one of the methods none, l2" in shown.err
    assert "15 of 15 runs finished" in shown.out and len(reported[0]) == 15
    assert headers(tmp_path, "none") == headers(tmp_path, "spectral,strength=0.01") == [3, 3, 3, 2, 2]
    assert headers(tmp_path, "redo") == [None] * 5
    base = resolve_methods(config)[0]
    configs = [replace(base, method="none", seed=seed) for seed in SEEDS[:3]]
    direct = [tmp_path / "direct" / str(seed) for seed in SEEDS[:3]]
    run_together(configs, direct, at_once=3)
    assert all(
        same_bits(folder, tmp_path / "none" / f"seed-{seed}") for folder, seed in zip(direct, SEEDS, strict=False)
    )


def test_a_last_seed_without_others_is_a_run_as_any(tmp_path):
    assert compare(compared(tmp_path, "none", seeds=SEEDS[:4]), report=lambda *_: 0) == 0
    assert headers(tmp_path, "none", SEEDS[:4]) == [3, 3, 3, None]


def test_a_sweep_shares_the_steps_of_its_seeds(tmp_path, capsys):
    config = SweepConfig(out=tmp_path, methods=("l2",), strengths=(1e-4, 1e-3), lrs=(1e-3,), together=3, **SHARED)
    assert sweep(replace(config, workers=1)) == 0
    folders = sorted(tmp_path.glob("*/seed-*"))
    assert len(folders) == 6 and {read_run(folder).header["together"] for folder in folders} == {3}
    assert (tmp_path / "best.toml").exists()


def test_dry_run_says_who_goes_with_whom(tmp_path, capsys):
    assert compare(compared(tmp_path, "none", "redo", dry_run=True)) == 0
    first, *lines, reason = capsys.readouterr().out.splitlines()
    assert first == "10 runs in 7 groups, 1 at a time:" and reason.startswith("redo: each seed by itself. ")
    names = [" ".join(line.split()[:3]) for line in lines]
    assert names[:4] == ["none seed 10", "none seed 11", "none seed 12", "redo seed 10"] and len(names) == 10
    beside = [line.rpartition("  ")[2] for line in lines if line.split()[0] == "none"]
    assert beside == ["beside 2"] * 3 + ["beside 1"] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("methods", "workers", "together", "idle", "better"),
    [(["none"], 2, 9, 1, 3), (["none", "l2"], 6, 3, 2, 2), (["none"], 4, 5, 3, None), (["none"], 2, 3, 0, None),
     (["none", "l2"], 2, 5, 0, None), (["none", "redo"], 6, 5, 0, None), (["none", "redo"], 7, 3, 0, None)],
)  # fmt: skip
def test_says_which_groups_would_leave_no_worker_idle(tmp_path, capsys, methods, workers, together, idle, better):
    assert compare(compared(tmp_path, *methods, workers=workers, together=together, dry_run=True)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "workers will" in line]
    expected = f"{idle} of {workers} workers will have nothing to do. --together {better} gives each a group"
    assert said == ([] if better is None else [expected])


def test_networks_of_one_kind_may_share_and_those_of_another_not(tmp_path, capsys):
    networks = [f"none,model=resnet18,model_options.width=4,model_options.norm={norm}" for norm in ("batch", "group")]
    assert compare(compared(tmp_path, *networks, model_options=(), seeds=(10, 11), dry_run=True)) == 0
    first, *lines, reason = capsys.readouterr().out.splitlines()
    assert first == "4 runs in 3 groups, 1 at a time:"
    assert ["beside" in line for line in lines] == ["norm=group" in line for line in lines]
    assert "norm=batch: each seed by itself. Shared steps expect a model without batch statistics, got " in reason


@pytest.mark.parametrize("count", [0, -1])
def test_refuses_a_count_that_is_none(tmp_path, capsys, count):
    assert compare(compared(tmp_path, "none", together=count)) == 2
    assert capsys.readouterr().err == f"compare: expected together >= 1, got {count}. Change --together.\n"


def test_interrupted_groups_go_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "_PATIENCE", -1.0)
    whole, parts = group(tmp_path / "whole"), group(tmp_path / "parts")
    assert run_jobs([whole], workers=1).status == 0

    def interrupt(event):
        if isinstance(event, Advanced) and (event.task, event.step) == (1, 4):
            os.kill(os.getpid(), signal.SIGINT)

    events = []
    outcome = run_jobs([whole, parts], workers=1, on_event=lambda event: events.append(event) or interrupt(event))
    assert outcome.interrupted and len(outcome.finished) == 3 and isinstance(events[-1], Halted)
    assert run_shown("compare", [parts], 1).status == 0
    assert all(same_bits(a.folder, b.folder) for a, b in zip(whole.runs, parts.runs, strict=True))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert [line.partition(":")[0] for line in lines] == [f"[{i}/3] none seed {9 + i} finished" for i in (1, 2, 3)]


def test_a_killed_worker_fails_its_group(tmp_path):
    lost = group(tmp_path, tasks=50, steps=400)

    def kill(event):
        if isinstance(event, Advanced):
            for process in active_children():
                process.kill()

    outcome = run_jobs([lost], workers=2, on_event=kill)
    assert [failure.job.name for failure in outcome.failures] == ["none seeds 10, 11, 12"]
    assert outcome.failures[0].reason == "its worker was killed by SIGKILL"
    assert outcome.status == 1 and not outcome.interrupted and not read_run(lost.folder).finished


def test_a_group_that_fails_is_said_with_its_log_and_others_go_on(tmp_path, capsys):
    bad, other = group(tmp_path, label="bad", lr=1e9), group(tmp_path, SEEDS[3:], "other")
    assert run_shown("compare", [bad, other], 2).status == 1
    lines = capsys.readouterr().err.splitlines()
    assert "compare: expected 5 runs to finish, got 3 that failed:" in lines
    assert lines[-2].startswith("  bad seeds 10, 11, 12: ValueError: run: expected lr")
    assert lines[-2].endswith(f"see {bad.log}") and "Traceback" in bad.log.read_text()
    assert all(read_run(run.folder).finished for run in other.runs)


def test_bars_count_the_steps_of_all_runs(tmp_path, monkeypatch):
    jobs = [group(tmp_path), group(tmp_path, SEEDS[3:], "l2")]
    assert run_jobs([jobs[1]], workers=1).status == 0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with shown("compare", jobs, 2) as bars:
        assert bars.total.total == (3 + 2) * 2 * 9 and count_runs(jobs) == 5
        bars(Started(0, jobs[0]))
        bars(Advanced(0, jobs[0], 1, 4))
        assert bars.bars[0].desc.strip() == "none seeds 10, 11, 12" and bars.bars[0].n == bars.total.n == 3 * 13
        bars(Started(1, jobs[1]))  # was finished before
        assert bars.bars[1].n == 2 * 18
        bars(Finished(1, jobs[1]))
        assert bars.total.postfix == "2 of 5 runs" and bars.total.n == 3 * 13 + 2 * 18


CASES = [{"method": name} for name in METHODS] + [
    {"model": "resnet18", "model_options": {"width": 4, "norm": "batch"}},
    {"model": "resnet18", "model_options": {"width": 4, "norm": "group"}},
    {"model": "conv", "method": "spectral", "options": {"conv": "operator", "input_size": (1, 8, 8)}},
    {"method": "shrink-and-perturb", "options": {"every": "step", "source": "normal"}},
    {"method": "spectral", "optimizer": "spectral-adamw"},
    {"method": "tests.test_compare:Own"},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_who_can_share_is_known_without_data(changes):
    trainers = [Trainer(replace(TINY, **{"model_options": {}} | changes, seed=seed)) for seed in (0, 1)]
    stream, config = trainers[0].stream, trainers[0].config
    reason = why_alone(config, stream.input_shape, stream.classes)
    try:
        Ensemble(trainers)
    except CannotShare as refused:
        assert reason and reason in str(refused) and "run_together" not in reason
    else:
        assert reason is None
