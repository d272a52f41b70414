"""What was measured of the ladder, here and in stored results, with the cost model's prediction beside every point.

Reads results files; measures nothing. Everything is plain numbers, as the results file holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import record
from bench.bench_adamw import FUSED
from bench.bench_adamw import OURS as FOLDED
from bench.bench_scale import ADDING, READING
from bench.case import FLOOR
from bench.cost_model import (
    CPU_PASS_S,
    CUDA_MEASURING_S,
    GRADIENT,
    H200_FLOPS,
    H200_MEMORY,
    H200_NETWORK,
    ITEM,
    OURS,
    TORCH,
    UTILISATION,
    VALUE,
    Memory,
    added_seconds,
    all_reduce_seconds,
    collective_bytes,
    held_bytes,
    memory_from_floors,
    moved_bytes,
    pass_seconds,
    step_seconds,
    training_seconds,
)
from bench.vit_shapes import LADDER, VITS

RESULTS = record.ROOT / "bench" / "results"
STORED_DEVICE = "nvidia-h200"
# Of a case "op/model/dtype": what its rows are.
ROWS = {
    "scale/value": {READING: VALUE},
    "spectral_penalty/value": {READING: VALUE},
    "scale/with gradient": {ADDING: GRADIENT},
    "accumulate_grad": {ADDING: GRADIENT},
    "scale/SpectralAdamW": {FOLDED: OURS, FUSED: TORCH},
    "adamw": {FOLDED: OURS, FUSED: TORCH},
}
# Measured on the H200 as docs/performance.md has it, without a results file: (model, dtype, op) -> seconds.
NOTED_SOURCE, NOTED_DATE = "docs/performance.md", "2026-11-28"
NOTED = {("vit-s", "float32", GRADIENT): 100e-6, ("vit-s", "bfloat16", GRADIENT): 68e-6}

Point = dict[str, Any]


def measured_points(results: record.Results, source: str) -> list[Point]:
    """Every row of a results file that the ladder knows; on CUDA those replayed from a graph."""
    points = []
    for case in results["cases"]:
        op, model, dtype = case["name"].rsplit("/", 2)
        if op not in ROWS or model not in VITS:
            continue
        rows = {row["name"]: row for row in case["rows"]}
        for name, what in ROWS[op].items():
            row = rows.get(f"{name}, graph") or (rows.get(name) if results["device"]["type"] == "cpu" else None)
            if row is None:
                continue
            moved = moved_bytes(what, case["parameters"], dtype)
            points.append(
                {
                    "model": model, "dtype": dtype, "op": what, "parameters": case["parameters"], "bytes": moved,
                    "seconds": row["seconds"]["median"], "gb_per_s": moved / row["seconds"]["median"] * 1e-9,
                    "floor_bytes": case["bytes"], "floor_s": rows[FLOOR]["seconds"]["median"],
                    "to_floor": row["to_floor"]["median"],
                    "peak_bytes": row["peak_bytes"], "held_bytes": held_bytes(what, case["parameters"], dtype),
                    "source": source, "date": results["date"][:10],
                }
            )  # fmt: skip
    return points


def stored_points(folder: Path = RESULTS) -> list[Point]:
    """What results files of the H200 hold, the newest of each kind, and what the documentation alone knows."""
    newest: dict[tuple[str, str, str], Point] = {}
    files = sorted(((record.read(path), path.stem) for path in folder.glob(f"{STORED_DEVICE}-*.json")), key=_date)
    for results, stem in files:
        if not results["quick"]:
            newest |= {(p["model"], p["dtype"], p["op"]): p for p in measured_points(results, stem)}
    for (model, dtype, op), seconds in NOTED.items():
        before = newest.get((model, dtype, op))
        if before is not None and before["date"] < NOTED_DATE:
            moved = before["bytes"]
            newest[model, dtype, op] = before | {
                "seconds": seconds, "gb_per_s": moved / seconds * 1e-9, "to_floor": None, "floor_s": None,
                "peak_bytes": None, "source": NOTED_SOURCE, "date": NOTED_DATE,
            }  # fmt: skip
    return sorted(newest.values(), key=_place)


def _date(file: tuple[record.Results, str]) -> str:
    date: str = file[0]["date"]
    return date


def _place(point: Point) -> tuple[int, int, int]:
    ops = (VALUE, GRADIENT, OURS, TORCH)
    return list(ITEM).index(point["dtype"]), list(VITS).index(point["model"]), ops.index(point["op"])


def memory_of(points: Iterable[Point], kind: str) -> tuple[Memory | None, str]:
    """Rates from the floors of the largest model that has all three, and a line that says so; None where none has."""
    floors: dict[tuple[int, str, str], dict[str, tuple[float, float]]] = {}
    for point in points:
        # bfloat16's floors are shorter, and what is added to them weighs more: float32 where there is a choice.
        key = (ITEM[point["dtype"]] * point["parameters"], point["model"], point["dtype"])
        if point["op"] != TORCH and point["floor_s"] is not None:
            floors.setdefault(key, {})[point["op"]] = (point["floor_bytes"], point["floor_s"])
    complete = {key: found for key, found in floors.items() if len(found) == 3}
    if not complete:
        return None, ""
    _, model, dtype = largest = max(complete)
    return rates_of(complete[largest], kind), f"the floors of {model}, {dtype}"


def rates_of(floors: Mapping[str, tuple[float, float]], kind: str) -> Memory | None:
    """Of a CPU, or a CUDA device; None where a floor is too short to tell."""
    on_cuda = kind == "cuda"
    try:
        return memory_from_floors(
            floors,
            launch_s=H200_MEMORY.launch_s if on_cuda else 0.0,
            pass_s=H200_MEMORY.pass_s if on_cuda else CPU_PASS_S,
            measuring_s=CUDA_MEASURING_S if on_cuda else 0.0,
        )
    except ValueError:
        return None


def with_prediction(point: Point, memory: Memory | None, kind: str) -> Point:
    """The point and what the model says of it, measuring included: by the rates given, and by that of its own floor.

    Errors are in units of the time measured. On a shared machine memory is at one time half as fast as at another: the
    floor of the same rounds had the same, and what is left of the error is the model's.
    """
    what = OURS if point["op"] == TORCH else point["op"]
    own = None if point["floor_s"] is None else rates_of({what: (point["floor_bytes"], point["floor_s"])}, kind)
    out = dict(point)
    for key, rates in (("predicted", memory), ("own_predicted", own)):
        seconds = None
        if rates is not None:
            seconds = pass_seconds(point["op"], point["parameters"], point["dtype"], rates)
            seconds += CUDA_MEASURING_S if kind == "cuda" else 0.0
        out[f"{key}_s"] = seconds
        out[f"{key}_error"] = None if seconds is None else seconds / point["seconds"] - 1
    return out


def predictions(models: Sequence[str], dtypes: Sequence[str], ranks: Sequence[int], images: int) -> list[Point]:
    """Of H200s alone: every op on every model, sharded over every number of ranks, and shares of a training step."""
    out = []
    for dtype in dtypes:
        for model in models:
            shape, training = VITS[model], training_seconds(VITS[model], images)
            for count in ranks:
                place = (shape, dtype, H200_MEMORY, count, H200_NETWORK)
                torchs = step_seconds(TORCH, *place)
                step = training + torchs  # a step without the penalty
                out.append(
                    {
                        "model": model, "dtype": dtype, "ranks": count,
                        "seconds": {op: step_seconds(op, *place) for op in (VALUE, GRADIENT, OURS, TORCH)},
                        "all_reduce_s": all_reduce_seconds(collective_bytes(shape), count, H200_NETWORK),
                        "all_reduce_bytes": collective_bytes(shape),
                        "held_bytes": held_bytes(OURS, shape.parameters, dtype) / count,
                        "step_s": step,
                        "share": added_seconds(GRADIENT, *place) / step,
                        "share_folded": added_seconds(OURS, *place) / step,
                    }
                )  # fmt: skip
    return out


def with_ladder(
    results: record.Results, models: Sequence[str], dtypes: Sequence[str], ranks: Sequence[int], images: int,
    folder: Path = RESULTS,
) -> record.Results:  # fmt: skip
    """The results of a run with its "ladder": points measured here and before, each beside its prediction; the rest
    predicted alone."""
    kind = results["device"]["type"]
    points = measured_points(results, "this run")
    memory, told = memory_of(points, kind)
    here = [with_prediction(point, memory, kind) for point in points]
    stored = [with_prediction(p, H200_MEMORY, "cuda") for p in stored_points(folder) if p["model"] in models]
    ladder = {
        "models": [name for name in LADDER if name in models], "dtypes": [*dtypes], "ranks": [*ranks],
        "images": images, "utilisation": UTILISATION, "flops": H200_FLOPS,
        "memory": None if memory is None else asdict(memory), "memory_from": told,
        "here": here, "stored": stored, "predictions": predictions(models, dtypes, ranks, images),
    }  # fmt: skip
    return results | {"ladder": ladder}
