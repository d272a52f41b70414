"""A run's folder is one run's at a time: others wait for it, go on from where it ended, or are refused."""

import contextlib
import errno
import json
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from ensemble_samples import SMALL, folders, stop_at, with_seeds, without_times

from spectral_ops.continual import ensemble, lock, trainer
from spectral_ops.continual.ensemble import run_together
from spectral_ops.continual.lock import LOCK, locked
from spectral_ops.continual.run_folder import LOG, read_run
from spectral_ops.continual.steps import Stopped
from spectral_ops.continual.trainer import run

pytest.importorskip("fcntl", reason="no such locks on this system")
NEVER = threading.Event()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.0)


def kinds(folder):
    return [json.loads(line)["kind"] for line in (folder / LOG).read_text().splitlines()]


# ---- the lock ----


def test_a_folder_is_one_holders_at_a_time(tmp_path, impatient):
    with locked(tmp_path / "new" / "run", NEVER):
        with pytest.raises(OSError, match=r"^run: expected .*run to be nobody else's, got one that another run is"):
            with locked(tmp_path / "new" / "run", NEVER):
                pass
        with locked(tmp_path / "other", NEVER):
            pass
    with locked(tmp_path / "new" / "run", NEVER):
        assert (tmp_path / "new" / "run" / LOCK).exists()


def test_an_error_gives_it_back(tmp_path, impatient):
    with pytest.raises(KeyError), locked(tmp_path, NEVER):
        raise KeyError
    with locked(tmp_path, NEVER):
        pass


def test_it_is_waited_for(tmp_path, capsys):
    held, enough = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path, NEVER):
            held.set()
            enough.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    threading.Timer(0.3, enough.set).start()
    with locked(tmp_path, NEVER):
        assert enough.is_set()
    thread.join()
    assert capsys.readouterr().err == f"run: {tmp_path} is another run's. Waiting up to 15 s for it.\n"


def test_a_stop_ends_the_wait(tmp_path):
    stop = threading.Event()
    stop.set()
    with locked(tmp_path, NEVER), pytest.raises(Stopped), locked(tmp_path, stop):
        pass


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_kill_gives_it_back(tmp_path, impatient):
    code = "import sys, threading, time\nfrom pathlib import Path\nfrom spectral_ops.continual.lock import locked\n"
    code += "with locked(Path(sys.argv[1]), threading.Event()): print(flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(OSError, match="nobody else's"), locked(tmp_path, NEVER):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path, NEVER):
        pass


@pytest.mark.parametrize("lacking", ["module", "file system"])
def test_without_such_locks_nothing_is_held(tmp_path, monkeypatch, lacking):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if lacking == "module":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked(tmp_path, NEVER), locked(tmp_path, NEVER):
        pass


# ---- runs ----


def test_a_run_in_somebodys_folder_is_refused(tmp_path, impatient):
    with pytest.raises(Stopped):
        run(SMALL, tmp_path, **stop_at((1, 0)))
    before = (tmp_path / LOG).read_bytes()
    with locked(tmp_path, NEVER), pytest.raises(OSError, match="nobody else's"):
        run(SMALL, tmp_path, resume=True)
    assert (tmp_path / LOG).read_bytes() == before
    assert without_times(run(SMALL, tmp_path, resume=True)) == without_times(run(SMALL))


def test_runs_together_want_every_folder(tmp_path, impatient):
    configs = with_seeds(SMALL)
    paths = folders(tmp_path, configs)
    with locked(paths[1], NEVER), pytest.raises(OSError, match=f"{paths[1].name} to be nobody else's"):
        run_together(configs, paths)
    assert not any((path / LOG).exists() for path in paths)
    assert [len(records) for records in run_together(configs, paths)] == [2, 2]


@pytest.fixture
def meanwhile(monkeypatch):
    """meanwhile(module, action): the next lock there is only had after somebody else has done this."""

    def arrange(module, action):
        @contextlib.contextmanager
        def later(folder, stop):
            monkeypatch.setattr(module, "locked", locked)
            action()
            with locked(folder, stop):
                yield

        monkeypatch.setattr(module, "locked", later)

    return arrange


def test_a_run_that_ended_meanwhile_is_read(tmp_path, meanwhile):
    done = []
    meanwhile(trainer, lambda: done.extend((run(SMALL, tmp_path), (tmp_path / LOG).read_bytes())))
    assert run(SMALL, tmp_path) == done[0]
    assert (tmp_path / LOG).read_bytes() == done[1] and kinds(tmp_path) == ["header", "task", "task", "end"]


def test_what_came_into_the_folder_meanwhile_is_refused(tmp_path, meanwhile):
    meanwhile(trainer, lambda: run(replace(SMALL, lr=0.01), tmp_path / "a"))
    with pytest.raises(ValueError, match="got one of another"):
        run(SMALL, tmp_path / "a")
    meanwhile(ensemble, lambda: run(replace(SMALL, lr=0.01), tmp_path / "b"))
    with pytest.raises(ValueError, match="got one of another"):
        run_together([SMALL], [tmp_path / "b"])


@pytest.mark.slow
def test_of_two_that_go_on_at_once_one_waits(tmp_path):
    """Each in a process: a run sets torch's number of threads and random state."""
    code = "import sys\nsys.path.insert(0, sys.argv[2])\nfrom ensemble_samples import SMALL\n"
    code += "from dataclasses import replace\nfrom spectral_ops.continual.trainer import run\n"
    code += "print(flush=True); sys.stdin.readline()\n"
    code += "run(replace(SMALL, steps=2000), sys.argv[1], resume=True)"
    command = [sys.executable, "-c", code, str(tmp_path), str(__file__.rpartition("/")[0])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sorted("Waiting" in error for error in errors) == [False, True]
    assert kinds(tmp_path) == ["header", "task", "task", "end"]
    assert [task["task"] for task in read_run(tmp_path).tasks] == [0, 1]
