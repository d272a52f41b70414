"""Fixtures of the benchmarks. Quick sizes with --benchmark-disable or SPECTRAL_OPS_BENCH_QUICK=1.

Threads from SPECTRAL_OPS_BENCH_THREADS; unset: 2, and 1 in a quick run, since on a busy machine two threads wait for
each other a hundred times longer than they compute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

# pytest puts the checkout first on the path in order to import this package. A spectral_ops that is installed
# elsewhere, with its compiled module (make gpu), comes before it.
ROOT = str(Path(__file__).resolve().parents[1])
sys.path[:] = [*(entry for entry in sys.path if entry != ROOT), ROOT]

import spectral_ops  # noqa: E402, F401
from bench import models  # noqa: E402
from bench.case import DTYPES, Builder, Case, CaseOf, Settings, TimeAlone, check  # noqa: E402
from bench.device import Device  # noqa: E402

# A contender by itself: an SVD of every layer takes seconds a round, and a handful of rounds then says enough.
BUDGET_S, FEWEST_ROUNDS = 20.0, 3


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def settings(request: pytest.FixtureRequest) -> Iterator[Settings]:
    threads = torch.get_num_threads()
    quick = os.environ.get("SPECTRAL_OPS_BENCH_QUICK") == "1" or request.config.getoption("benchmark_disable")
    wanted = int(os.environ.get("SPECTRAL_OPS_BENCH_THREADS", "1" if quick else "2"))
    yield Settings(Device(request.param, wanted), quick)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case_of(settings: Settings) -> CaseOf:
    """Cases by builder, model and dtype, made once per file and device."""
    made: dict[tuple[Builder, str, str], Case] = {}

    def get(build: Builder, model: str, dtype: str = DTYPES[0]) -> Case:
        if model in models.CUDA_ONLY and not settings.on_cuda:
            pytest.skip("the large models: CUDA only")
        if (build, model, dtype) not in made:
            made[build, model, dtype] = build(model, dtype, settings)
        return made[build, model, dtype]

    return get


@pytest.fixture
def time_alone(benchmark: BenchmarkFixture, settings: Settings) -> TimeAlone:
    """Checks one contender, then times it by itself for pytest-benchmark. Ratios come from `bench.case.measure`."""

    def time(case: Case, name: str) -> None:
        if name not in case.contenders:
            pytest.skip(f"{name}: {case.left_out[name]}")
        error = check(case, name)
        run = case.contenders[name].run

        def synchronised() -> None:
            run()
            settings.device.synchronize()

        seconds = settings.device.sample(synchronised)
        rounds = max(FEWEST_ROUNDS, min(settings.rounds, int(BUDGET_S / seconds)))
        benchmark.group = case.name
        benchmark.extra_info.update(bytes=case.bytes, threads=settings.device.threads, error=error)
        benchmark.pedantic(synchronised, rounds=rounds, warmup_rounds=settings.warmup)

    return time
