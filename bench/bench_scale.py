"""The ladder of vision transformers on one device: penalty alone, with gradient, and in the optimizer's step.

The block matrices of real modules, q, k and v a matrix each, by a `Rule` as a user would write it. Weights and
gradients are shared by all contenders, so that the largest model that fits is measured.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import truth
from bench.bench_adamw import FUSED, LR, WEIGHT_DECAY, agreement
from bench.bench_adamw import OURS as FOLDED
from bench.bench_adamw import TOLERANCE as STEP_TOLERANCE
from bench.case import FLOOR, Case, Contender, Settings, measure, random_unit_vectors
from bench.cost_model import GRADIENT, OURS, TORCH, VALUE, held_bytes
from bench.graph import Captured
from bench.models import SEED
from bench.problem import BFLOAT16_GRADIENT, STRENGTH, TOLERANCE, Problem, backend_note, held
from bench.transformer import Block
from bench.vit_shapes import VITS, ViT
from spectral_ops import SpectralAdamW, SpectralRegularizer
from spectral_ops.rules import Rule

OP = "scale"
MEASURED = (VALUE, GRADIENT, OURS)
READING, ADDING = "reg()", "accumulate_grad_"
QUICK_MODEL = "vit-s"
TREATED: dict[str, Any] = {"rules": {"*qkv.weight": Rule(split=(3, 0))}, "biases": False, "norms": False}
# Of free memory a rung may fill: the rest is for workspaces, float64 checks and what a capture keeps.
MEMORY_SHARE = 0.85
BUDGET_S = 30.0  # of the rounds of one case on a CPU


def timm_blocks(name: str) -> nn.Module | None:
    """The blocks of timm's model of that name; None where timm is not installed, or a broken torchvision beside it."""
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError):
        return None
    blocks: nn.Module = timm.create_model(name, num_classes=0).blocks
    return blocks


