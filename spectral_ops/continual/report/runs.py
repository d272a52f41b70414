"""Runs found in folders; what cannot be read is named and left out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from spectral_ops.continual.run_folder import LOG, Run, read_run


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """All runs in the folders and below them, each once, and what is wrong with those that could not be read.

    Args:
        paths: folders of runs, or of folders with runs, such as a sweep's.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no folder at all, or one without a run in it and below it.
    """
    logs: dict[Path, Path] = {}  # by where it really lies: a folder may be named twice
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"report: expected {path} to be a folder, got none. Name folders of runs.")
        found = sorted(path.rglob(LOG))
        if not found:
            raise ValueError(
                f"report: expected a run in {path} or below it, got no {LOG}. Name folders that `train` or `sweep` "
                "wrote."
            )
        for log in found:
            logs.setdefault(log.resolve(), log)
    if not logs:
        raise ValueError("report: expected at least one folder, got none. Name folders of runs.")
    runs, problems = [], []
    for log in logs.values():
        try:
            runs.append(_checked(read_run(log.parent), log))
        except (ValueError, OSError) as error:
            problems.append(str(error))
        except (TypeError, KeyError, AttributeError) as error:  # JSON, but not of records
            problems.append(
                f"report: expected {log} to hold the records of a run, got {type(error).__name__}: {error}. Restore "
                "the file, or leave the folder out."
            )
    return runs, problems


def _checked(run: Run, log: Path) -> Run:
    """The run, if it holds what a report is made of."""
    config = run.header.get("config")
    if not isinstance(config, dict) or not {"method", "seed"} <= config.keys():
        raise ValueError(
            f"report: expected the header of {log} to hold the configuration of a run, got {str(config)[:60]}. "
            "Restore the file, or leave the folder out."
        )
    for number, record in enumerate(run.tasks):
        if record.get("task") != number or not isinstance(record.get("accuracy"), float | int):
            raise ValueError(
                f"report: expected task {number} of {log} with its accuracy, got {str(record)[:60]}. Restore the file, "
                "or leave the folder out."
            )
    return run
