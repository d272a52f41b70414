"""Trials of a sweep: strengths and learning rates, equally many points for every method, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

from spectral_ops.continual.choices import options_of
from spectral_ops.continual.methods import find_method
from spectral_ops.continual.variants import Table, Variant, named

AROUND = (10**-0.5, 1.0, 10**0.5)  # learning rates that are tried where none are named, times the run's


class Trial(NamedTuple):
    """A method at one strength (None: it has none) and one learning rate."""

    method: str
    table: Table
    strength: float | None
    lr: float
    variant: Variant

    @property
    def full_table(self) -> Table:
        return _with(self.table, self.strength, self.lr)


class Axis(NamedTuple):
    """Strengths or learning rates of a method; a free axis may be filled up, one that is not has a single value."""

    values: Sequence[Any]
    free: bool


class Choice(NamedTuple):
    """A method's best trial and its mean, None where no trial has one, and what of it lies on an edge of the grid.

    `finished` trials have a mean: what it is the best of.
    """

    trial: Trial | None
    mean: float | None
    edges: list[str]
    finished: int = 0


def plan_trials(
    tables: Sequence[Table], *, lr: float, strengths: Sequence[float] = (), lrs: Sequence[float] = ()
) -> list[Trial]:
    """The trials of all methods, equally many each; those of a method in ascending order.

    Args:
        tables: of the methods; a list for strength or lr is a grid of the method's own, a number is fixed.
        lr: the learning rate around which they are tried where neither a table nor `lrs` says which.
        strengths: of methods that have one and name none; empty: `Method.grid`.

    Raises:
        ValueError: a method with nothing to vary, or with strengths that are named nowhere.
    """
    rest = [{key: value for key, value in table.items() if key not in ("strength", "lr")} for table in tables]
    methods = [variant.label for variant in named(rest)]
    default_lrs = lrs or [_rounded(lr * factor) for factor in AROUND]
    axes = [(_strengths(table, strengths), _learning_rates(table, default_lrs)) for table in tables]
    rows = max((len(set(axis.values)) for axis, _ in axes if axis.free), default=1)
    columns = max((len(set(axis.values)) for other, axis in axes if axis.free and other.free), default=1)
    # Learning rates of a method with nothing else to vary fill the same number of trials: they multiply nobody's.
    alone = max((len(set(axis.values)) for other, axis in axes if axis.free and not other.free), default=1)
    columns = max(columns, math.ceil(alone / rows))
    points = [
        (method, table, *point)
        for method, table, pair in zip(methods, rest, axes, strict=True)
        for point in _grid(method, *pair, rows, columns)
    ]
    variants = named([_trial_label(table, strength, rate) for _, table, strength, rate in points])
    return [Trial(*point, variant) for point, variant in zip(points, variants, strict=True)]


def fill(values: Sequence[float], count: int) -> list[float]:
    """`count` values over the range of `values`, which are among them, in ascending order.

    Geometric means (to three digits, where these tell them apart) are put into the widest gap, again and again; between
    0 and another value, which have none, its half.
    A single value is first given a neighbour a decade away on both sides.

    Example:
        >>> fill((1e-4, 1e-2), 3)
        [0.0001, 0.001, 0.01]
    """
    made = sorted(set(values))
    if len(made) == 1:
        made = [_rounded(made[0] / 10), made[0], _rounded(made[0] * 10)][:count] if count > 1 else made
    while len(made) < count:
        gaps = [math.log(high / low) if low > 0 else 0.0 for low, high in pairwise(made)]
        at = gaps.index(max(gaps))
        low, high = made[at], made[at + 1]
        middle = math.sqrt(low * high) if low > 0 else high / 2
        short = _rounded(middle)
        made.insert(at + 1, short if low < short < high else middle)
    return made


def choose_trial(trials: Sequence[Trial], means: Mapping[str, float | None]) -> Choice:
    """The trial of the highest mean, the first of equal ones, among those that have a mean."""
    scored = [(mean, trial) for trial in trials if (mean := means[trial.variant.label]) is not None]
    if not scored:
        return Choice(None, None, [])
    mean, best = max(scored, key=lambda pair: pair[0])
    return Choice(best, mean, [*_edges("strength", best, trials), *_edges("lr", best, trials)], len(scored))


def _strengths(table: Table, default: Sequence[float]) -> Axis:
    kind = find_method(str(table["method"]))
    if "strength" in table:
        return _own_axis("strength", table)
    if "strength" not in options_of(kind):
        return Axis((None,), free=False)
    values = default or kind.grid
    if not values:
        raise ValueError(
            f"sweep: expected strengths for {table['method']}, which has no usual ones, got none. Give --strengths."
        )
    return Axis(values, free=True)


def _learning_rates(table: Table, default: Sequence[float]) -> Axis:
    return _own_axis("lr", table) if "lr" in table else Axis(default, free=True)


def _own_axis(name: str, table: Table) -> Axis:
    values = table[name] if isinstance(table[name], list) else [table[name]]
    if not values or not all(type(value) in (int, float) for value in values):
        raise TypeError(
            f"sweep: expected {name} of {table['method']} to be one number or several, got {table[name]!r}. Write it "
            f"like {name}=1e-4,1e-3."
        )
    return Axis([float(value) for value in values], free=isinstance(table[name], list))


def _grid(method: str, strengths: Axis, lrs: Axis, rows: int, columns: int) -> Iterator[tuple[float | None, float]]:
    """rows * columns points, whichever axes are free."""
    if not strengths.free and not lrs.free:
        raise ValueError(
            f"sweep: expected {method} to have a strength or a learning rate to vary, got both fixed. Free one of them."
        )
    each = rows if lrs.free else rows * columns
    other = columns if strengths.free else rows * columns
    return product(
        fill(strengths.values, each) if strengths.free else strengths.values,
        fill(lrs.values, other) if lrs.free else lrs.values,
    )


def _with(table: Table, strength: float | None, lr: float) -> Table:
    return {**table, **({} if strength is None else {"strength": strength}), "lr": lr}


def _trial_label(table: Table, strength: float | None, lr: float) -> Table:
    """The trial's table; a label of the user's own says which trial, too."""
    full = _with(table, strength, lr)
    if "label" in table:
        full["label"] = ",".join([f"{table['label']}", *(f"{k}={full[k]:g}" for k in ("strength", "lr") if k in full)])
    return full


def _edges(name: str, best: Trial, trials: Sequence[Trial]) -> list[str]:
    value, tried = getattr(best, name), {getattr(trial, name) for trial in trials}
    if len(tried) == 1 or min(tried) < value < max(tried):
        return []
    return [f"{name} {value:g} is the {'lowest' if value == min(tried) else 'highest'}"]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
