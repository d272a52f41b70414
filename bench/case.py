"""A case: one op on one model, with everybody who computes it. Checked first, then timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import AUTOTUNE, VARIANTS, forget_compiled, needs_cuda
from bench.device import Device, counted_bytes
from bench.models import NAMES
from bench.timing import Rounds, interleaved

FLOOR = "floor"
DISAGREES = "disagrees with float64"  # how the reason begins for which a contender, and the run with it, fails
DTYPES = ("float32", "bfloat16")

# Which models are compiled for unless --full asks for all: ViT-B's 48 matrices take the compiler up to a minute, each
# mode and dtype anew, and a graph of ViT-g's 160 would take the whole of a run.
COMPILED_ON_CPU = ("mlp", "vit-s", "resnet18")
COMPILED_ON_CUDA = (("mlp", "float32"), ("mlp", "bfloat16"), ("vit-b", "bfloat16"))
# No compiler is started with less than this left of a run's minutes.
COMPILE_RESERVE_S = 120.0
# A baseline that takes longer than this for one call on CUDA is left out of the rounds, its time noted, unless --full
# asks for all: five rounds of it would take more than the other contenders together.
LONGEST_CALL_S = 0.5


@dataclass(frozen=True)
class Settings:
    """How a run measures, and what.

    Args:
        device: where.
        quick: shrinks models and rounds until nothing is worth reading but that it ran.
        full: whatever is slow to compile, too.
        models, dtypes: these alone; None: what the benchmark takes on this device.
        deadline: of time.perf_counter(), after which no case is begun.
    """

    device: Device
    quick: bool = False
    full: bool = False
    models: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    deadline: float | None = None

    @property
    def on_cuda(self) -> bool:
        return self.device.kind == "cuda"

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 31

    @property
    def fewest_rounds(self) -> int:
        return 2 if self.quick else 5

    @property
    def warmup(self) -> int:
        return 1 if self.quick else 3

    @property
    def budget_s(self) -> float:
        """Of the rounds of one case. On CUDA they are short, and the cases many."""
        return 5.0 if self.quick else 3.0 if self.on_cuda else 40.0

    @property
    def remaining_s(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.perf_counter()

    def grid(self, on_cpu: Sequence[str], on_cuda: Sequence[str]) -> list[tuple[str, str]]:
        """The (model, dtype) of a benchmark: those asked for, else its own choice for this device."""
        own = on_cuda if self.on_cuda else on_cpu
        names = own if self.models is None else [model for model in self.models if model in NAMES]
        return [(model, dtype) for model in names for dtype in self.chosen_dtypes]

    @property
    def chosen_dtypes(self) -> Sequence[str]:
        return self.dtypes or (DTYPES if self.on_cuda else DTYPES[:1])

    def left_out(self, name: str, model: str, dtype: str) -> str:
        """Why the baseline of this name is not run on this model; empty where it is."""
        if needs_cuda(name) and not self.on_cuda:
            return "needs CUDA"
        mode = VARIANTS[name].mode if name in VARIANTS else None
        if mode is None:
            return ""
        if self.quick:
            return "compiles for minutes; in full runs only"
        if self.on_cuda:
            usual = (model, dtype) in COMPILED_ON_CUDA
        else:
            usual = model in COMPILED_ON_CPU and (mode != AUTOTUNE or model == "mlp")
        return "" if usual or self.full else "compiles for minutes on this model; --full runs it"


@dataclass
class Contender:
    """One way to compute the thing.

    Args:
        run: what is timed.
        error: computes once from a fixed start and returns the largest relative error against float64.
        tolerance: the error allowed.
        note: what a reader must know of this row.
        approximate: where it misses the tolerance, it stays in the table with its error.
        compiles: a compiler runs at the first call.
        optional: a baseline, or a form of ours, that the device may refuse or compute wrongly: it is then left out, and
            the reason noted.
    """

    run: Callable[[], Any]
    error: Callable[[], float] | None = None
    tolerance: float = 0.0
    note: str = ""
    approximate: bool = False
    compiles: bool = False
    optional: bool = False


@dataclass
class Case:
    """Args: name "op/model/dtype"; read, update: the memory the op must move; contenders by name, the one that the
    others are compared with first; notes on all; left_out: why others are not here, by name."""

    name: str
    title: str
    device: Device
    read: Sequence[Tensor]
    update: Sequence[Tensor]
    contenders: dict[str, Contender]
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    # Whether CUDA samples begin with an L2 that holds nothing of the model.
    cold: bool = True
    rounds: int | None = None  # in place of the run's, as is the next
    budget_s: float | None = None

    def __post_init__(self) -> None:
        run, kind = self.device.floor(self.read, self.update)
        self.contenders[FLOOR] = Contender(run, note=kind)

    @property
    def base(self) -> str:
        """The contender that the others are compared with."""
        return next(iter(self.contenders))

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self.read[0].dtype).removeprefix("torch.")

    @property
    def bytes(self) -> int:
        return counted_bytes(self.read, self.update)


Builder = Callable[[str, str, Settings], Case]  # of the case for a model and a dtype

# The fixtures of conftest.py.
CaseOf = Callable[..., Case]  # (builder, model, dtype="float32")
TimeAlone = Callable[[Case, str], None]


def check(case: Case, name: str) -> float | None:
    """The contender's error. AssertionError where it does not agree with the truth."""
    contender = case.contenders[name]
    if contender.error is None:
        return None
    error = contender.error()
    if not error <= contender.tolerance and not contender.approximate:
        raise AssertionError(
            f"{case.name}, {name}: expected an error of at most {contender.tolerance:g} against float64, got {error:g}."
            " A time without a right result means nothing: correct it first."
        )
    return error


