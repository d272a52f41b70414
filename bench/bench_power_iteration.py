"""power_iteration: sigma, u and the next v of every matrix; the least possible is one read of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import truth
from bench.baselines import compiled, usual_power_iteration
from bench.case import FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, measure
from bench.problem import IN_CACHE, STREAMS, TOLERANCE, Problem
from spectral_ops import power_iteration

OP = "power_iteration"
MODELS = ("vit-s", "mlp", "resnet18")
OURS, USUAL, COMPILED = "power_iteration", "usual", "usual, compiled"
NAMES = (OURS, USUAL, COMPILED, FLOOR)


def case(model: str, settings: Settings) -> Case:
    problem = Problem(model, settings)
    weights = problem.weights

    def contender(step: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]) -> Contender:
        v = [x.clone() for x in problem.v]

        @torch.no_grad()
        def run() -> Tensor:
            sigma, v[:] = step(v)
            return sigma

        def error() -> float:
            """Of every sigma and every next v."""
            v[:] = [x.clone() for x in problem.v]
            sigma = run()
            return truth.largest_error([*sigma, *v], [*problem.truth.sigma, *problem.truth.v])

        return Contender(run, error, TOLERANCE)

    contenders = {
        OURS: contender(lambda v: power_iteration(weights, v)[::2]),
        USUAL: contender(lambda v: usual_power_iteration(weights, v)),
    }
    if not settings.quick:
        code = compiled(usual_power_iteration)
        contenders[COMPILED] = contender(lambda v: code(weights, v))
    return Case(
        f"{OP}/{model}",
        f"One step of power iteration, {model}",
        settings.device,
        read=weights,
        update=[],
        contenders=contenders,
        notes=[STREAMS if problem.streams else IN_CACHE],
        cold=problem.streams,
    )


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    for model in MODELS:
        yield partial(case, model, settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_power_iteration(time_alone: TimeAlone, case_of: CaseOf, model: str, name: str) -> None:
    time_alone(case_of(case, model), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    assert {row["name"] for row in measure(case_of(case, "mlp"), settings)["rows"]} >= {OURS, USUAL, FLOOR}
