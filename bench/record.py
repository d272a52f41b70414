"""The results file: what a run measured, on what, with which versions; written, read and checked here."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.case import Settings
from spectral_ops import backends

FORMAT = "spectral_ops benchmark"
VERSION = 2
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("spectral_ops", "torch", "triton", "numpy")

# What a reader of the file relies on: key -> type. A number may be an int.
TOP = {
    "format": str, "version": int, "date": str, "quick": bool, "commit": (str, type(None)),
    "dirty": (bool, type(None)), "device": dict, "versions": dict, "load": dict, "copy_gb_per_s": float, "cases": list,
    "left_out": dict,
}
DEVICE = {"type": str, "name": str, "slug": str, "cores": int, "threads": int}
CASE = {
    "name": str, "title": str, "bytes": int, "parameters": int, "rounds": int, "warmup": int, "cold": bool,
    "base": str, "dtype": str, "notes": list, "left_out": dict, "rows": list,
}
ROW = {
    "name": str, "seconds": dict, "gb_per_s": float, "to_floor": dict, "to_base": dict, "over_base_seconds": dict,
    "calls": int, "error": (float, type(None)), "launches": (int, type(None)), "host_seconds": (float, type(None)),
    "peak_bytes": (int, type(None)), "note": str,
}
SUMMARY = {"median": float, "q25": float, "q75": float, "min": float, "max": float}
SUMMARIES = ("seconds", "to_floor", "to_base", "over_base_seconds")

Results = dict[str, Any]


def gather(
    settings: Settings,
    cases: list[dict[str, Any]],
    load_before: float | None,
    copy_rate: float,
    left_out: dict[str, str] | None = None,
) -> Results:
    """The whole record of a run whose cases are measured; left_out: why others are not, by name."""
    commit, dirty = describe_commit()
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": settings.quick,
        "commit": commit,
        "dirty": dirty,
        "device": settings.device.describe(),
        "versions": describe_versions(),
        # Processes that want a core, ours included: well above the threads used, the figures are of a busy machine.
        "load": {"before": load_before, "after": load_average()},
        "copy_gb_per_s": copy_rate * 1e-9,
        "cases": cases,
        "left_out": left_out or {},
    }


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe_versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    if backends.available()["native"] is None:
        found["native"] = {"isa": backends.native().isa(), **backends.native().built_with()}
    return found


def describe_commit(root: Path = ROOT) -> tuple[str | None, bool | None]:
    """The commit, and whether anything but results differs from it; (None, None) outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".", ":!bench/results") != ""
    except (OSError, subprocess.CalledProcessError):
        return None, None


def file_stem(results: Results) -> str:
    """<device>-<date>, and -quick where there is nothing to read but that it ran."""
    quick = "-quick" if results["quick"] else ""
    return f"{results['device']['slug']}-{results['date'][:10]}{quick}"


def write(results: Results, path: Path) -> None:
    check(results, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read(path: str | os.PathLike[str]) -> Results:
    """A checked results file.

    Raises:
        ValueError: not a results file of this version.
    """
    try:
        results = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"read: expected {path} to be JSON, got {error}. Measure again: python -m bench.") from error
    results = upgraded(results)
    check(results, str(path))
    return results


def upgraded(results: Any) -> Any:
    """A file of version 1, which knew float32 alone and no launches, as one of this version; others as they are."""
    if not isinstance(results, dict) or results.get("format") != FORMAT or results.get("version") != 1:
        return results
    new = copy.deepcopy(results) | {"version": VERSION, "left_out": {}}
    for case in new.get("cases", []):
        case |= {"name": f"{case['name']}/float32", "dtype": "float32", "left_out": {}}
        for row in case["rows"]:
            row |= {"launches": None, "host_seconds": None}
    return new


def check(results: Any, where: str) -> None:
    """Every key that tables, pictures and comparisons rely on, with its type, and finite times.

    Raises:
        ValueError: naming what is missing or of another type.
    """
    if not isinstance(results, dict) or results.get("format") != FORMAT or results.get("version") != VERSION:
        raise ValueError(
            f"check: expected {where} to be a {FORMAT} file of version {VERSION}, got another. "
            "Write one with python -m bench; pytest-benchmark's own JSON is another format."
        )
    _check_keys(results, TOP, where)
    _check_keys(results["device"], DEVICE, f"{where}: device")
    for case in results["cases"]:
        _check_keys(case, CASE, f"{where}: a case")
        for row in case["rows"]:
            at = f"{where}: {case['name']}"
            _check_keys(row, ROW, at)
            for key in SUMMARIES:
                _check_keys(row[key], SUMMARY, f"{at}, {row['name']}, {key}")


def _check_keys(found: Any, wanted: dict[str, Any], where: str) -> None:
    for key, kind in wanted.items():
        value: Any = found.get(key, _Missing) if isinstance(found, dict) else _Missing
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wants_number = float in kinds and isinstance(value, (int, float)) and not isinstance(value, bool)
        good = math.isfinite(value) if wants_number else isinstance(value, kinds)
        if not good:
            got = "nothing" if value is _Missing else repr(value)[:40]
            names = " or ".join(k.__name__ for k in kinds)
            raise ValueError(f"check: expected {where} to hold {key} ({names}), got {got}. Measure it again.")


class _Missing:
    """What a key holds that is not there."""
