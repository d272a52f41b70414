"""reg.accumulate_grad_(): strength * dR/dtheta added into .grad; weights read once, gradients read and written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.baselines import compiled, usual_penalty
from bench.case import FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, measure
from bench.problem import IN_CACHE, STREAMS, TOLERANCE, Problem
from spectral_ops import SpectralRegularizer, backends
from spectral_ops.ops.native_table import NativeTable

OP = "accumulate_grad"
MODELS = ("vit-s", "mlp", "resnet18")
OURS, USUAL, COMPILED, PARAMETRIZATION = "accumulate_grad_", "usual", "usual, compiled", "parametrization"
NAMES = (OURS, USUAL, COMPILED, PARAMETRIZATION, FLOOR)
STEP = "native step alone"


def full(problem: Problem, reg: SpectralRegularizer) -> Contender:
    """The public method as a training loop calls it."""

    def error() -> float:
        problem.restart(reg)
        return problem.gradient_error(reg.accumulate_grad_)

    backend = backends.choose(torch.device(problem.device.kind), "accumulate_grad_")
    return Contender(reg.accumulate_grad_, error, TOLERANCE, f"backend {backend}")


def case(model: str, settings: Settings) -> Case:
    problem = Problem(model, settings)
    contenders = {OURS: full(problem, problem.regularizer()), USUAL: problem.usual()}
    if not settings.quick:  # compiles for a minute or two
        contenders[COMPILED] = problem.usual(compiled(usual_penalty))
    contenders[PARAMETRIZATION] = problem.parametrization()
    return Case(
        f"{OP}/{model}",
        f"Penalty gradient added into .grad, {model}",
        settings.device,
        read=problem.parameters,
        update=problem.gradients,
        contenders=contenders,
        notes=["Gradients allocated and zeroed beforehand.", STREAMS if problem.streams else IN_CACHE],
        cold=problem.streams,
    )


def step_alone(problem: Problem, reg: SpectralRegularizer) -> Contender:
    """The compiled step with every address looked up beforehand: what the method costs without Python."""
    entries = [entry for entry in reg.entries if entry.layout is not None]
    table = NativeTable(
        [e.layout for e in entries if e.layout is not None], [e.target for e in entries], [e.strength for e in entries]
    )
    work = table.at([e.parameter for e in entries], [e.parameter.grad for e in entries])
    state = reg.state_dict()
    v, value = torch.cat(problem.v), torch.zeros(())
    exponents, sigma = torch.cat([*state["exponent"].values()]), torch.cat([*state["sigma"].values()])
    strength = float(reg.strength)

    def run() -> Tensor:
        work.table.step(
            work.weights, work.gradients, v.data_ptr(), v.data_ptr(), exponents.data_ptr(), exponents.data_ptr(),
            sigma.data_ptr(), 0, value.data_ptr(), reg.exponent, strength, strength, 1, problem.device.threads,
        )
        return value

    def error() -> float:
        v.copy_(torch.cat(problem.v))
        return problem.gradient_error(run)

    return Contender(run, error, TOLERANCE)


def overhead(model: str, settings: Settings) -> Case:
    """What accumulate_grad_() takes beyond its compiled step: Python and dispatch."""
    problem = Problem(model, settings)
    reg = problem.regularizer()
    return Case(
        f"{OP}/overhead/{model}",
        f"Python and dispatch of accumulate_grad_, {model}: {len(problem.parameters)} parameters",
        settings.device,
        read=problem.parameters,
        update=problem.gradients,
        contenders={STEP: step_alone(problem, reg), OURS: full(problem, reg)},
        notes=["The overhead is what accumulate_grad_ takes over base, paired within each round.", IN_CACHE],
        cold=False,
    )


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    for model in MODELS:
        yield partial(case, model, settings)
    if settings.device.kind == "cpu":  # the step alone is csrc's
        for model in ("mlp", "mlp-shrunk"):
            yield partial(overhead, model, settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_accumulate_grad(time_alone: TimeAlone, case_of: CaseOf, model: str, name: str) -> None:
    time_alone(case_of(case, model), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    rows = measure(case_of(case, "mlp"), settings)["rows"]
    assert {row["name"] for row in rows} >= {OURS, USUAL, PARAMETRIZATION, FLOOR}


@pytest.mark.parametrize("name", [STEP, OURS])
def test_overhead(time_alone: TimeAlone, settings: Settings, case_of: CaseOf, name: str) -> None:
    if settings.device.kind == "cuda":
        pytest.skip("the step alone is csrc's, which serves the CPU")
    time_alone(case_of(overhead, "mlp-shrunk"), name)


def test_compiled_smoke(settings: Settings) -> None:
    """The compiled baseline on the smallest model, since quick runs leave it out."""
    problem = Problem("mlp-shrunk", settings)
    contender = problem.usual(compiled(usual_penalty))
    assert contender.error is not None and contender.error() <= TOLERANCE