def blocks_of(shape: ViT, device: str, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """The blocks of a model, the same weights at every call on one device, and where they are from."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []):
        torch.manual_seed(SEED)
        with torch.device(device):
            real = timm_blocks(shape.timm) if shape.timm is not None else None
        if real is not None:
            return real.to(dtype), f"timm's {shape.timm}"
        # Without torch's own initialisation, which would make 22 billion parameters in float32 first.
        heads = max(1, shape.width // 64)
        with torch.device("meta"):
            made = nn.ModuleList(Block(shape.width, shape.mlp, heads) for _ in range(shape.depth))
        blocks = made.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for p in blocks.parameters():
                p.normal_(std=p.shape[-1] ** -0.5) if p.ndim > 1 else p.zero_()
    return blocks, f"shapes of {shape.source}"


class Rung:
    """One model of the ladder: its block matrices, gradients of zero, a start of the vectors and the truth from there.

    Args:
        name: one of VITS; a quick run takes one block of a quarter of the width.
    """

    def __init__(self, name: str, dtype: str, settings: Settings):
        self.name, self.dtype, self.settings, self.device = name, dtype, settings, settings.device
        shape = VITS[name]
        if settings.quick:
            shape = ViT(shape.width // 4, 1, shape.mlp // 4, shape.source, shape.patch)
        self.blocks, self.source = blocks_of(shape, settings.device.kind, getattr(torch, dtype))
        self.weights = [p for p in self.blocks.parameters() if p.ndim > 1]
        for w in self.weights:
            w.grad = torch.zeros_like(w)

    @property
    def gradients(self) -> list[Tensor]:
        return [w.grad for w in self.weights if w.grad is not None]

    @cached_property
    def reg(self) -> SpectralRegularizer:
        return SpectralRegularizer(self.blocks, strength=STRENGTH, **TREATED)

    def restart(self) -> list[Tensor]:
        """Sets the regularizer's vectors far from converged, and returns them part by part."""
        state = self.reg.state_dict()
        sizes = [x.shape for x in state["v"].values()]
        parts = random_unit_vectors([n for count, n in sizes for _ in range(count)], self.device.kind)
        rest = iter(parts)
        state["v"] = {name: torch.stack([next(rest) for _ in v]) for name, v in state["v"].items()}
        self.reg.load_state_dict(state)
        return parts

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """Every part as a view of its own, in the order of the vectors."""
        out: list[Tensor] = []
        for w in tensors:
            out += w.chunk(3) if w.shape[0] == 3 * w.shape[1] else [w]
        return out

    def value_error(self) -> float:
        true = truth.warm_step(self.parts([*self.weights]), [], self.restart())
        return truth.relative_error(read(self.reg), STRENGTH * true.value)

    def gradient_error(self) -> float:
        true = truth.warm_step(self.parts([*self.weights]), [], self.restart())
        for g in self.gradients:
            g.zero_()
        errors = [truth.relative_error(self.reg.accumulate_grad_(), STRENGTH * true.value)]
        for g, dw, scale in zip(self.parts(self.gradients), true.dw, true.scale, strict=True):
            errors.append(truth.relative_error(g, STRENGTH * dw, STRENGTH * scale))
        for g in self.gradients:
            g.zero_()
        return truth.largest(errors)


@torch.no_grad()
def read(reg: SpectralRegularizer) -> Tensor:
    return reg(advance=False)


def contenders(run: Callable[[], Any], name: str, settings: Settings, **checked: Any) -> dict[str, Contender]:
    """A call, and on CUDA the same in a graph."""
    found = {name: Contender(run, **checked)}
    if settings.on_cuda:
        captured = Captured(run)
        found[f"{name}, graph"] = graphed = Contender(captured, optional=True)

        def capture() -> float:
            captured.capture()
            graphed.note = held(captured)
            return 0.0

        graphed.error = capture
    return found


def value_case(rung: Rung) -> Case:
    note = backend_note(rung.device.kind, "power_iteration")
    checked = {"error": rung.value_error, "tolerance": TOLERANCE, "note": f"under no_grad, {note}"}
    found = contenders(partial(read, rung.reg), READING, rung.settings, **checked)
    return case(rung, VALUE, "Penalty value", rung.weights, [], found)


def gradient_case(rung: Rung) -> Case:
    tolerance = TOLERANCE if rung.dtype == "float32" else BFLOAT16_GRADIENT
    checked = {"error": rung.gradient_error, "tolerance": tolerance}
    checked["note"] = backend_note(rung.device.kind, "accumulate_grad_")
    found = contenders(rung.reg.accumulate_grad_, ADDING, rung.settings, **checked)
    return case(rung, GRADIENT, "Penalty gradient added into .grad", rung.weights, rung.gradients, found)


def optimizer_case(rung: Rung) -> Case:
    options: dict[str, Any] = {"weight_decay": WEIGHT_DECAY, "capturable": rung.settings.on_cuda}
    ours = SpectralAdamW(rung.weights, LR, model=rung.blocks, strength=STRENGTH, **TREATED, **options)
    # The same memory under parameters of torch's own: what it marks as changed is not what SpectralAdamW watches, which
    # would read all weights again. A learning rate of 0 takes the same time and leaves them as they are.
    aliases = [nn.Parameter(w.data) for w in rung.weights]
    for alias, w in zip(aliases, rung.weights, strict=True):
        alias.grad = w.grad
    torchs = torch.optim.AdamW(aliases, lr=0.0, fused=True, **options)
    ours.step()
    moments = [ours.state[w][key] for w in rung.weights for key in ("exp_avg", "exp_avg_sq")]
    checked: dict[str, Any] = {"note": backend_note(rung.device.kind, "adamw_step")}
    if rung.dtype == "float32":  # torch's moments are in the weights' dtype: in bfloat16 there is nothing to agree on
        part = partial(Problem, rung.name, rung.settings, rung.dtype, blocks=1)
        checked |= {"error": lambda: agreement(part(), FOLDED), "tolerance": STEP_TOLERANCE}
    found = contenders(torchs.step, FUSED, rung.settings)
    found |= contenders(ours.step, FOLDED, rung.settings, **checked)
    out = case(rung, OURS, "Optimizer step", rung.gradients, [*rung.weights, *moments], found)
    out.notes += ["Moments are float32 in ours and in the floor.", "Agreement: on one block."]
    return out


def case(
    rung: Rung, op: str, title: str, read: list[nn.Parameter] | list[Tensor], update: list[Tensor], found: Any
) -> Case:
    return Case(
        f"{OP}/{op}/{rung.name}/{rung.dtype}",
        f"{title}, {rung.name}, {rung.dtype}",
        rung.device,
        read=read,
        update=update,
        contenders=found,
        notes=[f"Block matrices by {rung.source}; q, k and v a matrix each."],
        left_out={} if rung.settings.on_cuda else {f"{name}, graph": "needs CUDA" for name in found},
        budget_s=None if rung.settings.quick or rung.settings.on_cuda else BUDGET_S,
    )


CASES = {VALUE: value_case, GRADIENT: gradient_case, OURS: optimizer_case}


def needed_bytes(op: str, parameters: int, dtype: str, built: bool) -> int:
    """What measuring an op takes beside what a rung holds: both moments of ours and of torch's in the optimizer's step.

    Args:
        built: weights and gradients are there already.
    """
    moments = held_bytes(OURS, parameters, dtype) + held_bytes(TORCH, parameters, dtype)
    held = held_bytes(GRADIENT, parameters, dtype)
    return (moments - 2 * held if op == OURS else 0) + (0 if built else held)


def free_bytes(kind: str) -> int:
    if kind == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def too_large(op: str, name: str, dtype: str, settings: Settings, built: bool) -> str:
    """Why an op cannot be measured on a rung here; empty where it can. See `needed_bytes`."""
    if settings.quick:
        return ""
    needed = needed_bytes(op, VITS[name].parameters, dtype, built)
    free = free_bytes(settings.device.kind)
    if needed <= MEMORY_SHARE * free:
        return ""
    return f"takes {needed * 1e-9:.0f} GB of memory, {free * 1e-9:.0f} GB are free"


def resident_peak(run: Callable[[], Any]) -> int | None:
    """Memory of the process that a call takes beyond what is resident before it; None where the system does not tell.

    torch keeps an account of CUDA's memory alone. What the allocator holds already and gives again is not seen: at most
    some tens of MB, above which glibc asks the system anew.
    """
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is what is resident now
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


@pytest.mark.parametrize("op", MEASURED)
def test_interleaved(settings: Settings, op: str) -> None:
    measured = measure(CASES[op](Rung(QUICK_MODEL, "float32", settings)), settings)
    expected = {VALUE: {READING}, GRADIENT: {ADDING}, OURS: {FUSED, FOLDED}}[op]
    assert {row["name"] for row in measured["rows"]} >= expected | {FLOOR}
