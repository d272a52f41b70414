"""Singular values of a network's weights, and what is read off them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectral_ops.continual.measures.spectra import effective_rank, singular_values
from spectral_ops.ops.layout import as_matrices
from spectral_ops.recognition import recognise
from spectral_ops.rules import Found, Owner, collect


class Weight(NamedTuple):
    """A weight as its layer uses it, (parts, m, n), and the names of the parameters it is made of."""

    matrices: Tensor
    parameters: list[str]


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Every weight that is recognised as matrices, by name, and what a parametrization makes in place of one."""
    found = [(f, [f.name]) for f in (collect(model) if next(model.parameters(), None) is not None else [])]
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        prefix = f"{name}." if name else ""
        for attribute in module.parametrizations:
            value, full = getattr(module, attribute), prefix + attribute
            path = f"{prefix}parametrizations.{attribute}."
            sources = [source for source, _ in model.named_parameters() if source.startswith(path)]
            found.append((Found(full, value, [Owner(module, attribute, full)]), sources))
    out = {}
    for f, sources in found:
        layout = recognise(f)[0]
        if layout is not None and layout.is_matrix and f.parameter.is_floating_point() and f.parameter.numel():
            out[f.name] = Weight(as_matrices(f.parameter.detach(), layout).flatten(2), sources)
    return out


def of_matrices(w: Tensor) -> dict[str, float]:
    """Of the matrices (parts, m, n) of one weight, together."""
    values = singular_values(w)  # (parts, min(m, n))
    squares = values.square()
    return {
        "sigma": values[:, 0].max().item(),
        "effective_rank": effective_rank(values).mean().item(),
        "stable_rank": (squares.sum(1) / squares[:, 0]).mean().item(),
        "weight_norm": squares.sum().sqrt().item(),
    }
