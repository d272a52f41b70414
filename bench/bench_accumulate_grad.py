"""reg.accumulate_grad_(): strength * dR/dtheta added into .grad; weights read once, gradients read and written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.baselines import (
    AUTOTUNE,
    PARAMETRIZATION,
    PENALTIES,
    USUAL,
    Variant,
    compiled,
    stacked_penalty,
    usual_penalty,
)
from bench.case import DTYPES, FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, builders, measure
from bench.graph import Captured
from bench.models import CPU_MODELS, CUDA_MODELS
from bench.problem import IN_CACHE, STREAMS, TOLERANCE, Problem, backend_note, held
from spectral_ops import SpectralRegularizer
from spectral_ops.ops.layer_table import LayerTable

OP = "accumulate_grad"
OURS, OURS_GRAPH = "accumulate_grad_", "accumulate_grad_, graph"
NAMES = (OURS, OURS_GRAPH, *PENALTIES, FLOOR)
STEP = "native step alone"


def full(problem: Problem, reg: SpectralRegularizer) -> Contender:
    """The public method as a training loop calls it."""

    def error() -> float:
        problem.restart(reg)
        return problem.gradient_error(reg.accumulate_grad_)

    note = backend_note(problem.device.kind, "accumulate_grad_")
    return Contender(reg.accumulate_grad_, error, problem.gradient_tolerance, note)


def graphed(problem: Problem, reg: SpectralRegularizer) -> Contender:
    """The same in a CUDA graph, on a regularizer of its own: a graph must find its state where it was."""
    run = Captured(reg.accumulate_grad_)
    contender = Contender(run, tolerance=problem.gradient_tolerance, optional=True)

    def error() -> float:
        run.capture()
        contender.note = f"{backend_note(problem.device.kind, 'accumulate_grad_')}, {held(run)}"
        return problem.gradient_error(run, problem.truth_from(reg))

    contender.error = error
    return contender


def case(model: str, dtype: str, settings: Settings) -> Case:
    problem = Problem(model, settings, dtype)
    contenders, left_out = {OURS: full(problem, problem.regularizer())}, {}
    if settings.on_cuda:
        contenders[OURS_GRAPH] = graphed(problem, problem.regularizer())
    else:
        left_out[OURS_GRAPH] = "needs CUDA"
    codes, others = problem.usual_codes(usual_penalty, stacked_penalty)
    contenders |= {name: problem.usual(variant, code) for name, (variant, code) in codes.items()}
    contenders[PARAMETRIZATION] = problem.parametrization()
    return Case(
        f"{OP}/{model}/{dtype}",
        f"Penalty gradient added into .grad, {model}, {dtype}",
        settings.device,
        read=problem.parameters,
        update=problem.gradients,
        contenders=contenders,
        notes=["Gradients allocated and zeroed beforehand.", STREAMS if problem.streams else IN_CACHE],
        left_out=left_out | others,
        cold=problem.streams,
    )


def step_alone(problem: Problem, reg: SpectralRegularizer) -> Contender:
    """The compiled step with every address looked up beforehand: what the method costs without Python."""
    entries = [entry for entry in reg.entries if entry.layout is not None]
    table = LayerTable(
        [e.layout for e in entries if e.layout is not None], [e.target for e in entries], [e.strength for e in entries]
    )
    work = table.native.at([e.parameter for e in entries], [e.parameter.grad for e in entries])
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
        f"{OP}/overhead/{model}/float32",
        f"Python and dispatch of accumulate_grad_, {model}: {len(problem.parameters)} parameters",
        settings.device,
        read=problem.parameters,
        update=problem.gradients,
        contenders={STEP: step_alone(problem, reg), OURS: full(problem, reg)},
        notes=["The overhead is what accumulate_grad_ takes over base, paired within each round.", IN_CACHE],
        cold=False,
    )


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    yield from builders(case, settings, CPU_MODELS, CUDA_MODELS)
    if not settings.on_cuda:  # the step alone is csrc's
        for model in ("mlp", "mlp-shrunk"):
            if settings.models is None or model in settings.models:
                yield f"overhead/{model}/float32", partial(overhead, model, settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", CUDA_MODELS)
def test_accumulate_grad(time_alone: TimeAlone, case_of: CaseOf, model: str, dtype: str, name: str) -> None:
    time_alone(case_of(case, model, dtype), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    measured = measure(case_of(case, "mlp"), settings)
    names = {row["name"] for row in measured["rows"]}
    assert names >= {OURS, USUAL, PARAMETRIZATION, FLOOR}
    assert names | set(measured["left_out"]) == set(NAMES)


@pytest.mark.parametrize("name", [STEP, OURS])
def test_overhead(time_alone: TimeAlone, settings: Settings, case_of: CaseOf, name: str) -> None:
    if settings.on_cuda:
        pytest.skip("the step alone is csrc's, which serves the CPU")
    time_alone(case_of(lambda model, _, settings: overhead(model, settings), "mlp-shrunk"), name)


@pytest.mark.parametrize("mode", ["default", AUTOTUNE])
def test_compiled_smoke(settings: Settings, mode: str) -> None:
    """The compiled baselines on the smallest model, since quick runs leave them out."""
    problem = Problem("mlp-shrunk", settings)
    contender = problem.usual(Variant(mode=mode), compiled(usual_penalty, mode))
    assert contender.error is not None and contender.error() <= TOLERANCE
