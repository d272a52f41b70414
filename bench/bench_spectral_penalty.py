"""R itself, and R as a term of the loss with its backward.

The value is one read of the weights. The loss form also adds into .grad; autograd passes the gradient on as a tensor of
its own, written and read once more, which the bytes counted here, the least possible, leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import truth
from bench.baselines import compiled, usual_penalty
from bench.case import FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, measure
from bench.problem import IN_CACHE, STREAMS, TOLERANCE, Problem
from spectral_ops import spectral_penalty

OP = "spectral_penalty"
MODELS = ("vit-s", "mlp")
OURS, DROP_IN, USUAL, COMPILED = "spectral_penalty", "reg()", "usual", "usual, compiled"
VALUE_NAMES = (OURS, DROP_IN, USUAL, COMPILED, FLOOR)
LOSS_NAMES = (DROP_IN, USUAL, COMPILED, FLOOR)


def value(model: str, settings: Settings) -> Case:
    """R without gradients. The op takes matrices alone, and so does everybody else here: biases=False."""
    problem = Problem(model, settings)
    weights, reg = problem.weights, problem.regularizer(biases=False)
    true = truth.warm_step(weights, [], problem.v).value

    def without_gradient(code: Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]) -> Contender:
        v = [x.clone() for x in problem.v]

        @torch.no_grad()
        def run() -> Tensor:
            found, v[:] = code(v)
            return found

        def error() -> float:
            v[:] = [x.clone() for x in problem.v]
            return truth.relative_error(run(), true)

        return Contender(run, error, TOLERANCE)

    @torch.no_grad()
    def drop_in() -> Tensor:
        return reg(advance=False) / reg.strength

    def drop_in_error() -> float:
        problem.restart(reg)
        return truth.relative_error(drop_in(), true)

    contenders = {
        OURS: without_gradient(lambda v: (spectral_penalty(weights, v), v)),
        DROP_IN: Contender(drop_in, drop_in_error, TOLERANCE, "reg(advance=False) under no_grad"),
        USUAL: without_gradient(lambda v: usual_penalty(weights, [], v)),
    }
    if not settings.quick:
        code = compiled(usual_penalty)
        contenders[COMPILED] = without_gradient(lambda v: code(weights, [], v))
    return Case(
        f"{OP}/value/{model}",
        f"Penalty value, {model}",
        settings.device,
        read=weights,
        update=[],
        contenders=contenders,
        notes=[STREAMS if problem.streams else IN_CACHE],
        cold=problem.streams,
    )


def loss(model: str, settings: Settings) -> Case:
    """reg().backward(), biases included."""
    problem = Problem(model, settings)
    reg = problem.regularizer()

    def run() -> Tensor:
        term = reg()
        term.backward()
        return term.detach()

    def error() -> float:
        problem.restart(reg)
        return problem.gradient_error(run)

    contenders = {DROP_IN: Contender(run, error, TOLERANCE, "reg().backward()"), USUAL: problem.usual()}
    if not settings.quick:
        contenders[COMPILED] = problem.usual(compiled(usual_penalty))
    return Case(
        f"{OP}/loss/{model}",
        f"Penalty as a loss term, forward and backward, {model}",
        settings.device,
        read=problem.parameters,
        update=problem.gradients,
        contenders=contenders,
        notes=["Gradients allocated and zeroed beforehand.", STREAMS if problem.streams else IN_CACHE],
        cold=problem.streams,
    )


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    for build in (value, loss):
        for model in MODELS:
            yield partial(build, model, settings)


@pytest.mark.parametrize("name", VALUE_NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_value(time_alone: TimeAlone, case_of: CaseOf, model: str, name: str) -> None:
    time_alone(case_of(value, model), name)


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_loss(time_alone: TimeAlone, case_of: CaseOf, model: str, name: str) -> None:
    time_alone(case_of(loss, model), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    assert {row["name"] for row in measure(case_of(value, "mlp"), settings)["rows"]} >= {OURS, USUAL, FLOOR}
