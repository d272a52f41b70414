"""How a stack of networks is read by SpectralRegularizer and SpectralAdamW: each weight as a packed layer's."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_ops.continual.ensemble.refused import REMEDY, CannotShare
from spectral_ops.layers import Entry
from spectral_ops.ops.layout import Kind
from spectral_ops.rules import Pattern, Rule


def stacked_rules(entries: Sequence[Entry], count: int) -> tuple[dict[Pattern, Rule | str], dict[Pattern, float]]:
    """Rules and targets by name, of as many networks as are stacked, from how one of them is read.

    A weight is as many matrices as there are networks, or more. A bias counts by its norm, so that it is cut into those
    of the networks, too.

    Raises:
        CannotShare: a conv layer that is read as an operator.
    """
    rules: dict[Pattern, Rule | str] = {}
    targets: dict[Pattern, float] = {}
    for entry in entries:
        layout = entry.layout
        if layout is None:
            rules[entry.name] = "skip"
            continue
        if layout.operator is not None:
            raise CannotShare(f"run_together: expected spectral with conv reshape, got conv operator. {REMEDY}")
        kind = layout.kind.name.lower()
        if layout.kind in (Kind.SCALE, Kind.SHIFT):
            rules[entry.name] = kind
        else:
            assert layout.split_dim == 0, "a part of a stack is a block of rows"
            rules[entry.name] = Rule(kind, split=(count * layout.parts, 0))
        if layout.kind in (Kind.MATRIX, Kind.SCALE):
            targets[entry.name] = entry.target
    return rules, targets