def builders(
    build: Builder, settings: Settings, on_cpu: Sequence[str], on_cuda: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Of every case of a benchmark: "model/dtype", and what builds it."""
    for model, dtype in settings.grid(on_cpu, on_cuda):
        yield f"{model}/{dtype}", partial(build, model, dtype, settings)


def entrants(case: Case, settings: Settings) -> tuple[dict[str, Contender], dict[str, float | None], dict[str, str]]:
    """Those that agree with the truth and can be timed, their errors, and why the others are left out."""
    entered, errors, left_out = {}, {}, dict(case.left_out)
    for name, contender in case.contenders.items():
        if contender.compiles and settings.remaining_s < COMPILE_RESERVE_S:
            left_out[name] = "the minutes of this run were nearly over"
            continue
        try:
            errors[name] = check(case, name)
            # The check has compiled, captured and loaded what it needs; this call is one like those of the rounds.
            taken = case.device.sample(contender.run) if settings.on_cuda and contender.optional else 0.0
        except AssertionError as error:
            if not contender.optional:
                raise
            left_out[name] = f"{DISAGREES}: {error}"
            continue
        except RuntimeError as error:
            if not contender.optional:
                raise
            left_out[name] = f"not possible here: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        if taken > LONGEST_CALL_S and not settings.full:
            left_out[name] = f"one call took {taken:.2f} s, too long for rounds of it; --full runs them"
            continue
        entered[name] = contender
    return entered, errors, left_out


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """Checks all contenders, times them interleaved, and returns the case as the results file holds it."""
    try:
        return _measure(case, settings)
    finally:
        forget_compiled()


def _measure(case: Case, settings: Settings) -> dict[str, Any]:
    entered, errors, left_out = entrants(case, settings)
    device = case.device
    rounds = interleaved(
        {name: contender.run for name, contender in entered.items()},
        device.cold_sample if case.cold else device.sample,
        rounds=case.rounds or settings.rounds,
        warmup=settings.warmup,
        budget_s=case.budget_s or settings.budget_s,
        fewest_rounds=settings.fewest_rounds,
        repeat=device.kind == "cpu" or not case.cold,
    )
    return {
        "name": case.name,
        "title": case.title,
        "bytes": case.bytes,
        "parameters": sum(t.numel() for t in case.read),
        "rounds": rounds.count,
        "warmup": settings.warmup,
        "cold": case.cold,
        "base": case.base,
        "dtype": case.dtype,
        "notes": case.notes,
        "left_out": left_out,
        "rows": [_row(case, name, rounds, errors[name]) for name in entered],
    }


def _row(case: Case, name: str, rounds: Rounds, error: float | None) -> dict[str, Any]:
    seconds = rounds.summary(name)
    run = case.contenders[name].run
    return {
        "name": name,
        "seconds": asdict(seconds),
        "gb_per_s": case.bytes / seconds.median * 1e-9,
        "to_floor": asdict(rounds.ratios(name, FLOOR)),
        "to_base": asdict(rounds.ratios(name, case.base)),
        "over_base_seconds": asdict(rounds.differences(name, case.base)),
        "calls": rounds.calls[name],
        "error": error,
        "host_seconds": case.device.host_seconds(run),
        "peak_bytes": case.device.peak_bytes(run),
        "launches": case.device.launches(run),
        "note": case.contenders[name].note,
    }


def random_unit_vectors(sizes: Sequence[int], device: str) -> list[Tensor]:
    """A start far from converged, so that a wrong step cannot hide behind a right vector."""
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
    return [(x / x.norm()).float().to(device) for x in vectors]
