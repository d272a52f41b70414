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
from bench.baselines import COMPILED, USUAL, VARIANTS, stacked_penalty, usual_penalty
from bench.case import DTYPES, FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, builders, measure
from bench.graph import Captured
from bench.models import CUDA_MODELS
from bench.problem import IN_CACHE, STREAMS, TOLERANCE, Problem, backend_note, held
from spectral_ops import spectral_penalty

OP = "spectral_penalty"
CPU_MODELS = ("vit-s", "mlp")
CUDA_LOSS_MODELS = ("mlp", "vit-b")
OURS, DROP_IN, DROP_IN_GRAPH = "spectral_penalty", "reg()", "reg(), graph"
VALUE_NAMES = (OURS, DROP_IN, DROP_IN_GRAPH, *VARIANTS, FLOOR)
LOSS_NAMES = (DROP_IN, USUAL, COMPILED, FLOOR)


def value(model: str, dtype: str, settings: Settings) -> Case:
    """R without gradients. The op takes matrices alone, and so does everybody else here: biases=False."""
    problem = Problem(model, settings, dtype)
    weights = problem.weights
    true = truth.warm_step(weights, [], problem.v).value
    v = [x.clone() for x in problem.v]

    @torch.no_grad()
    def ours() -> Tensor:
        return spectral_penalty(weights, v)

    def error() -> float:
        torch._foreach_copy_(v, problem.v)
        return truth.relative_error(ours(), true)

    codes, left_out = problem.usual_codes(usual_penalty, stacked_penalty)
    usual = {name: (variant, partial(code, weights, [])) for name, (variant, code) in codes.items()}
    contenders = {OURS: Contender(ours, error, TOLERANCE, backend_note(problem.device.kind, OP))}
    contenders[DROP_IN] = drop_in(problem, true)
    if settings.on_cuda:
        contenders[DROP_IN_GRAPH] = drop_in(problem, true, graph=True)
    else:
        left_out[DROP_IN_GRAPH] = "needs CUDA"
    contenders |= problem.forward_only(usual, lambda found, _: truth.relative_error(found, true))
    return Case(
        f"{OP}/value/{model}/{dtype}",
        f"Penalty value, {model}, {dtype}",
        settings.device,
        read=weights,
        update=[],
        contenders=contenders,
        notes=[STREAMS if problem.streams else IN_CACHE],
        left_out=left_out,
        cold=problem.streams,
    )


def drop_in(problem: Problem, true: Tensor, *, graph: bool = False) -> Contender:
    """R by the regularizer, its state unchanged; in a CUDA graph where that is asked for."""
    reg = problem.regularizer(biases=False)

    @torch.no_grad()
    def without_gradient() -> Tensor:
        return reg(advance=False)

    run = Captured(without_gradient) if graph else without_gradient
    note = f"reg(advance=False) under no_grad, {backend_note(problem.device.kind, OP)}"
    contender = Contender(run, tolerance=TOLERANCE, note=note, optional=graph)

    def error() -> float:
        if isinstance(run, Captured):
            run.capture()  # no restart after it: its state would move; nothing has advanced
            contender.note = f"{note}, {held(run)}"
        else:
            problem.restart(reg)
        return truth.relative_error(run() / reg.strength, true)

    contender.error = error
    return contender


def loss(model: str, dtype: str, settings: Settings) -> Case:
    """reg().backward(), biases included."""
    problem = Problem(model, settings, dtype)
    reg = problem.regularizer()

    def run() -> Tensor:
        term = reg()
        term.backward()
        return term.detach()

    def error() -> float:
        problem.restart(reg)
        return problem.gradient_error(run)

    note = f"reg().backward(), {backend_note(problem.device.kind, OP)}"
    contenders = {DROP_IN: Contender(run, error, problem.gradient_tolerance, note)}
    codes, left_out = problem.usual_codes(usual_penalty, stacked_penalty)
    for name in (USUAL, COMPILED):
        if name in codes:
            contenders[name] = problem.usual(*codes[name])
    return Case(
        f"{OP}/loss/{model}/{dtype}",
        f"Penalty as a loss term, forward and backward, {model}, {dtype}",
        settings.device,
        read=problem.parameters,
        update=problem.gradients,
        contenders=contenders,
        notes=["Gradients allocated and zeroed beforehand.", STREAMS if problem.streams else IN_CACHE],
        left_out={name: reason for name, reason in left_out.items() if name == COMPILED},
        cold=problem.streams,
    )


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    for kind, build, on_cuda in (("value", value, CUDA_MODELS), ("loss", loss, CUDA_LOSS_MODELS)):
        for name, builder in builders(build, settings, CPU_MODELS, on_cuda):
            yield f"{kind}/{name}", builder


@pytest.mark.parametrize("name", VALUE_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", CUDA_MODELS)
def test_value(time_alone: TimeAlone, case_of: CaseOf, model: str, dtype: str, name: str) -> None:
    time_alone(case_of(value, model, dtype), name)


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", CUDA_MODELS)
def test_loss(time_alone: TimeAlone, case_of: CaseOf, model: str, dtype: str, name: str) -> None:
    time_alone(case_of(loss, model, dtype), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    assert {row["name"] for row in measure(case_of(value, "mlp"), settings)["rows"]} >= {OURS, USUAL, FLOOR}
