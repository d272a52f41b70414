"""Whole runs of the reference trainer in worker processes, as `spectral-ops compare` has them: how much two of one
thread give, and what several seeds take by shared steps in each.

Start and end of the processes count, and so do logs and checkpoints. In full runs only: minutes.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.case import FLOOR, Case, CaseOf, Contender, Settings, TimeAlone
from bench.models import SEED
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.jobs import Job, count_runs
from spectral_ops.continual.models import build_model
from spectral_ops.continual.workers import run_jobs

OP = "workers"
TWO_WORKERS, ONE_WORKER = "two workers", "one worker"
TOGETHER = "two workers, five together in each"
BOTH_THREADS = "one process of two threads, one by one"
ONE_BY_ONE = "two workers, one by one"
SEEDS = 10


def digits(model: str, dtype: str, settings: Settings) -> Case:
    """On digits, which need no files. Two workers first start a process each, which imports torch; one is this one."""
    seeds, steps = (2, 5) if settings.quick else (12, 2500)
    hidden = {"hidden": (100, 100)}
    config = RunConfig(data="digits", model_options=hidden, samples=1000, batch=32, tasks=5, steps=steps)
    return _case(
        "digits",
        f"{seeds} runs of 5 tasks of {steps} steps, MLP 64-100-100-10 on digits, {dtype}",
        settings,
        config,
        {
            TWO_WORKERS: Contender(partial(train, partial(single, config, seeds), 2)),
            ONE_WORKER: Contender(partial(train, partial(single, config, seeds), 1)),
        },
    )


def seeds_together(model: str, dtype: str, settings: Settings) -> Case:
    """Where a step is nearly all products of matrices it is best to have a network's on one processor."""
    seeds, steps, hidden = (2, 5, (16, 16)) if settings.quick else (SEEDS, 800, (256, 256))
    options = {"model_options": {"hidden": hidden}, "samples": 1200, "held_out_samples": 100, "batch": 256}
    config = RunConfig(data="mnist", tasks=3, steps=steps, **options)  # type: ignore[arg-type]
    both = replace(config, threads=2)
    return _case(
        "seeds-b256",
        f"{seeds} runs of 3 tasks of {steps} steps, MLP 784-256-256-10, batch 256, {dtype}",
        settings,
        config,
        {
            TOGETHER: Contender(partial(train, partial(halves, config, seeds), 2)),
            BOTH_THREADS: Contender(partial(train, partial(single, both, seeds), 1)),
            ONE_BY_ONE: Contender(partial(train, partial(single, config, seeds), 2)),
        },
    )


def _case(name: str, title: str, settings: Settings, config: RunConfig, contenders: dict[str, Contender]) -> Case:
    shape = (1, 8, 8) if config.data == "digits" else (1, 28, 28)
    network = build_model(config.model, shape, 10, **config.model_options)
    return Case(
        f"{OP}/{name}/float32",
        title,
        settings.device,
        read=list(network.parameters()),
        update=[],
        contenders=contenders,
        notes=["Random labels, Adam, no method. The floor means nothing here: one read of a network."],
        cold=False,
    )


def train(jobs: Callable[[Path, Path], list[Job]], processes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder))
        given = jobs(Path(folder), Path(folder) / "runs")
        outcome = run_jobs(given, workers=processes)
    assert len(outcome.finished) == count_runs(given), outcome.failures


def single(config: RunConfig, seeds: int, data: Path, folder: Path) -> list[Job]:
    return [Job("none", replace(config, seed=seed, data_root=data), folder / str(seed)) for seed in range(seeds)]


def halves(config: RunConfig, seeds: int, data: Path, folder: Path) -> list[Job]:
    jobs = single(config, seeds, data, folder)
    return [jobs[i]._replace(others=tuple(jobs[i + 1 : i + seeds // 2])) for i in range(0, seeds, seeds // 2)]


def write_noise(root: Path) -> None:
    """Images in MNIST's files: the time of a step does not depend on what they show."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(SEED)
    for split, count in (("train", 1200), ("t10k", 100)):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        for name, values in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape)
            (raw / name).write_bytes(header + values.numpy().tobytes())


CASES = {"digits": digits, "seeds-b256": seeds_together}


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    usual = "float32" in settings.chosen_dtypes and (settings.models is None or "mlp" in settings.models)
    if usual and settings.full and not settings.on_cuda:  # minutes, and runs of one thread each
        for name, build in CASES.items():
            yield f"{name}/float32", partial(build, name, "float32", settings)


@pytest.mark.parametrize("name", [TWO_WORKERS, ONE_WORKER, FLOOR])
def test_digits(time_alone: TimeAlone, settings: Settings, case_of: CaseOf, name: str) -> None:
    _time(time_alone, settings, case_of, "digits", name)


@pytest.mark.parametrize("name", [TOGETHER, BOTH_THREADS, ONE_BY_ONE, FLOOR])
def test_seeds_together(time_alone: TimeAlone, settings: Settings, case_of: CaseOf, name: str) -> None:
    _time(time_alone, settings, case_of, "seeds-b256", name)


def _time(time_alone: TimeAlone, settings: Settings, case_of: CaseOf, model: str, name: str) -> None:
    if settings.on_cuda:
        pytest.skip("runs of one thread each")
    time_alone(case_of(CASES[model], model), name)
