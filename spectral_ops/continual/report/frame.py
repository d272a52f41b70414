"""All that runs logged as one pandas DataFrame."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spectral_ops.continual.report.groups import Group
from spectral_ops.continual.run_folder import Record

SUFFIXES = {".csv": ("pandas",), ".parquet": ("pandas", "pyarrow")}  # and what writing such a file takes


def to_dataframe(groups: Iterable[Group]) -> Any:
    """A row for every task of every run.

    Columns: folder, group (its label), seed, finished, the settings as "config.lr", then the log's line, with
    "sigma.layers.0.weight" for what it says of a layer. Empty where a run has no such thing.

    Raises:
        RuntimeError: pandas is missing.
    """
    rows = []
    for group in groups:
        settings = {f"config.{name}": _plain(value) for name, value in group.settings.items()}
        for run in group.runs:
            of_run = {"folder": str(run.folder), "group": group.label, "seed": run.config["seed"]}
            rows += [of_run | {"finished": run.finished} | settings | _flat(record) for record in run.tasks]
    return _require("pandas").DataFrame(rows)


def check_file(path: Path) -> None:
    """Refuses a file that `write_dataframe` could not write.

    Raises:
        ValueError: another suffix than .csv or .parquet.
        RuntimeError: a package is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"report: expected dataframe to end with {' or '.join(SUFFIXES)}, got {str(path)!r}. Change --dataframe."
        )
    for package in SUFFIXES[path.suffix]:
        _require(package)


def write_dataframe(path: Path, groups: Iterable[Group]) -> None:
    """`to_dataframe(groups)` as CSV or Parquet, by the suffix."""
    check_file(path)
    frame = to_dataframe(groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False, engine="pyarrow")


def _flat(record: Record) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out |= {f"{name}.{layer}": item for layer, item in value.items()}
        elif name != "kind":
            out[name] = value
    return out


def _plain(value: Any) -> Any:
    """A list as text: a cell holds one value."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _require(package: str) -> Any:
    # No extra of ours brings them, so the remedy of `optional.require` would not help.
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(
            f"report: expected {package} to be importable for --dataframe, got {type(error).__name__}: {error}. "
            f"Install it with: pip install {package}."
        ) from error
