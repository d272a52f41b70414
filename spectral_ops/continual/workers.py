"""Runs over several processes: one queue of jobs, workers that may die, and an end that leaves checkpoints.

Workers are spawned (fork is not safe once torch has started threads) and live as long as there is work. Each is joined
to its parent by one pipe. Jobs and the word to stop go down, events come up, and the pipe's end is how either side
learns of the other's death: the parent then starts another worker, the worker stops its run between two steps.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from spectral_ops.continual.ensemble import run_together
from spectral_ops.continual.jobs import Advanced, Event, Failed, Finished, Halted, Job, Outcome, Started, count_runs
from spectral_ops.continual.steps import Stopped
from spectral_ops.continual.trainer import run

_STOP = "stop"  # what is sent down beside jobs
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 0.2  # seconds between two looks at signals and at processes
_FAREWELL = 10.0  # seconds that a process may take to end when nothing is left for it to do

RunFunction = Callable[..., Any]


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    on_event: Callable[[Event], None] = lambda event: None,
    run: RunFunction = run,
) -> Outcome:
    """Runs the jobs, those begun before from their checkpoints; a finished one is read, not run again.

    They are handed out in their order, each to the first worker that is free. Where one raises, or its worker dies
    (killed, out of memory, a crash in native code), the others go on and a new worker takes the dead one's place. The
    first SIGINT or SIGTERM stops every run between two steps, with a checkpoint; the second ends all at once, which
    leaves the checkpoints before. Should this process itself be killed, its workers stop in the same way.

    Args:
        workers: processes, each with the threads that its job's configuration names and both its outputs appended to
            worker.log in the folder of the run; 1 runs in this process, which a crash would end.
        on_event: called in this thread.
        run: called as `trainer.run(config, folder, resume=True, progress=..., stop=...)`; for workers it must be
            importable by its name. Runs by shared steps go to `run_together`.
    """
    outcome = Outcome()

    def tell(event: Event) -> None:
        if isinstance(event, Finished):
            outcome.finished.extend(event.job.runs)
        elif isinstance(event, Failed):
            outcome.failures.append(event)
        on_event(event)

    with _stop_on_signals() as stop:
        try:
            if workers == 1:
                _run_here(jobs, run, tell, stop)
            else:
                _run_in_workers(jobs, workers, run, tell, stop)
        except KeyboardInterrupt:
            stop.set()
        ended = len(outcome.finished) + count_runs(failure.job for failure in outcome.failures)
        outcome.interrupted = stop.is_set() and ended < count_runs(jobs)
    return outcome


def _run_here(jobs: Iterable[Job], run: RunFunction, tell: Callable[[Event], None], stop: threading.Event) -> None:
    for job in jobs:
        if stop.is_set():
            return
        tell(Started(0, job))
        kind, *values = _attempt(job, run, lambda *at, job=job: tell(Advanced(0, job, *at)), stop)
        tell(kind(0, job, *values))


def _run_in_workers(
    jobs: Sequence[Job], count: int, run: RunFunction, tell: Callable[[Event], None], stop: threading.Event
) -> None:
    waiting = deque(jobs)
    pool = [_Worker(number, run) for number in range(min(count, len(jobs)))]
    told = False
    try:
        while True:
            if stop.is_set() and not told:
                told = True
                for worker in pool:
                    worker.stop()
            for worker in pool:
                if worker.job is None and waiting and not stop.is_set():
                    worker.give(waiting.popleft())
            busy = [worker for worker in pool if worker.job is not None]
            if not busy:
                return
            wait([worker.connection for worker in busy], timeout=_PATIENCE)
            for worker in busy:
                for event in worker.events():
                    # Its own SIGTERM, which nobody else has been sent: unlike an interrupted run, it is missing.
                    if isinstance(event, Halted) and not stop.is_set():
                        event = Failed(event.worker, event.job, "stopped by a signal to its worker alone")
                    tell(event)
    finally:
        for worker in pool:
            worker.dismiss()
        for worker in pool:
            worker.join()


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second raises KeyboardInterrupt; further ones wait for the end of that.

    Outside of the main thread, where Python lets nobody handle signals, it is never set.
    """
    stop, count = threading.Event(), 0

    def handle(number: int, frame: object) -> None:
        nonlocal count
        count += 1
        stop.set()
        if count == 1:
            with contextlib.suppress(OSError):  # print() is not safe where it may itself have been interrupted
                os.write(2, b"\nStopping between two steps, with checkpoints; once more ends at once.\n")
        if count == 2:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Worker:
    """The parent's side of one place for a worker, whichever process fills it."""

    connection: Connection
    process: BaseProcess | None = None
    job: Job | None = None

    def __init__(self, number: int, run: RunFunction):
        self.number, self.run = number, run
        self.begun = False  # whether the process has said that it works on the job

    def give(self, job: Job) -> None:
        if self.process is None or not self.process.is_alive():
            self._start()
        self.job, self.begun = job, False
        self._send(job)

    def stop(self) -> None:
        if self.job is not None:
            self._send(_STOP)

    def events(self) -> Iterator[Event]:
        """What has come from the process; its death is the failure of its job."""
        while self.job is not None:
            try:
                if not self.connection.poll():
                    break
                kind, *values = self.connection.recv()
            except (EOFError, OSError):
                yield self._bury()
                return
            event = kind(self.number, self.job, *values)
            self.begun = True
            if isinstance(event, Finished | Failed | Halted):
                self.job = None
            if isinstance(event, Halted):  # such a process takes no further job
                self.dismiss()
                self.join()
            yield event
        # The pipe of a dead process stays open where a child of its own has inherited it.
        if self.job is not None and self.process is not None and not self.process.is_alive():
            yield self._bury()

    def dismiss(self) -> None:
        """End the process: by itself if it is idle, else at once."""
        if self.process is not None:
            if self.job is not None:
                self.process.kill()
            self.connection.close()

    def join(self) -> None:
        if self.process is not None:
            self.process.join(_FAREWELL)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.process = None

    def _start(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.run), daemon=True)
        # From a terminal, signals reach every process of it. The new one inherits them blocked until it can take them.
        resource_tracker.ensure_running()  # spawn's helper: it unblocks the signals when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process.start()
            self.process = process  # here, where a signal cannot come between
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the process's death is the end of its pipe

    def _send(self, message: Job | str) -> None:
        with contextlib.suppress(OSError):  # it has died, and `events` will see that
            self.connection.send(message)

    def _bury(self) -> Failed | Halted:
        assert self.process is not None and self.job is not None
        job, process, self.job = self.job, self.process, None
        self.connection.close()
        self.join()
        code = process.exitcode or 0
        if code == 0 and not self.begun:  # it was told to stop while it was starting
            return Halted(self.number, job)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Failed(self.number, job, f"its worker {how}" + ("" if self.begun else " before the run began"))


