"""The converged start of sharded matrices: the same iteration as for whole ones, its products summed over the ranks.

Lanczos on W'W with full reorthogonalisation (ops/spectral_norm.py: spectral_norm_ref), all matrices in step, so that
one all-reduce a step serves them all. Every rank computes the same numbers and stops at the same step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_ops.ops.power_iteration import another_unit_vector
from spectral_ops.ops.spectral_norm import MAX_ITER
from spectral_ops.sharding.read import Reader, State


def converged(reader: Reader, views: Sequence[Tensor], dtype: torch.dtype, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma, flat v, exponents) of the reader's matrices."""
    device = views[0].device
    widths = reader.n.tolist()
    exponents = torch.zeros(len(widths), dtype=torch.int32, device=device)
    runs = [_Lanczos(n, dtype, device, tol) for n in widths]
    while not all(run.done for run in runs):
        v = torch.cat([run.q for run in runs])
        products = reader.products(views, v, exponents)
        for run, z in zip(runs, products.z.split(widths), strict=True):
            run.advance(z)
    v = torch.cat([run.q for run in runs]) if runs else torch.zeros(0, dtype=dtype, device=device)
    state = State(v, exponents, v.new_zeros(len(widths)), v.new_zeros(reader.row_count))
    reader.read(views, state, 2.0)
    return state.sigma, state.v, state.exponents


class _Lanczos:
    """Of one matrix. `q` is the vector whose product comes next, and in the end the top right singular vector."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device, tol: float):
        start = torch.zeros(1, n, dtype=dtype, device=device)
        self.q = another_unit_vector(start)[0] if n > 1 else torch.ones(n, dtype=dtype, device=device)
        self.done = n < 2
        self._n, self._tol = n, tol
        self._basis: list[Tensor] = []
        self._projected = torch.zeros(MAX_ITER, MAX_ITER, dtype=torch.float64)

    def advance(self, z: Tensor) -> None:
        """Takes W'W q."""
        if self.done:
            return
        if not z.isfinite().all() or (not self._basis and not z.any()):
            self.done = True  # zero, or not finite, and so will be the last read
            return
        k = len(self._basis)
        self._basis.append(self.q)
        columns = torch.stack(self._basis, dim=1).double()
        for _ in range(2):  # twice is enough (Parlett, 6.9)
            h = columns.T @ z
            z = z - columns @ h
            self._projected[k, k] += h[k].item()
        beta = torch.linalg.vector_norm(z).item()
        values, vectors = torch.linalg.eigh(self._projected[: k + 1, : k + 1])
        eps = torch.finfo(self.q.dtype).eps
        self.done = beta * abs(vectors[-1, -1].item()) <= 2 * self._tol * values[-1].item()
        # What is left of z when the space is invariant is rounding.
        self.done = self.done or beta <= 4 * eps * self._projected.diagonal().max().item() or k + 1 == self._n
        if self.done or k + 1 == MAX_ITER:
            x = columns @ vectors[:, -1].to(columns)
            self.q, self.done, self._basis = (x / torch.linalg.vector_norm(x)).to(self.q), True, []
            return
        self._projected[k, k + 1] = self._projected[k + 1, k] = beta
        self.q = (z / beta).to(self.q)
