"""`spectral-ops ablate`: what of the spectral penalty matters; a comparison of its variants."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectral_ops import SpectralRegularizer
from spectral_ops.continual.commands import BAD_INPUT, RunsConfig
from spectral_ops.continual.compare import Report, refuse_tuning_seeds, run_variants
from spectral_ops.continual.described import described
from spectral_ops.continual.methods import Context
from spectral_ops.continual.methods.spectral import Spectral
from spectral_ops.continual.trainer import run
from spectral_ops.continual.variants import Table, resolve_shared
from spectral_ops.continual.workers import RunFunction

INITIAL = "spectral_ops.continual.ablate:InitialTarget"

COMPLETE = "weights+biases+norms"  # the method as it is: with the output layer, target 1
VARIANTS: tuple[Table, ...] = (
    {"label": "none", "method": "none"},
    {"label": "weights", "method": "spectral", "biases": False, "norms": False},
    {"label": "weights+biases", "method": "spectral", "norms": False},
    {"label": COMPLETE, "method": "spectral"},
    {"label": "without-output", "method": "spectral", "output": False},
    {"label": "target-0.5", "method": "spectral", "target": 0.5},
    {"label": "target-2", "method": "spectral", "target": 2.0},
    {"label": "target-4", "method": "spectral", "target": 4.0},
    {"label": "target-initial", "method": INITIAL},
)


class InitialTarget(Spectral):
    """spectral, with the largest singular value of every matrix at initialization for its target.

    Of a parameter that holds several matrices (a packed qkv, the groups of a conv layer) it is their mean: a target
    belongs to a parameter.
    """

    def __init__(self, context: Context, *, strength: float = 1e-3, exponent: float = 2.0):
        start = SpectralRegularizer(context.model, strength=0.0).sigmas()
        target: Any = {name: sigma.mean().item() for name, sigma in start.items()}  # of a run that goes on, too
        super().__init__(context, strength=strength, exponent=exponent, target=target)


@dataclass(frozen=True, kw_only=True)
@described()
class AblateConfig(RunsConfig):
    """Compare variants of the spectral penalty on the same streams of tasks.

    Which parameters: weights, then biases, then scales and shifts of normalisation layers with them; without the output
    layer. Which target: 0.5, 1, 2, 4, and each layer's value at initialization. Beside them no penalty at all. The
    method as it is (all parameters, target 1) is weights+biases+norms. A network without normalisation layers, such as
    mlp without --model-options norm=layer, makes it the same as weights+biases.
    """

    out: Path
    """Folder: a run for each variant and seed in <variant>/seed-<n>, and report/."""
    strength: float | None = None
    """Of the penalty in every variant; default: that of spectral in --config (best.toml of a sweep), else 1e-3."""
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    """A run of each variant for each of them."""


def main(config: AblateConfig) -> int:
    """Compare variants of the spectral penalty on the same streams of tasks."""
    return ablate(config)


def ablate(config: AblateConfig, *, run: RunFunction = run, report: Report | None = None) -> int:
    """The exit status, as of `compare`."""
    try:
        base, methods, tuned_on = resolve_shared(config)
        refuse_tuning_seeds(config, tuned_on)
        chosen = next((table for table in methods if table.get("method") == "spectral"), {})
        strength = chosen.get("strength") if config.strength is None else config.strength
        base = replace(base, strength=None)
        if config.lr is None and "lr" in chosen:
            base = replace(base, lr=chosen["lr"])
    except BAD_INPUT as error:
        print(error, file=sys.stderr)
        return 2
    tables = variants_at(strength)
    return run_variants("ablate", config, base, tables, baseline=COMPLETE, run=run, report=report)


def variants_at(strength: float | None) -> list[Table]:
    """VARIANTS with a strength for those that have one; None: the method's default."""
    return [dict(table) if table["method"] == "none" else _with_strength(table, strength) for table in VARIANTS]


def _with_strength(table: Mapping[str, Any], strength: float | None) -> Table:
    return {**table, **({} if strength is None else {"strength": strength})}
