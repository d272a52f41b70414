"""Paired, interleaved timing: round robin A, B, C, A, B, C, ..., medians, and medians of per-round ratios.

Shared machines drift by tens of per cent within seconds. Contenders that take turns see the same drift, and a ratio
taken within one round cancels most of it; two separate runs would not.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Run = Callable[[], Any]
Sample = Callable[[Run, int], float]  # (what, calls) -> seconds per call

# A shorter call is repeated within its round until it fills this: the clock and the loop around it cost ~0.2 us. Much
# longer samples would outlast a time slice of the scheduler (~3 ms), and on a busy machine all be interrupted.
SHORTEST_SAMPLE = 5e-4
MOST_CALLS = 1000


@dataclass(frozen=True)
class Summary:
    """Median, quartiles and extremes of a list of numbers."""

    median: float
    q25: float
    q75: float
    min: float
    max: float


@dataclass(frozen=True)
class Rounds:
    """Seconds per call by contender, one entry per round, paired: the i-th entries were taken together."""

    seconds: dict[str, list[float]]
    calls: dict[str, int]

    @property
    def count(self) -> int:
        return len(next(iter(self.seconds.values())))

    def summary(self, name: str) -> Summary:
        return summarise(self.seconds[name])

    def ratios(self, name: str, base: str) -> Summary:
        """How many times base's time `name` takes, round by round."""
        return summarise([a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)])

    def differences(self, name: str, base: str) -> Summary:
        """Seconds that `name` takes more than base, round by round."""
        return summarise([a - b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)])


def summarise(values: list[float]) -> Summary:
    """Quartiles as numpy's default: linear between the sorted values."""
    ordered = sorted(values)
    if not ordered or not all(math.isfinite(x) for x in ordered):
        raise ValueError(f"summarise: expected values to be finite and at least one, got {ordered[:5]}. Measure again.")

    def quantile(q: float) -> float:
        at = q * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    return Summary(statistics.median(ordered), quantile(0.25), quantile(0.75), ordered[0], ordered[-1])


def calls_per_sample(seconds: float, shortest: float = SHORTEST_SAMPLE) -> int:
    """How many calls make a sample of at least `shortest` seconds, given the seconds of one."""
    if seconds <= 0:
        return MOST_CALLS
    return min(MOST_CALLS, max(1, math.ceil(shortest / seconds)))


def interleaved(
    contenders: Mapping[str, Run],
    sample: Sample,
    *,
    rounds: int,
    warmup: int,
    budget_s: float = math.inf,
    fewest_rounds: int = 5,
    repeat: bool = True,
    now: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Times every contender once per round, in turns.

    Args:
        contenders: what to call, by name. Each round begins with the next of them, so that none always goes first and
            none ever follows itself.
        sample: a device's clock.
        rounds: counted rounds.
        warmup: rounds before these, not counted; the last of them says how many calls make a sample.
        budget_s: once this much time has passed no new round is begun, but for the first `fewest_rounds`; nor, after a
            quarter of it, a warm-up round, but for the first.
        repeat: False where one sample is one call whatever it takes (cold caches).
    """
    if rounds < 1 or warmup < 1:
        raise ValueError(f"interleaved: expected rounds and warmup to be at least 1, got {rounds}, {warmup}. Use 1.")
    names = list(contenders)
    calls = dict.fromkeys(names, 1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall on one contender of a round
    try:
        started = now()
        for i in range(warmup):
            if i > 0 and now() - started > budget_s / 4:
                break
            # Each with the count that its last sample asks for: the first call of all may build tables or compile.
            for name in names:
                taken = sample(contenders[name], calls[name])
                calls[name] = calls_per_sample(taken) if repeat else 1
        for i in range(rounds):
            if i >= fewest_rounds and now() - started > budget_s:
                break
            first = i % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(sample(contenders[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return Rounds(seconds, calls)
