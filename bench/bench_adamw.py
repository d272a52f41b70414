"""SpectralAdamW.step(): the optimizer's pass over the weights with the penalty in it, beside torch's without one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.baselines import UsualPenalty
from bench.case import DTYPES, FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, builders, measure
from bench.graph import Captured
from bench.models import CPU_MODELS
from bench.problem import IN_CACHE, STREAMS, STRENGTH, Problem, backend_note, held
from spectral_ops import SpectralAdamW, SpectralRegularizer

OP = "adamw"
FUSED, FOREACH = "AdamW(fused)", "AdamW(foreach)"
ACCUMULATE, USUAL = "accumulate_grad_ + AdamW(fused)", "usual code + AdamW(fused)"
OURS = "SpectralAdamW"
GRAPHS = {name: f"{name}, graph" for name in (FUSED, ACCUMULATE, OURS)}
NAMES = (FUSED, FOREACH, ACCUMULATE, USUAL, OURS, *GRAPHS.values(), FLOOR)
# Every contender has weights, gradients and moments of its own: eight times 16 bytes a parameter.
CUDA_MODELS = ("mlp", "vit-b", "vit-l")
LR, WEIGHT_DECAY = 1e-6, 0.0  # small: over thousands of steps the weights stay what they are
# Largest |difference| of a weight after the check's steps from that of accumulate_grad_ and AdamW in float64, in steps
# of lr. In float32 a weight of size 0.1 moves by multiples of 2^-27, and where a gradient nearly vanishes the moments
# blow up its rounding: measured 0.06 (EPYC, 2026-11-28). In bfloat16 torch's moments are bfloat16: nothing to agree on.
TOLERANCE = 0.2
CHECK_LR, CHECK_STEPS = 1e-3, 3


class Trained:
    """A copy of a problem's model with gradients, and one way to step it."""

    def __init__(self, problem: Problem, kind: str, lr: float = LR, dtype: torch.dtype | None = None):
        self.model: nn.Module = copy.deepcopy(problem.model).to(dtype or problem.dtype)
        self.parameters = list(self.model.parameters())
        generator = torch.Generator(problem.device.kind).manual_seed(0)
        for p in self.parameters:
            gradient = torch.randn(p.shape, generator=generator, device=p.device)
            p.grad = (1e-3 * gradient).to(p.dtype)
        self._kept = [p.grad.clone() for p in self.parameters if p.grad is not None]
        self._kind = kind
        capturable = problem.settings.on_cuda
        settings: dict[str, Any] = {"lr": lr, "weight_decay": WEIGHT_DECAY, "capturable": capturable}
        if kind == OURS:
            self.optimizer: torch.optim.Optimizer = SpectralAdamW(
                self.model.parameters(), model=self.model, strength=STRENGTH, **settings
            )
        else:
            self.optimizer = torch.optim.AdamW(
                self.parameters, fused=kind != FOREACH, foreach=kind == FOREACH, **settings
            )
        self._penalty: Callable[[], Any] = lambda: None
        if kind == ACCUMULATE:
            self._penalty = SpectralRegularizer(self.model, strength=STRENGTH).accumulate_grad_
        elif kind == USUAL:
            weights = [p for p in self.parameters if p.ndim > 1]
            biases = [p for p in self.parameters if p.ndim == 1]
            v = [x.to(problem.dtype) for x in problem.v]
            self._penalty = UsualPenalty(weights, biases, v, strength=STRENGTH).accumulate_grad_

    def step(self) -> None:
        """Gradients are as they are: what the penalty adds to them stays, and is too small to matter for time."""
        self._penalty()
        self.optimizer.step()

    def check(self) -> list[Tensor]:
        """The weights after the check's steps, each from the same gradients."""
        for _ in range(CHECK_STEPS):
            for p, g in zip(self.parameters, self._kept, strict=True):
                assert p.grad is not None
                p.grad.copy_(g)
            self.step()
        return [p.detach().double() for p in self.parameters]


def contender(problem: Problem, kind: str, graph: bool = False) -> Contender:
    trained = Trained(problem, kind)
    step: Callable[[], None] = trained.step
    note = backend_note(problem.device.kind, "adamw_step") if kind == OURS else ""
    if not graph:
        out = Contender(step, note=note, optional=kind != OURS)
    else:
        captured = Captured(step)
        out = Contender(captured, note=note, optional=True)

        def capture() -> float:
            captured.capture()
            out.note = f"{note}, {held(captured)}" if note else held(captured)
            return 0.0

        out.error = capture
    if kind in (OURS, ACCUMULATE) and not graph and not problem.in_bfloat16:
        out.error, out.tolerance = lambda: agreement(problem, kind), TOLERANCE
    return out


def agreement(problem: Problem, kind: str) -> float:
    # There are no float64 kernels on CUDA, and without them a large model takes minutes: there ours is held against the
    # penalty apart in float32.
    exact = None if problem.settings.on_cuda else torch.float64
    truth = Trained(problem, ACCUMULATE, CHECK_LR, exact).check()
    found = Trained(problem, kind, CHECK_LR).check()
    return max((x - y).abs().max().item() for x, y in zip(found, truth, strict=True)) / CHECK_LR


def case(model: str, dtype: str, settings: Settings) -> Case:
    problem = Problem(model, settings, dtype)
    kinds = (FUSED, FOREACH, ACCUMULATE, USUAL, OURS)
    contenders = {kind: contender(problem, kind) for kind in kinds}
    left_out = {}
    for kind, name in GRAPHS.items():
        if settings.on_cuda:
            contenders[name] = contender(problem, kind, graph=True)
        else:
            left_out[name] = "needs CUDA"
    moments = [torch.zeros_like(p, dtype=torch.float32) for p in problem.parameters for _ in range(2)]
    return Case(
        f"{OP}/{model}/{dtype}",
        f"Optimizer step with the penalty folded in, {model}, {dtype}",
        settings.device,
        read=problem.gradients,
        update=[*problem.parameters, *moments],
        contenders=contenders,
        notes=[
            f"Ratios are to {FUSED}, which has no penalty.",
            "Moments are float32 in ours and in the floor; torch keeps them in the weights' dtype.",
            STREAMS if problem.streams else IN_CACHE,
        ],
        left_out=left_out,
        cold=problem.streams,
    )


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    yield from builders(case, settings, CPU_MODELS, CUDA_MODELS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", CUDA_MODELS)
def test_adamw(time_alone: TimeAlone, case_of: CaseOf, model: str, dtype: str, name: str) -> None:
    time_alone(case_of(case, model, dtype), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    measured = measure(case_of(case, "mlp"), settings)
    names = {row["name"] for row in measured["rows"]}
    assert names >= {FUSED, FOREACH, ACCUMULATE, USUAL, OURS, FLOOR}
    assert names | set(measured["left_out"]) == set(NAMES)
