"""power_iteration: sigma, u and the next v of every matrix; the least possible is one read of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import truth
from bench.baselines import USUAL, VARIANTS, stacked_power_iteration, usual_power_iteration
from bench.case import DTYPES, FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, builders, measure
from bench.models import CPU_MODELS
from bench.problem import IN_CACHE, STREAMS, TOLERANCE, Problem, backend_note
from spectral_ops import power_iteration

OP = "power_iteration"
CUDA_MODELS = ("mlp", "resnet18", "vit-s", "vit-b")
OURS = "power_iteration"
NAMES = (OURS, *VARIANTS, FLOOR)


def case(model: str, dtype: str, settings: Settings) -> Case:
    problem = Problem(model, settings, dtype)
    weights, v = problem.weights, [x.clone() for x in problem.v]

    @torch.no_grad()
    def ours() -> Tensor:
        return power_iteration(weights, v)[0]

    def error_of(sigma: Tensor, v: list[Tensor]) -> float:
        """Of every sigma and every next v."""
        return truth.largest_error([*sigma, *v], [*problem.truth.sigma, *problem.truth.v])

    def error() -> float:
        torch._foreach_copy_(v, problem.v)
        return error_of(ours(), v)

    codes, left_out = problem.usual_codes(usual_power_iteration, stacked_power_iteration)
    usual = {name: (variant, partial(code, weights)) for name, (variant, code) in codes.items()}
    return Case(
        f"{OP}/{model}/{dtype}",
        f"One step of power iteration, {model}, {dtype}",
        settings.device,
        read=weights,
        update=[],
        contenders={
            OURS: Contender(ours, error, TOLERANCE, backend_note(settings.device.kind, OP)),
            **problem.forward_only(usual, error_of),
        },
        notes=[STREAMS if problem.streams else IN_CACHE],
        left_out=left_out,
        cold=problem.streams,
    )


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    yield from builders(case, settings, CPU_MODELS, CUDA_MODELS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", CUDA_MODELS)
def test_power_iteration(time_alone: TimeAlone, case_of: CaseOf, model: str, dtype: str, name: str) -> None:
    time_alone(case_of(case, model, dtype), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    assert {row["name"] for row in measure(case_of(case, "mlp"), settings)["rows"]} >= {OURS, USUAL, FLOOR}
