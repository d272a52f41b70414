"""Logs of runs that never were, with numbers that a test can check by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.report.groups import Group, group_runs
from spectral_ops.continual.report.runs import find_runs
from spectral_ops.continual.run_folder import to_json

LAYERS = ("layers.0.incoming", "layers.1.incoming")


def task_record(task: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """The line of a task; what is given counts before what is made up."""
    of_weights = {f"{layer}.weight": 1.0 + task for layer in LAYERS}
    record = {
        "kind": "task",
        "task": task,
        "accuracy": accuracy,
        "online_accuracy": accuracy / 2,
        "held_out_accuracy": None,
        "loss": 1 - accuracy,
        "online_loss": 1.0,
        "held_out_loss": None,
        "sigma": of_weights,
        "effective_rank": {name: 9.0 - 0.1 * task for name in of_weights},
        "stable_rank": of_weights,
        "weight_norm": of_weights,
        "gradient_norm": of_weights,
        "dormant": {layer: 0.01 * task for layer in LAYERS},
        "duplicate": {layer: 0.0 for layer in LAYERS},
        "feature_rank": {layer: 20.0 - task for layer in LAYERS},
        "gradient_diversity": 0.5,
        "penalty_ratio": None,
        "step_seconds": 2e-4,
        "method_seconds": 5e-5,
    }
    return record | more


def write_run(
    folder: Path,
    accuracies: Sequence[float],
    *,
    finished: bool = True,
    more: Sequence[dict[str, Any]] | dict[str, Any] = (),
    **config: Any,
) -> Path:
    """A run with a task for each accuracy; `more` goes into the records, into all of them or one each."""
    planned = {"tasks": len(accuracies) if finished else 2 * len(accuracies) + 1}
    header = {"kind": "header", "config": to_json(RunConfig(**(planned | config))), "versions": {}, "commit": None}
    several = [more] * len(accuracies) if isinstance(more, dict) else [*more, *[{}] * (len(accuracies) - len(more))]
    records = [task_record(task, a, **m) for task, (a, m) in enumerate(zip(accuracies, several, strict=True))]
    end = [{"kind": "end", "tasks": len(accuracies), "seconds": 1.0}] if finished else []
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *records, *end]))
    return folder


NONE = {0: [0.5, 0.4, 0.3, 0.2, 0.1], 1: [0.6, 0.5, 0.4, 0.3, 0.2], 2: [0.5, 0.5, 0.5, 0.5, 0.5]}
SPECTRAL = {0: [0.9, 0.9, 0.8, 0.8, 0.7], 1: [0.8, 0.8, 0.8, 0.8, 0.8], 2: [0.9, 0.8, 0.7, 0.6, 0.4]}


@pytest.fixture
def logs(tmp_path):
    """Three seeds without a method and with one."""
    for seed in NONE:
        write_run(tmp_path / f"none-{seed}", NONE[seed], seed=seed)
        write_run(tmp_path / f"spectral-{seed}", SPECTRAL[seed], seed=seed, method="spectral", strength=1e-3)
    return tmp_path


def groups_of(folder: Path) -> dict[str, Group]:
    runs, problems = find_runs([folder])
    assert not problems
    groups, problems = group_runs(runs)
    assert not problems
    return {group.label: group for group in groups}


def cells(table: str) -> list[dict[str, str]]:
    head, rule, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    assert re.fullmatch("-+", rule[0]) and all(re.fullmatch("-+:", cell) for cell in rule[1:])
    return [dict(zip(head, row, strict=True)) for row in rows]
