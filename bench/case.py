"""A case: one op on one model, with everybody who computes it. Checked first, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.device import Device, counted_bytes
from bench.timing import Rounds, interleaved

FLOOR = "floor"


@dataclass(frozen=True)
class Settings:
    """How a run measures. `quick` shrinks models and rounds until nothing is worth reading but that it ran."""

    device: Device
    quick: bool = False

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
        return 5.0 if self.quick else 40.0


@dataclass
class Contender:
    """One way to compute the thing.

    Args:
        run: what is timed.
        error: computes once from a fixed start and returns the largest relative error against float64.
        tolerance: the error allowed.
        note: what a reader must know of this row.
        approximate: where it misses the tolerance, it stays in the table with its error.
    """

    run: Callable[[], Any]
    error: Callable[[], float] | None = None
    tolerance: float = 0.0
    note: str = ""
    approximate: bool = False


@dataclass
class Case:
    """Args: name "op/model"; read, update: the memory the op must move; contenders by name, the
    one that the others are compared with first; notes on all."""

    name: str
    title: str
    device: Device
    read: Sequence[Tensor]
    update: Sequence[Tensor]
    contenders: dict[str, Contender]
    notes: list[str] = field(default_factory=list)
    # Whether CUDA samples begin with an L2 that holds nothing of the model.
    cold: bool = True

    def __post_init__(self) -> None:
        run, kind = self.device.floor(self.read, self.update)
        self.contenders[FLOOR] = Contender(run, note=kind)

    @property
    def base(self) -> str:
        """The contender that the others are compared with."""
        return next(iter(self.contenders))

    @property
    def bytes(self) -> int:
        return counted_bytes(self.read, self.update)


Builder = Callable[[str, Settings], Case]  # of the case for a model

# The fixtures of conftest.py.
CaseOf = Callable[[Builder, str], Case]
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


def measure(case: Case, settings: Settings) -> dict[str, Any]:
    """Checks all contenders, times them interleaved, and returns the case as the results file holds it."""
    errors = {name: check(case, name) for name in case.contenders}
    device = case.device
    rounds = interleaved(
        {name: contender.run for name, contender in case.contenders.items()},
        device.cold_sample if case.cold else device.sample,
        rounds=settings.rounds,
        warmup=settings.warmup,
        budget_s=settings.budget_s,
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
        "notes": case.notes,
        "rows": [_row(case, name, rounds, errors[name]) for name in case.contenders],
    }


def _row(case: Case, name: str, rounds: Rounds, error: float | None) -> dict[str, Any]:
    seconds = rounds.summary(name)
    return {
        "name": name,
        "seconds": asdict(seconds),
        "gb_per_s": case.bytes / seconds.median * 1e-9,
        "to_floor": asdict(rounds.ratios(name, FLOOR)),
        "to_base": asdict(rounds.ratios(name, case.base)),
        "over_base_seconds": asdict(rounds.differences(name, case.base)),
        "calls": rounds.calls[name],
        "error": error,
        "peak_bytes": case.device.peak_bytes(case.contenders[name].run),
        "note": case.contenders[name].note,
    }


def random_unit_vectors(sizes: Sequence[int], device: str) -> list[Tensor]:
    """A start far from converged, so that a wrong step cannot hide behind a right vector."""
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
    return [(x / x.norm()).float().to(device) for x in vectors]
