"""What is seen of jobs while they run: a line for each worker in a terminal, a line for each finished run elsewhere."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spectral_ops.continual.checkpoint import CURRENT
from spectral_ops.continual.jobs import Advanced, Event, Failed, Finished, Halted, Job, Outcome, Started, count_runs
from spectral_ops.continual.optional import require
from spectral_ops.continual.run_folder import LOG, Record, read_run
from spectral_ops.continual.trainer import run
from spectral_ops.continual.workers import RunFunction, run_jobs

_TITLE = 40  # characters of a run's name in front of its bar


def run_shown(operation: str, jobs: Sequence[Job], workers: int, run: RunFunction = run) -> Outcome:
    """`run_watched`, and every failure at the end."""
    outcome = run_watched(operation, jobs, workers, run)
    tell_failures(operation, outcome, count_runs(jobs))
    return outcome


def run_watched(operation: str, jobs: Sequence[Job], workers: int, run: RunFunction = run) -> Outcome:
    """`run_jobs` with its progress on standard error.

    Args:
        operation: what errors begin with, the name of the command.
    """
    with shown(operation, jobs, workers) as on_event:
        return run_jobs(jobs, workers=workers, on_event=on_event, run=run)


def tell_failures(operation: str, outcome: Outcome, count: int) -> None:
    """Every failure on standard error, nothing where there is none; `count` runs were to finish."""
    if outcome.failures:
        sys.stdout.flush()  # what was said before comes before it in a file of both
        print(_failures_text(operation, outcome, count), file=sys.stderr)


def _failures_text(operation: str, outcome: Outcome, count: int) -> str:
    failed = count_runs(failure.job for failure in outcome.failures)
    lines = [f"{operation}: expected {count} runs to finish, got {failed} that failed:"]
    lines += [f"  {failure.job.name}: {_cause(failure)}" for failure in outcome.failures]
    return "\n".join([*lines, "Mend the cause and give the same command again: what is finished is not run again."])


@contextlib.contextmanager
def shown(operation: str, jobs: Sequence[Job], workers: int) -> Iterator[Callable[[Event], None]]:
    """A function for the events of `run_jobs`, which shows them for as long as the context lasts."""
    if not sys.stderr.isatty():
        yield _Lines(count_runs(jobs))
        return
    bars = _Bars(require("tqdm", operation).tqdm, jobs, min(workers, len(jobs)), operation)
    try:
        yield bars
    finally:
        bars.close()


class _Lines:
    """A line for each run that has ended."""

    def __init__(self, count: int):
        self.count, self.ended = count, 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Finished | Failed | Halted):
            for line in _ending(event):
                self.ended += 1
                print(f"[{self.ended}/{self.count}] {line}", file=sys.stderr, flush=True)


class _Bars:
    """A bar of steps for each worker, and one for all runs below them."""

    def __init__(self, tqdm: Any, jobs: Sequence[Job], workers: int, operation: str):
        self.count, self.ended = count_runs(jobs), 0
        self.tasks = [0] * workers  # that each worker's run had done when its accuracy was last read
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        self.bars = [
            tqdm(total=1, desc="starting", position=place, bar_format=layout, leave=False, file=sys.stderr)
            for place in range(workers)
        ]
        total = sum(job.steps for job in jobs)
        self.total = tqdm(total=total, position=workers, desc=operation, unit="step", unit_scale=True, file=sys.stderr)
        self._count()

    def __call__(self, event: Event) -> None:
        bar = self.bars[event.worker]
        if isinstance(event, Started):
            bar.reset(total=event.job.steps)
            bar.set_description_str(event.job.name[:_TITLE].ljust(_TITLE), refresh=False)
            self._accuracy(event)
            self._skip(bar, len(event.job.runs) * self.tasks[event.worker] * event.job.config.steps)
        elif isinstance(event, Advanced):
            self._to(bar, len(event.job.runs) * (event.task * event.job.config.steps + event.step))
            if event.step > 0 and event.task != self.tasks[event.worker]:  # at step 0 the log may not have it yet
                self._accuracy(event)
        else:
            self._end(bar, event)

    def close(self) -> None:
        for bar in [*self.bars, self.total]:
            bar.close()

    def _end(self, bar: Any, event: Event) -> None:
        self.ended += len(event.job.runs)
        if isinstance(event, Finished):
            self._to(bar, event.job.steps)
        else:
            for line in _ending(event):
                self.total.write(line, file=sys.stderr)
        self._count()

    def _to(self, bar: Any, step: int) -> None:
        self.total.update(step - bar.n)
        bar.update(step - bar.n)

    def _skip(self, bar: Any, steps: int) -> None:
        """Steps of an earlier time, which the rate and what it foretells must not count."""
        bar.update(steps)
        for name in ("n", "initial", "last_print_n"):
            setattr(self.total, name, getattr(self.total, name) + steps)

    def _count(self) -> None:
        self.total.set_postfix_str(f"{self.ended} of {self.count} runs")

    def _accuracy(self, event: Event) -> None:
        tasks, bar = _tasks(event.job.folder), self.bars[event.worker]
        self.tasks[event.worker] = len(tasks)
        bar.set_postfix_str(f"accuracy {tasks[-1]['accuracy']:.3f}" if tasks else "")


def _ending(event: Event) -> list[str]:
    """A line for each of the job's runs."""
    return [_ending_of(run, event) for run in event.job.runs]


def _ending_of(run: Job, event: Event) -> str:
    if isinstance(event, Failed):
        return f"{run.name} failed: {_cause(event)}"
    if isinstance(event, Halted):
        there = (run.folder / CURRENT).exists()
        return f"{run.name} stopped; " + (f"its checkpoint is in {run.folder}" if there else "it has no checkpoint yet")
    tasks = _tasks(run.folder)
    if not tasks:
        return f"{run.name} finished"
    accuracies = [task["accuracy"] for task in tasks]
    return (
        f"{run.name} finished: accuracy {accuracies[-1]:.3f} on the last task, "
        f"{statistics.fmean(accuracies):.3f} over all"
    )


def _cause(failure: Failed) -> str:
    """A worker that died before the run began has no log, and has written where its parent writes."""
    where = f"see {failure.job.log}" if failure.job.log.exists() else "what it wrote is above"
    return f"{failure.reason}; {where}"


def _tasks(folder: Path) -> list[Record]:
    """The tasks that the log of a run holds so far."""
    if not (folder / LOG).exists():  # it has only begun
        return []
    with contextlib.suppress(ValueError):  # its header is being written, or the run will refuse the log with its reason
        return read_run(folder).tasks
    return []
