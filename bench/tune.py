"""Constants of the kernels tried against one another, round by round: what a variant gains, and nothing is edited.

Each variant is a process of its own, since a kernel keeps what it was compiled with. All compile at the same time, and
that is most of the minutes; then they take turns on the device, one at a time, and ratios are taken within one round.
"""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bench.case import FLOOR, Settings
from bench.device import Device
from bench.graph import Captured
from bench.problem import Problem
from bench.table import aligned, duration
from bench.timing import summarise
from spectral_ops import SpectralAdamW

BASE = "base"
VALUE, GRADIENT = "value", "with gradient"
FUSED, FOLDED = "AdamW, fused", "SpectralAdamW"
OPS = ("penalty", "adamw")
ROUNDS, QUICK_ROUNDS = 15, 2
PACKAGE = "spectral_ops."

Times = dict[str, float]  # seconds by what was timed


@dataclass(frozen=True)
class Variant:
    """Constants that differ from the code's: (module below spectral_ops, name, value)."""

    name: str
    constants: tuple[tuple[str, str, Any], ...] = ()

    def apply(self) -> None:
        for module, name, value in self.constants:
            place = importlib.import_module(PACKAGE + module)
            old = getattr(place, name)
            setattr(place, name, old._make(value) if hasattr(old, "_make") else value)  # a Shape is given as a tuple


def parse(text: str) -> Variant:
    """Of "NAME=MODULE.CONSTANT=VALUE MODULE.CONSTANT=VALUE ...", values as Python literals without spaces.

    Raises:
        ValueError: a part of it is missing, no literal, or names no constant there is.
    """
    name, _, rest = text.partition("=")
    constants = []
    for part in rest.split():
        place, _, value = part.partition("=")
        module, _, constant = place.rpartition(".")
        try:
            known = hasattr(importlib.import_module(PACKAGE + module), constant) if module else False
            found = ast.literal_eval(value)
        except (ImportError, SyntaxError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"tune: expected MODULE.CONSTANT=VALUE with a constant of spectral_ops and a literal, got {part!r} in "
                f"{text!r}. Write for example strips=ops.cut.MAX_STRIP_BYTES=1048576."
            )
        constants.append((module, constant, found))
    if not name or not constants:
        raise ValueError(f"tune: expected NAME=MODULE.CONSTANT=VALUE, got {text!r}. Name the variant and a constant.")
    return Variant(name, tuple(constants))


def timed(problem: Problem, op: str) -> dict[str, Callable[[], Any]]:
    return timed_adamw(problem) if op == "adamw" else timed_penalty(problem)


def timed_adamw(problem: Problem) -> dict[str, Callable[[], Any]]:
    """torch's fused step without a penalty, and ours with it; on CUDA as graphs. The floor: all of their bytes."""
    options: dict[str, Any] = {"lr": 1e-6, "capturable": problem.device.kind == "cuda"}
    fused = torch.optim.AdamW(problem.model.parameters(), fused=True, **options)
    folded = SpectralAdamW(problem.model.parameters(), model=problem.model, strength=1e-6, **options)
    runs: dict[str, Callable[[], Any]] = {FUSED: fused.step, FOLDED: folded.step}
    if problem.device.kind == "cuda":
        runs = {name: Captured(run) for name, run in runs.items()}
    for run in runs.values():
        run()
    states = [folded.state[p] for p in problem.model.parameters()]
    updated = [*problem.model.parameters(), *(s[key] for s in states for key in ("exp_avg", "exp_avg_sq"))]
    floor, _ = problem.device.floor([p.grad for p in problem.model.parameters() if p.grad is not None], updated)
    return runs | {f"{name}, {FLOOR}": floor for name in runs}


def timed_penalty(problem: Problem) -> dict[str, Callable[[], Any]]:
    """The value, the step with gradient, and the floor of each; on CUDA as graphs, without the host's share."""
    reg, without = problem.regularizer(), problem.regularizer(biases=False)
    error = problem.gradient_error(reg.accumulate_grad_, problem.truth_from(reg))
    if not error <= problem.gradient_tolerance:
        raise AssertionError(f"expected an error of at most {problem.gradient_tolerance:g}, got {error:g}")

    @torch.no_grad()
    def value() -> Tensor:
        return without(advance=False)

    runs: dict[str, Callable[[], Any]] = {VALUE: value, GRADIENT: reg.accumulate_grad_}
    if problem.device.kind == "cuda":
        runs = {name: Captured(run) for name, run in runs.items()}
    for run in runs.values():
        run()
    runs[f"{VALUE}, {FLOOR}"], _ = problem.device.floor(problem.weights, [])
    runs[f"{GRADIENT}, {FLOOR}"], _ = problem.device.floor(problem.parameters, problem.gradients)
    return runs


def work(
    variant: Variant, kind: str, quick: bool, cases: Sequence[tuple[str, str]], op: str, pipe: Connection
) -> None:
    """A process: sends "ready" or why not, then answers the number of a case with one sample of everything in it."""
    try:
        variant.apply()
        settings = Settings(Device(kind), quick=quick)
        problems = [Problem(model, settings, dtype) for model, dtype in cases]  # kept: floors hold their addresses
        ready = [timed(problem, op) for problem in problems]
        pipe.send("ready")
    except Exception:
        pipe.send(traceback.format_exc(limit=-1))
        return
    while (case := pipe.recv()) is not None:
        pipe.send({name: settings.device.cold_sample(run) for name, run in ready[case].items()})


def run(
    variants: Sequence[Variant], kind: str, quick: bool, cases: Sequence[tuple[str, str]], op: str = OPS[0]
) -> str:
    """The table, as text; variants that failed are named below it."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for variant in (Variant(BASE), *variants):
        pipes[variant.name], other = context.Pipe()
        context.Process(target=work, args=(variant, kind, quick, cases, op, other), daemon=True).start()
        other.close()
    failed: dict[str, str] = {}
    for name, pipe in pipes.items():
        try:
            word = pipe.recv()
        except EOFError:
            word = "the process ended"
        if word != "ready":
            failed[name] = word.strip().splitlines()[-1]
    if BASE in failed:
        raise RuntimeError(f"tune: the code as it is failed: {failed[BASE]}")
    names = [name for name in pipes if name not in failed]
    lines = []
    for number, (model, dtype) in enumerate(cases):
        rounds = [{name: ask(pipes[name], number) for name in names} for _ in range(QUICK_ROUNDS if quick else ROUNDS)]
        lines.append(f"{model}, {dtype}\n{as_table(names, rounds)}")
    for name in names:
        pipes[name].send(None)
    return "\n\n".join([*lines, *(f"FAILED {name}: {reason}" for name, reason in failed.items())])


def ask(pipe: Connection, case: int) -> Times:
    pipe.send(case)
    found: Times = pipe.recv()
    return found


def as_table(names: Sequence[str], rounds: Sequence[dict[str, Times]]) -> str:
    """Medians, and medians of the ratios within each round: to the floor of the same process, and to the base."""
    timed = [what for what in rounds[0][BASE] if not what.endswith(FLOOR)]
    rows = [["", *(head for what in timed for head in (what, "x floor", "x base"))]]
    for name in names:
        row = [name]
        for what in timed:
            floor = f"{what}, {FLOOR}"
            row.append(duration(summarise([r[name][what] for r in rounds]).median))
            row.append(f"{summarise([r[name][what] / r[name][floor] for r in rounds]).median:.2f}")
            row.append(f"{summarise([r[name][what] / r[BASE][what] for r in rounds]).median:.3f}")
        rows.append(row)
    return "\n".join(aligned(rows))
