"""Singular values in float64, and the rank they speak of."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of singular values (..., k) divided by their sum, (...); nan where all are 0.

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def singular_values(w: Tensor) -> Tensor:
    """All min(m, n) of matrices (..., m, n), float64 (..., min(m, n)), descending; nan where w is not finite.

    Of float64 by the SVD, of anything else by the eigenvalues of the smaller Gram matrix in float64: several times
    faster, and off by less than the rounding of the elements of w.
    """
    if not w.isfinite().all():
        return w.new_full((*w.shape[:-2], min(w.shape[-2:])), math.nan, dtype=torch.float64)  # LAPACK would raise
    if w.dtype == torch.float64:
        return torch.linalg.svdvals(w)
    w = w.double()
    return roots(w.mT @ w if w.shape[-2] > w.shape[-1] else w @ w.mT)


def roots(gram: Tensor) -> Tensor:
    """The singular values of what gram (..., k, k) is the Gram matrix of."""
    values = torch.linalg.eigvalsh(gram).flip(-1)
    # What is below the rounding of the largest eigenvalue is noise: its square root would count as rank.
    noise = gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., :1]
    return torch.where(values > noise, values, 0).sqrt()
