"""Workers: what they do with jobs that fail or die, with signals, and with what was begun before."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from run_samples import calls, sample_job, sample_run

from spectral_ops.continual import trainer
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.jobs import Advanced, Event, Failed, Finished, Halted, Job, Outcome, Started
from spectral_ops.continual.progress import run_shown, shown
from spectral_ops.continual.run_folder import read_run
from spectral_ops.continual.workers import run_jobs


def names(events, kind):
    return [event.job.label for event in events if isinstance(event, kind)]


@pytest.mark.slow
def test_others_go_on_when_jobs_raise_exit_crash_and_are_killed(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # the log holds it all without
    fates = {"raises": "raise", "exits": "exit", "killed": "kill", "crashes": "segfault"}
    jobs = [sample_job(tmp_path, name, fate=fate) for name, fate in fates.items()]
    jobs += [sample_job(tmp_path, f"good{i}") for i in range(3)]
    events = []
    outcome = run_jobs(jobs, workers=2, on_event=events.append, run=sample_run)
    assert sorted(names(events, Started)) == sorted(job.label for job in jobs)
    assert sorted(job.label for job in outcome.finished) == ["good0", "good1", "good2"] and outcome.status == 1
    assert all(read_run(job.folder).finished for job in outcome.finished)
    reasons = {failure.job.label: failure.reason for failure in outcome.failures}
    assert reasons == {
        "raises": "ValueError: no good: raises",
        "exits": "its worker ended with exit code 3",
        "killed": "its worker was killed by SIGKILL",
        "crashes": "its worker was killed by SIGSEGV",
    }
    logs = {job.label: job.log.read_text() for job in jobs}
    assert all(logs[name].startswith(f"output of {name}\n") for name in logs)  # also where the process just ended
    assert "Traceback" in logs["raises"] and "second line" in logs["raises"]
    assert "Segmentation fault" in logs["crashes"] and "run_samples.py" in logs["crashes"]
    assert capfd.readouterr() == ("", "") and not active_children()


def test_jobs_are_begun_in_their_order_by_whoever_is_free(tmp_path):
    jobs = [sample_job(tmp_path, "busy", fate="wait")] + [sample_job(tmp_path, f"job{i}") for i in range(6)]
    begun, workers, left = [], {}, {"busy", "job5"}

    def on_event(event):
        if isinstance(event, Started):
            begun.append(event.job.label)
        workers[event.job.label] = event.worker
        # Handed out in order, but the first process may take longer to start than the second and all its jobs.
        if event.job.label in left and isinstance(event, Started if event.job.label == "busy" else Finished):
            left.remove(event.job.label)
            if not left:
                os.kill(os.getpid(), signal.SIGINT)  # for the one that waits

    outcome = run_jobs(jobs, workers=2, on_event=on_event, run=sample_run)
    assert [label for label in begun if label != "busy"] == [f"job{i}" for i in range(6)] and "busy" in begun
    # A fixed share each would have left half of them behind the busy one.
    assert {workers[f"job{i}"] for i in range(6)} == {1 - workers["busy"]}
    assert len({calls(job)[0] for job in jobs[1:]}) == 1  # one process served them all
    assert outcome.interrupted and outcome.status == 130 and not outcome.failures


def test_what_is_finished_is_not_run_again(tmp_path):
    jobs = [sample_job(tmp_path, "first"), sample_job(tmp_path, "second", fate="raise"), sample_job(tmp_path, "third")]
    assert run_jobs(jobs, workers=1, run=sample_run).status == 1
    again = run_jobs(jobs, workers=2, run=sample_run)  # however many there were before
    assert [len(calls(job)) for job in jobs] == [1, 2, 1] and again.status == 1
    assert sorted(job.label for job in again.finished) == ["first", "third"]
    assert jobs[1].log.read_text().count("Traceback") == 2  # appended
    assert calls(jobs[0]) == [os.getpid()]


def test_one_worker_is_this_process_and_tells_the_same(tmp_path, capsys):
    jobs = [sample_job(tmp_path, "raises", fate="raise"), sample_job(tmp_path, "good")]
    events = []
    outcome = run_jobs(jobs, workers=1, on_event=events.append, run=sample_run)
    assert [type(e) for e in events] == [Started, Advanced, Failed, Started, Advanced, Finished]
    assert events[1] == Advanced(0, jobs[0], 0, 1)
    assert outcome.failures == [Failed(0, jobs[0], "ValueError: no good: raises")]
    assert "ValueError: no good: raises" in jobs[0].log.read_text()
    assert capsys.readouterr().out == "output of raises\noutput of good\n"


def test_signal_to_a_worker_alone_fails_its_job_and_ctrl_c_does_not(tmp_path):
    jobs = [sample_job(tmp_path, "ended", fate="wait"), sample_job(tmp_path, "good0"), sample_job(tmp_path, "good1")]
    events = []

    def on_event(event):
        events.append(event)
        if isinstance(event, Advanced) and event.job.label == "ended" and event.step in (5, 10):
            os.kill(calls(jobs[0])[0], signal.SIGINT if event.step == 5 else signal.SIGTERM)

    outcome = run_jobs(jobs, workers=2, on_event=on_event, run=sample_run)
    assert outcome.status == 1 and len(outcome.finished) == 2
    assert outcome.failures[0].reason == "stopped by a signal to its worker alone"
    assert max(e.step for e in events if isinstance(e, Advanced)) >= 10
    assert (jobs[0].folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("workers, number", [(1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGTERM)])
def test_first_signal_stops_between_two_steps_and_handlers_are_put_back(tmp_path, workers, number, capfd):
    jobs = [sample_job(tmp_path, f"job{i}", fate="wait") for i in range(3)]
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    running, events, sent = set(), [], []

    def on_event(event):
        events.append(event)
        if isinstance(event, Advanced):
            running.add(event.job.label)
            if len(running) == workers and not sent:
                sent.append(number)
                os.kill(os.getpid(), number)

    outcome = run_jobs(jobs, workers=workers, on_event=on_event, run=sample_run)
    assert outcome.interrupted and outcome.status == 130 and not outcome.finished and not outcome.failures
    assert sorted(names(events, Halted)) == sorted(running) and len(running) == workers  # the third was not begun
    assert all((job.folder / "checkpoint.pt").exists() == (job.label in running) for job in jobs)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert "Stopping between two steps" in capfd.readouterr().err and not active_children()


def test_second_signal_ends_at_once(tmp_path):
    jobs = [sample_job(tmp_path, f"job{i}", fate="hang") for i in range(2)]  # they never look at `stop`
    begun = []

    def on_event(event):
        begun.append(event)
        if len(begun) == 2:
            for delay in (0.0, 0.5, 0.5):
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()

    start = time.monotonic()
    outcome = run_jobs(jobs, workers=2, on_event=on_event, run=sample_run)
    assert outcome.status == 130 and not outcome.failures and time.monotonic() - start < 30
    assert not active_children()


def test_run_whose_worker_is_killed_goes_on_to_the_same_bits(tmp_path):
    config = RunConfig(
        data="digits",
        tasks=2,
        steps=1000,
        samples=100,
        held_out_samples=50,
        model_options={"hidden": [16]},
        checkpoint_seconds=0.0,
    )
    job = Job("none", config, tmp_path / "none")

    def kill(event):
        if isinstance(event, Advanced) and (tmp_path / "none" / "checkpoint.pt").exists():
            for process in active_children():
                process.kill()

    times = ("step_seconds", "method_seconds")
    first = run_jobs([job], workers=2, on_event=kill)
    assert [failure.reason for failure in first.failures] == ["its worker was killed by SIGKILL"]
    assert not read_run(job.folder).finished
    assert run_jobs([job], workers=1).status == 0
    for record, other in zip(read_run(job.folder).tasks, trainer.run(config), strict=True):
        assert {k: v for k, v in record.items() if k not in times} == {k: v for k, v in other.items() if k not in times}


def test_stopped_while_its_workers_are_starting(tmp_path):
    jobs, events = [sample_job(tmp_path, f"job{i}", fate="wait") for i in range(3)], []
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()  # a process needs more to import torch
    outcome = run_jobs(jobs, workers=2, on_event=events.append, run=sample_run)
    assert outcome.interrupted and not outcome.failures and not outcome.finished
    # Of both, or of the one that was started; before the run began, or at its first look.
    assert names(events, Halted) and set(names(events, Halted)) == set(names(events, Event))
    assert not jobs[2].folder.exists()


PROGRAM = """
import sys
from pathlib import Path
from run_samples import sample_job, sample_run
from spectral_ops.continual.progress import run_shown
jobs = [sample_job(Path(sys.argv[1]), f"job{i}", fate="wait") for i in range(3)]
sys.exit(run_shown("compare", jobs, 2, sample_run).status)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_after_ctrl_c_or_the_parents_death(tmp_path, sent):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": path},
        # A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    begun = [tmp_path / f"job{i}" / "seed-0" for i in range(2)]
    give_up = time.monotonic() + 60
    while not all((folder / "calls").exists() for folder in begun):
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.05)
    pids = [int((folder / "calls").read_text()) for folder in begun]
    # From a terminal Ctrl-C reaches the whole group; a kill reaches the parent alone.
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.kill()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if sent == signal.SIGINT else -9), error
    while any(_is_alive(pid) for pid in pids):  # orphans of a killed parent end a moment later
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert all((folder / "checkpoint.pt").exists() for folder in begun)  # in both cases: stopped, not killed
    assert not (tmp_path / "job2").exists() and "Traceback" not in error
    if sent == signal.SIGINT:
        assert "job0 seed 0 stopped; its checkpoint is in" in error


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_that_cannot_begin_is_said_to_be_such(tmp_path, capfd):
    # It is found in the parent, and no module of that name is there for a child to import it from.
    lost = type(sys)("lost_module")
    exec("def run(*args, **kwargs): pass", lost.__dict__)
    sys.modules["lost_module"] = lost
    try:
        outcome = run_jobs([sample_job(tmp_path, "job")], workers=2, run=lost.run)
    finally:
        del sys.modules["lost_module"]
    assert outcome.failures[0].reason == "its worker ended with exit code 1 before the run began"
    assert "lost_module" in capfd.readouterr().err


