"""Conv layers as the linear maps they are: one warm step of all of them, against torch's convolutions one by one.

The floor is that of memory, one read of every weight; a step is bound by arithmetic, so that a matrix product of as
many multiplications stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import bench_accumulate_grad, conv_truth, models
from bench.case import DTYPES, FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, measure
from bench.conv_baselines import GRAM_ITERATIONS, fft_norms, gram_bounds
from bench.conv_problem import ConvProblem
from bench.problem import TOLERANCE
from spectral_ops.ops.layout import pack
from spectral_ops.ops.spectral_norm import MAX_ITER

OP = "conv"
CPU_MODELS = ("resnet18-cifar",)
CUDA_MODELS = ("resnet18-cifar", "resnet50")
DTYPE = DTYPES[0]  # torch's convolutions, and so the baselines, want weights and vectors of one dtype
STEP, ACCUMULATE, NORM = "power_iteration", "accumulate_grad_", "spectral_norm"
LAYERWISE, GEMM, FFT, GRAM = "torch, layer by layer", "torch.mm of as much", "fft and svd", "gram iteration"
GRAPH = ", graph"
NEEDS_CUDA = "needs CUDA"
STEP_NAMES = (STEP, STEP + GRAPH, LAYERWISE, LAYERWISE + GRAPH, GEMM, FLOOR)
ACCUMULATE_NAMES = (ACCUMULATE, ACCUMULATE + GRAPH, *STEP_NAMES[2:])
NORM_NAMES = (NORM, STEP, FFT, GRAM, FLOOR)
RESHAPE_NAMES = bench_accumulate_grad.NAMES
# See GRAM_ITERATIONS; of the widest layer.
GRAM_EXCESS = 0.05
# As in bench_spectral_norm: the first that reaches TOLERANCE is taken, and noted.
TOLS = (1e-5, 1e-6, 1e-7)


def value(model: str, dtype: str, settings: Settings) -> Case:
    problem = ConvProblem(model, settings)
    contenders, left_out = {STEP: problem.power_iteration()}, {}
    if settings.on_cuda:
        contenders[STEP + GRAPH] = problem.power_iteration(graph=True)
    contenders[LAYERWISE] = problem.layer_by_layer(gradient=False)
    if settings.on_cuda:
        contenders[LAYERWISE + GRAPH] = problem.layer_by_layer(gradient=False, graph=True)
    else:
        left_out = dict.fromkeys((STEP + GRAPH, LAYERWISE + GRAPH), NEEDS_CUDA)
    contenders[GEMM] = problem.gemm(passes=2)
    return Case(
        f"{OP}/value/{model}/{dtype}",
        f"Conv operators, one warm step, {model}, {dtype}",
        settings.device,
        read=problem.weights,
        update=problem.v,
        contenders=contenders,
        notes=arithmetic(problem, 2),
        left_out=left_out,
    )


def accumulate(model: str, dtype: str, settings: Settings) -> Case:
    problem = ConvProblem(model, settings)
    contenders, left_out = {ACCUMULATE: problem.accumulate_grad()}, {}
    if settings.on_cuda:
        contenders[ACCUMULATE + GRAPH] = problem.accumulate_grad(graph=True)
    contenders[LAYERWISE] = problem.layer_by_layer(gradient=True)
    if settings.on_cuda:
        contenders[LAYERWISE + GRAPH] = problem.layer_by_layer(gradient=True, graph=True)
    else:
        left_out = dict.fromkeys((ACCUMULATE + GRAPH, LAYERWISE + GRAPH), NEEDS_CUDA)
    contenders[GEMM] = problem.gemm(passes=3)
    return Case(
        f"{OP}/{bench_accumulate_grad.OP}/{model}/{dtype}",
        f"Conv operators, gradient into .grad, {model}, {dtype}",
        settings.device,
        read=problem.weights,
        update=[*problem.gradients, *problem.v],
        contenders=contenders,
        notes=["Gradients allocated and zeroed beforehand.", *arithmetic(problem, 3)],
        left_out=left_out,
    )


def arithmetic(problem: ConvProblem, passes: int) -> list[str]:
    sizes = sorted({conv.size for conv in problem.convs}, reverse=True)
    applied = "the map, its adjoint" + ", the gradient" * (passes == 3)
    return [
        f"{len(problem.convs)} layers on inputs from {sizes[0]} x {sizes[0]} to {sizes[-1]} x {sizes[-1]}, weights as "
        "torch initialises them.",
        f"{passes * problem.macs * 1e-9:.3g} GMAC a call ({applied}; the padding's zeros counted): x base of {GEMM} is "
        "the share of its rate that ours reaches.",
    ]


def norm(model: str, dtype: str, settings: Settings) -> Case:
    """What the methods by Fourier transforms can: circular padding, stride 1."""
    places = one_of_each_shape(models.conv_net(model, quick=settings.quick))
    problem, zeros = (ConvProblem(model, settings, places=places, circular=circular) for circular in (True, False))
    weights, convs = [w.detach() for w in problem.weights], problem.convs
    true = conv_truth.circular_norms(weights, convs)
    packed = pack(problem.layouts)

    def excess(found: Tensor) -> Tensor:
        return (found.double() - true) / true

    def ours(tol: float) -> Tensor:
        return torch.ops.spectral_ops.spectral_norm(weights, packed, tol, MAX_ITER)[0]

    def exact(run: Callable[[], Tensor], note: str) -> Contender:
        return Contender(run, lambda: excess(run()).abs().max().item(), TOLERANCE, note)

    def bounds() -> Tensor:
        return gram_bounds(weights, convs)

    def bound_error() -> float:
        found = excess(bounds())
        return float("nan") if found.min() < -TOLERANCE else found.abs().max().item()  # below the norm: no bound

    tol = next((t for t in TOLS if excess(ours(t)).abs().max() <= TOLERANCE), TOLS[-1])
    contenders = {NORM: exact(partial(ours, tol), f"all in one call, converged, tol={tol:g}, of {TOLS}")}
    contenders[STEP] = zeros.power_iteration()
    contenders[STEP].note += ": one warm step of the same layers with zero padding, what training takes"
    contenders[FFT] = exact(partial(fft_norms, weights, convs), "an SVD of every frequency, a layer at a time")
    note = f"{GRAM_ITERATIONS} iterations; an upper bound: its error is by how much it is above"
    contenders[GRAM] = Contender(bounds, bound_error, GRAM_EXCESS, note)
    contenders[FFT].optional = contenders[GRAM].optional = True
    return Case(
        f"{OP}/norm/{model}/{dtype}",
        f"Norms, circular, stride 1, {model}, {dtype}",
        settings.device,
        read=problem.weights,
        update=[],
        contenders=contenders,
        notes=[f"The first layer of every shape of stride 1, {len(convs)} in all: Fourier methods know no other."],
        cold=False,
    )


def one_of_each_shape(convs: Sequence[models.Conv]) -> list[int]:
    """The places of what Fourier methods can take and are needed for; SVDs of every layer would take minutes."""
    return [i for i, c in enumerate(convs) if c.stride == 1 and c.kernel > 1 and c not in convs[:i]]


def reshape(model: str, dtype: str, settings: Settings) -> Case:
    """The same layers in reshape mode, by the public method."""
    case = bench_accumulate_grad.case(model, dtype, settings)
    case.name, case.title = f"{OP}/reshape/{model}/{dtype}", f"Reshaped, gradient into .grad, {model}, {dtype}"
    return case


# With their models on CUDA and in quick runs; on a CPU those of CPU_MODELS alone.
CASES = {
    "value": (value, CUDA_MODELS),
    bench_accumulate_grad.OP: (accumulate, CUDA_MODELS),
    "reshape": (reshape, CUDA_MODELS),
    "norm": (norm, CPU_MODELS),
}


def chosen(settings: Settings, own: Sequence[str]) -> list[str]:
    if settings.models is not None:
        return [model for model in settings.models if model in own]
    return [model for model in own if settings.on_cuda or settings.quick or model in CPU_MODELS]


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    if DTYPE not in settings.chosen_dtypes:
        return
    for kind, (build, own) in CASES.items():
        for model in chosen(settings, own):
            yield f"{kind}/{model}/{DTYPE}", partial(build, model, DTYPE, settings)


def alone(time_alone: TimeAlone, case_of: CaseOf, settings: Settings, kind: str, model: str, name: str) -> None:
    build, own = CASES[kind]
    if model not in chosen(settings, own):
        pytest.skip("the large model: CUDA only")
    time_alone(case_of(build, model), name)


@pytest.mark.parametrize("name", STEP_NAMES)
@pytest.mark.parametrize("model", CUDA_MODELS)
def test_value(time_alone: TimeAlone, case_of: CaseOf, settings: Settings, model: str, name: str) -> None:
    alone(time_alone, case_of, settings, "value", model, name)


@pytest.mark.parametrize("name", ACCUMULATE_NAMES)
@pytest.mark.parametrize("model", CUDA_MODELS)
def test_accumulate(time_alone: TimeAlone, case_of: CaseOf, settings: Settings, model: str, name: str) -> None:
    alone(time_alone, case_of, settings, bench_accumulate_grad.OP, model, name)


@pytest.mark.parametrize("name", RESHAPE_NAMES)
@pytest.mark.parametrize("model", CUDA_MODELS)
def test_reshape(time_alone: TimeAlone, case_of: CaseOf, settings: Settings, model: str, name: str) -> None:
    alone(time_alone, case_of, settings, "reshape", model, name)


@pytest.mark.parametrize("name", NORM_NAMES)
def test_norm(time_alone: TimeAlone, case_of: CaseOf, settings: Settings, name: str) -> None:
    alone(time_alone, case_of, settings, "norm", CPU_MODELS[0], name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    measured = measure(case_of(accumulate, CPU_MODELS[0]), settings)
    names = {row["name"] for row in measured["rows"]}
    assert names >= {ACCUMULATE, LAYERWISE, GEMM, FLOOR}
    assert names | set(measured["left_out"]) == set(ACCUMULATE_NAMES)
