"""Many seeds at once: small networks that differ in their seed alone, trained in one process by shared steps."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from spectral_ops.continual.config import RunConfig, check_types
from spectral_ops.continual.ensemble.ensemble import Ensemble
from spectral_ops.continual.ensemble.groups import runs_at_once
from spectral_ops.continual.ensemble.points import common_states
from spectral_ops.continual.journal import Journal
from spectral_ops.continual.lock import locked
from spectral_ops.continual.run_folder import Record, check_folder, plain, read_run
from spectral_ops.continual.steps import Progress, Stopped
from spectral_ops.continual.trainer import Trainer, check

# Measured: docs/performance.md, "The trainer".

__all__ = ["run_together"]

AT_ONCE = "at_once"  # in the header of a log: runs of a group when this one began


def run_together(
    configs: Sequence[RunConfig],
    folders: Sequence[str | os.PathLike[str]] | None = None,
    *,
    at_once: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> list[list[Record]]:
    """Trains networks that differ in their seed alone; of each the records of its tasks, as `run` returns them.

    Equivalent to

        [run(config, folder) for config, folder in zip(configs, folders)]

    up to rounding: streams, initial weights and batches are the same bits, but products of several networks sum in
    another order, and Adam turns what that does to a gradient near 0 into a difference of up to the learning rate. A
    step is one forward and backward pass, one optimizer step and one penalty for several of them; on a CPU for as many
    as stay in its cache, one group after the other. MLPs are faster by it, convolutions are not.

    Every folder is that of a single run, which `run` and `train --resume` can go on with; the header of its log has
    "together", the number of runs in its group, and seconds of a step are the shared ones divided by it. Together
    again, with the same runs, they go on after a crash at any moment with the same bits on a CPU. Those that are
    finished are read, not run.

    Args:
        folders: one for each configuration, made if need be; None: nothing is written.
        at_once: runs of a group, in the order of configs; None: as many as when they began, or what the cache holds;
            on CUDA all.
        resume: go on with unfinished runs of the same configurations in the folders.
        progress: called with (task, step) several times a second, group by group.
        stop: once set, checkpoints are written and Stopped is raised.

    Raises:
        ValueError: no configuration, or several that differ in more than the seed; a model with BatchNorm, or a method
            that cannot act on a stack of networks; a group's checkpoints of different points; what `run` raises.
        TypeError, OSError, Stopped: as `run` does.

    Example:
        runs = [RunConfig(data="digits", seed=seed, tasks=3, samples=200, steps=100) for seed in range(10)]
        records = run_together(runs, [f"out/seed-{config.seed}" for config in runs])
    """
    _check_together(configs, folders, at_once)
    paths = None if folders is None else [Path(folder) for folder in folders]
    results: dict[int, list[Record]] = {}
    for i, config in enumerate(configs):
        check(config)
        if paths is not None and check_folder(paths[i], config, resume=resume):
            there = read_run(paths[i])
            if there.finished:
                results[i] = there.tasks
            else:
                at_once = at_once or there.header.get(AT_ONCE)  # whatever the cache of this processor
    if len(results) < len(configs):
        threads = torch.get_num_threads()
        torch.set_num_threads(configs[0].threads)  # before anything is summed
        try:
            with torch.random.fork_rng(devices=[]):
                _run_groups(configs, paths, at_once, results, progress or (lambda *_: None), stop or threading.Event())
        finally:
            torch.set_num_threads(threads)
    return [results[i] for i in range(len(configs))]


def _run_groups(
    configs: Sequence[RunConfig],
    folders: Sequence[Path] | None,
    at_once: int | None,
    results: dict[int, list[Record]],
    progress: Progress,
    stop: threading.Event,
) -> None:
    """All runs without a result: adds theirs."""
    begun = min(i for i in range(len(configs)) if i not in results)
    first = Trainer(configs[begun])
    size = at_once or _group_size(first, len(configs))
    for start in range(0, len(configs), size):
        # Groups are of all runs, finished or not: after a crash they are the same.
        group = [i for i in range(len(configs))[start : start + size] if i not in results]
        if not group:
            continue
        if group[0] != begun and stop.is_set():
            raise Stopped
        ensemble = Ensemble([first if i == begun else Trainer(configs[i]) for i in group])
        records = _run(ensemble, [] if folders is None else [folders[i] for i in group], size, progress, stop)
        results |= dict(zip(group, records, strict=True))


def _group_size(first: Trainer, count: int) -> int:
    if first.device.type != "cpu":
        return count
    return runs_at_once(sum(p.nbytes for p in first.model.parameters()), first.config.threads)


def _run(
    ensemble: Ensemble, folders: Sequence[Path], at_once: int, progress: Progress, stop: threading.Event
) -> list[list[Record]]:
    """Without folders nothing is written."""
    count = len(ensemble.trainers)
    records: list[list[Record]] = [[] for _ in range(count)]
    sharing = {"together": count, AT_ONCE: at_once}
    with contextlib.ExitStack() as opened:
        for folder, trainer in zip(folders, ensemble.trainers[: len(folders)], strict=True):
            opened.enter_context(locked(folder, stop))
            check_folder(folder, trainer.config, resume=True)  # again: what had it until now may have written to it
        states = common_states(folders)
        journals = [
            opened.enter_context(contextlib.closing(Journal(folder, trainer.config, state, **sharing)))
            for folder, trainer, state in zip(folders, ensemble.trainers[: len(folders)], states, strict=True)
        ]
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            contents = ensemble.state_dicts() if journals else []
            for journal, content in zip(journals, contents, strict=True):
                journal.save(content)
            saved = time.monotonic()

        def save_if_old() -> None:
            if stop.is_set() or time.monotonic() - saved > ensemble.config.checkpoint_seconds:
                save()

        begun = [state["trainer"] for state in states if state is not None]
        if len(begun) == count:
            ensemble.load_state_dicts(begun)
            records = [read_run(folder).tasks for folder in folders]
        else:
            save()  # of all, before the first step: from now on no folder is more than one save ahead of another
        while ensemble.task < ensemble.config.tasks:
            new = ensemble.train_task(save_if_old, progress, stop.is_set)
            for i in range(count):
                records[i].append(plain(new[i]))
            for i, journal in enumerate(journals):
                journal.log.write(records[i][-1])
            save()
            if stop.is_set() and ensemble.task < ensemble.config.tasks:
                raise Stopped
        for i, journal in enumerate(journals):
            journal.end(records[i])
    return records


def _check_together(
    configs: Sequence[RunConfig], folders: Sequence[str | os.PathLike[str]] | None, at_once: int | None
) -> None:
    if not isinstance(configs, Sequence) or isinstance(configs, str):
        got = "one RunConfig" if isinstance(configs, RunConfig) else f"{configs!r} of type {type(configs).__name__}"
        remedy = "Write [config, ...], or run(config) for one"
        raise TypeError(f"run_together: expected configs to be a list of RunConfig, got {got}. {remedy}.")
    if folders is not None and (not isinstance(folders, Sequence) or isinstance(folders, str)):
        got = f"{folders!r} of type {type(folders).__name__}"
        remedy = "Write [folder, ...], one for each configuration"
        raise TypeError(f"run_together: expected folders to be a list of paths or None, got {got}. {remedy}.")
    for config in configs:
        check_types(config, "run_together")
    if not configs:
        raise ValueError("run_together: expected at least one configuration, got none. Give one for each seed.")
    for field in fields(RunConfig):
        values = [getattr(config, field.name) for config in configs]
        if field.name != "seed" and any(value != values[0] for value in values):
            other = next(value for value in values if value != values[0])
            raise ValueError(
                f"run_together: expected configurations that differ in their seed alone, got {field.name} "
                f"{values[0]!r} and {other!r}. Run these apart."
            )
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        remedy = "Leave it out for what the cache holds"
        raise ValueError(f"run_together: expected at_once to be an integer >= 1, got {at_once!r}. {remedy}.")
    seeds = [config.seed for config in configs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"run_together: expected seeds that differ, got {seeds}. Give each seed once.")
    if folders is not None and (len(folders) != len(configs) or len({*map(Path, folders)}) < len(folders)):
        raise ValueError(
            f"run_together: expected a folder for each of the {len(configs)} configurations, got "
            f"{', '.join(map(str, folders))}. Name as many, all different."
        )
