"""Units by what they give: those that are silent, those that say the same, and how many directions are left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_ops.continual.measures.spectra import effective_rank, roots
from spectral_ops.continual.units import Units

ROWS = 1 << 14  # of activations that are in float64 at once

OF_UNITS = ("dormant", "duplicate", "feature_rank")


def of_activations(layer: Units, output: Tensor, dormant: float, duplicate: float) -> dict[str, float]:
    """Of the activations of one layer, whose features lie along layer.dim."""
    features = layer.copies * layer.count
    if output.shape[layer.dim] != features:
        raise ValueError(
            f"probe: expected the activation of units {layer.name!r} to have {features} features, got shape "
            f"{tuple(output.shape)} with {output.shape[layer.dim]} along dimension {layer.dim}. Correct dim or copies."
        )
    rows = output.movedim(layer.dim, -1).reshape(-1, features)  # (samples * positions, copies * U)
    if not rows.isfinite().all():
        return dict.fromkeys(OF_UNITS, math.nan)
    blocks = rows.split(ROWS)
    activity = torch.linalg.vector_norm(rows, 1, 0, dtype=torch.float64).view(layer.copies, -1).sum(0)
    gram = _gram(blocks)
    values = roots(gram if len(rows) >= features else _gram([rows.T]))
    return {
        "dormant": (activity <= dormant * activity.mean()).double().mean().item(),
        "duplicate": _duplicates(gram, layer.copies, duplicate),
        "feature_rank": effective_rank(values).item(),
    }


def _gram(blocks: Sequence[Tensor]) -> Tensor:
    """A^T A in float64, for the blocks of rows that make A."""
    n = blocks[0].shape[1]
    gram = blocks[0].new_zeros(n, n, dtype=torch.float64)
    for block in blocks:
        gram.addmm_(block.double().T, block.double())
    return gram


def _duplicates(gram: Tensor, copies: int, threshold: float) -> float:
    """The share of units with a cosine above the threshold to an earlier one; `gram` is of the features."""
    features = gram.unflatten(0, (copies, -1)).unflatten(2, (copies, -1))  # (copies, U, copies, U)
    products = features.diagonal(dim1=0, dim2=2).sum(-1)  # (U, U): a unit's copies are one vector
    norms = products.diagonal().sqrt()
    # Not a division: a unit that is never active has no direction, and 0 > 0 is false.
    alike = products > threshold * norms[:, None] * norms
    return alike.tril(-1).any(1).double().mean().item()
