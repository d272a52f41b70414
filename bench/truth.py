"""What every contender is checked against: the formulas of docs/design.md, section 2, in float64, layer by layer.

Written apart from the library, so that an error in its reference implementation does not agree with itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """One warm step: u, v and sigma of every matrix; R, and dR by matrix and by bias."""

    sigma: Tensor  # (L,)
    u: list[Tensor]
    v: list[Tensor]
    value: Tensor
    slope: list[Tensor]  # dR/ds of each matrix
    shapes: list[torch.Size]
    db: list[Tensor]
    scale: list[float]  # of each of dw: its norm before the two terms of s^k - t^k cancel

    @property
    def dw(self) -> Iterator[Tensor]:
        """dR/dW of each matrix, made when it is asked for: all of them in float64 would be twice a model."""
        for slope, u, v, shape in zip(self.slope, self.u, self.v, self.shapes, strict=True):
            yield (slope * torch.outer(u, v)).view(shape)


@torch.no_grad()
def warm_step(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    exponent: float = 2.0,
    target: float = 1.0,
) -> Step:
    """y = W v, z = W'y, s = ||z|| / ||y||; R = sum (s^k - t^k)^2 + sum ||b||^(2k); everything float64."""
    k = exponent
    value = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    sigmas, us, vs, slopes, db, scale = [], [], [], [], [], []
    for w, x in zip(weights, v, strict=True):
        matrix = w.detach().double().flatten(1)  # (m, n)
        y = matrix @ x.double()
        z = matrix.T @ y
        s, u, v_new = z.norm() / y.norm(), y / y.norm(), z / z.norm()
        value += (s**k - target**k) ** 2
        slope = 2 * k * s ** (k - 1) * (s**k - target**k)
        sigmas.append(s)
        us.append(u)
        vs.append(v_new)
        slopes.append(slope)
        scale.append((2 * k * s ** (k - 1) * (s**k + target**k)).item())
    for b in biases:
        x = b.detach().double()
        square = x.dot(x)
        value += square**k
        db.append(2 * k * square ** (k - 1) * x)
    return Step(torch.stack(sigmas), us, vs, value, slopes, [w.shape for w in weights], db, scale)


@torch.no_grad()
def largest_singular_values(weights: Sequence[Tensor]) -> Tensor:
    """sigma_1 of every matrix (L,), from the float64 eigenvalues of its smaller Gram matrix.

    The largest eigenvalue of a Gram matrix loses nothing to squaring: exact to about 1e-14, in a tenth of an SVD's
    time.
    """
    out = []
    for w in weights:
        matrix = w.detach().double().flatten(1)
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        out.append(torch.linalg.eigvalsh(gram)[-1].sqrt())
    return torch.stack(out)


def relative_error(found: Tensor, true: Tensor, scale: float | None = None) -> float:
    """||found - true|| / scale, the scale being ||true|| unless given; NaN stays NaN."""
    true = true.detach().double()
    difference = torch.linalg.vector_norm(found.detach().double() - true).item()
    return difference / (torch.linalg.vector_norm(true).item() if scale is None else scale)


def largest_error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """The largest of the relative errors of tensors; NaN wins."""
    return largest(relative_error(f, t) for f, t in zip(found, true, strict=True))


def largest(errors: Iterable[float]) -> float:
    """max() drops a NaN that does not come first; this lets it win."""
    return torch.tensor([*errors], dtype=torch.float64).max().item()
