"""Runs killed without warning: at random moments, and at every step of writing a checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spectral_ops.continual.checkpoint import load_checkpoint
from spectral_ops.continual.run_folder import read_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")]

# A checkpoint at every step, so that most moments lie within one.
RUN = """
import sys, time
from pathlib import Path
from spectral_ops.continual import steps, trainer
from spectral_ops.continual.config import RunConfig
steps._PATIENCE = -1.0
config = RunConfig(data="digits", model_options={"hidden": [16]}, method="spectral", strength=1e-3, tasks=4, samples=64,
                   held_out_samples=20, steps=40, batch=8, probe_samples=16, checkpoint_seconds=0.0)
SETUP
trainer.run(config, Path(sys.argv[1]), resume=True, progress=lambda task, step: print(task, step, flush=True))
"""
TIMES = ("step_seconds", "method_seconds")


def start(folder: Path, setup: str = "") -> subprocess.Popen:
    code = RUN.replace("SETUP", setup)
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(folder: Path):
    run = read_run(folder)
    assert run.finished
    records = [{key: value for key, value in r.items() if key not in TIMES} for r in run.tasks]
    return records, load_checkpoint(folder)["trainer"]["model"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    assert process.wait(120) == 0, process.stderr.read().decode()
    return result(folder)


def check_same(folder, whole):
    records, weights = result(folder)
    assert records == whole[0]
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())


def test_killed_at_random_moments(tmp_path, whole):
    generator, kills = torch.Generator().manual_seed(0), 0
    while True:
        process = start(tmp_path)
        first = process.stdout.readline()
        if first:
            time.sleep(0.3 * float(torch.rand((), generator=generator)))
        if process.poll() is None and kills < 5:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.wait(120) == 0, process.stderr.read().decode()
        break
    assert kills >= 2
    check_same(tmp_path, whole)


# The first thing that the process does (opens, renames, starts another) after a file of that name is there is its last.
KILL_AT = """
import os, signal
def look(event, arguments):
    if os.path.exists(os.path.join(sys.argv[1], "NAME")): signal.raise_signal(signal.SIGKILL)
sys.addaudithook(look)
"""


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_killed_while_it_begins(tmp_path, whole, name):
    killed = start(tmp_path, KILL_AT.replace("NAME", name))
    assert killed.wait(120) == -signal.SIGKILL and (tmp_path / name).exists()
    assert (tmp_path / "log.jsonl").exists() == (name == "log.jsonl")
    again = start(tmp_path)
    assert again.wait(120) == 0, again.stderr.read().decode()
    check_same(tmp_path, whole)


# The n-th of these calls is the last thing the process does: before it, and right after it.
KILL = """
import os, signal
from spectral_ops.continual import checkpoint
real, calls = checkpoint.os.NAME, 0
def NAME(*arguments):
    global calls
    calls += 1
    if calls == 37 and WHEN == "before": os.kill(os.getpid(), signal.SIGKILL)
    done = real(*arguments)
    if calls == 37 and WHEN == "after": os.kill(os.getpid(), signal.SIGKILL)
    return done
checkpoint.os = type("", (), {k: getattr(os, k) for k in dir(os)})
checkpoint.os.NAME = staticmethod(NAME)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_killed_while_a_checkpoint_is_written(tmp_path, whole, name, when):
    killed = start(tmp_path, KILL.replace("NAME", name).replace("WHEN", repr(when)))
    assert killed.wait(120) == -signal.SIGKILL
    again = start(tmp_path)
    assert again.wait(120) == 0, again.stderr.read().decode()
    check_same(tmp_path, whole)


def test_an_unwritable_folder_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    process = start(file / "run")
    assert process.wait(120) == 1 and str(file) in process.stderr.read().decode()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no signals of this kind")
def test_ctrl_c_of_the_command_leaves_a_checkpoint(tmp_path):
    command = [sys.executable, "-m", "spectral_ops", "train", "--out", str(tmp_path / "run"), "--data", "digits"]
    command += ["--samples", "64", "--held-out-samples", "20", "--steps", "100000", "--tasks", "2"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "go on with the same command and --resume" in process.stderr.read().decode()
    assert load_checkpoint(tmp_path / "run")["trainer"]["step"] > 0