def test_shown_without_a_terminal_is_a_line_for_each_run_and_all_failures_at_the_end(tmp_path, capsys):
    jobs = [sample_job(tmp_path, "good", tasks=3), sample_job(tmp_path, "bad", fate="raise")]
    assert run_shown("compare", jobs, 1, sample_run).status == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[1/2] good seed 0 finished: accuracy 0.860 on the last task, 0.880 over all",
        f"[2/2] bad seed 0 failed: ValueError: no good: bad; see {jobs[1].log}",
        "compare: expected 2 runs to finish, got 1 that failed:",
        f"  bad seed 0: ValueError: no good: bad; see {jobs[1].log}",
        "Mend the cause and give the same command again: what is finished is not run again.",
    ]


def test_shown_in_a_terminal_is_a_bar_for_each_worker_and_one_for_all(tmp_path, monkeypatch, capsys):
    jobs = [sample_job(tmp_path, name, seed, tasks=4) for name, seed in (("none", 1), ("l2", 2), ("bad", 3))]
    sample_run(jobs[0].config, jobs[0].folder, resume=True, progress=lambda *_: None, stop=threading.Event())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with shown("compare", jobs, 2) as bars:
        assert len(bars.bars) == 2 and bars.total.total == 3 * 4 * 10
        bars(Started(0, jobs[0]))  # it was finished before: no steps that the rate would count
        bars(Finished(0, jobs[0]))
        assert bars.total.n == bars.total.initial == 40 and bars.bars[0].n == 40
        assert bars.bars[0].desc.strip() == "none seed 1" and bars.bars[0].postfix == "accuracy 0.850"
        bars(Started(1, jobs[1]))
        bars(Advanced(1, jobs[1], 1, 5))
        assert bars.bars[1].n == 15 and bars.total.n == 55 and bars.bars[1].postfix == ""
        bars(Failed(0, jobs[2], "ValueError: boom"))
        assert bars.total.postfix == "2 of 3 runs"
    assert "bad seed 3 failed: ValueError: boom; what it wrote is above" in capsys.readouterr().err


def test_outcome_of_an_interrupt_after_everything_was_done_is_success(tmp_path):
    jobs = [sample_job(tmp_path, "only")]
    send = lambda event: isinstance(event, Finished) and os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    assert run_jobs(jobs, workers=1, on_event=send, run=sample_run).status == 0
    assert Outcome().status == 0 and isinstance(jobs[0], Job)