def _work(connection: Connection, run: RunFunction) -> None:
    """A worker's life, in its own process."""
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # whose put is safe in a signal handler
    stop = threading.Event()

    def end(*_: object) -> None:
        stop.set()
        jobs.put(None)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when
    signal.signal(signal.SIGTERM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    faulthandler.enable(2)  # the place of a segmentation fault, in the log
    threading.Thread(target=_listen, args=(connection, jobs.put, end), daemon=True).start()

    def send(kind: type[Event], *values: Any) -> None:
        try:
            connection.send((kind, *values))
        except OSError:  # the parent has died
            end()

    while not stop.is_set() and (job := jobs.get()) is not None:
        send(Started)
        with contextlib.suppress(OSError):  # the run meets the same obstacle, and says so
            _redirect(job.log)
        send(*_attempt(job, run, lambda task, step: send(Advanced, task, step), stop))
    # Every file is closed and every event sent: for the interpreter to take torch apart takes a second.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _listen(connection: Connection, take: Callable[[Job], None], end: Callable[[], None]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while (message := connection.recv()) != _STOP:
            take(message)
    end()


def _attempt(
    job: Job, run: RunFunction, progress: Callable[[int, int], None], stop: threading.Event
) -> tuple[Any, ...]:
    """The kind of event that the job ends with, and its values."""
    try:
        if job.others:
            configs, folders = [run.config for run in job.runs], [run.folder for run in job.runs]
            run_together(configs, folders, at_once=len(configs), resume=True, progress=progress, stop=stop)
        else:
            run(job.config, job.folder, resume=True, progress=progress, stop=stop)
    except Stopped:
        return (Halted,)
    except (Exception, SystemExit) as error:
        with contextlib.suppress(OSError):  # a full disk may be what failed
            job.folder.mkdir(parents=True, exist_ok=True)
            with job.log.open("a") as file:
                traceback.print_exc(file=file)
        return Failed, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return (Finished,)


def _redirect(log: Path) -> None:
    """Both outputs of this process, those of native code too, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(handle, number)
    os.close(handle)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # else lost where the process dies
