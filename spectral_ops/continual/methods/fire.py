"""fire: every weight to the nearest isometry, at task boundaries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.optimizer_state import clear_all
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.parameters import Matrix, matrices

CUBIC = (1.5, -0.5)  # Newton-Schulz x <- 1.5 x - 0.5 x x'x: singular values below sqrt(3) go to 1


class Fire(Method):
    """W <- sqrt(out / in) / kernel * polar(W) at task boundaries, polar(W) = W (W'W)^(-1/2) by Newton-Schulz.

    polar(W) is the nearest matrix whose singular values are all 1. A conv weight is one matrix (out, in) for each of
    its `kernel` positions. Ten iterations from W / ||W||_F raise a small singular value by at most 1.5^10 = 58: those
    below about a fiftieth of ||W||_F stay below 1. Biases and norms are left alone.

    Args:
        iterations: of Newton-Schulz.
        output: whether the layer that gives the scores is among them.
        queries_keys_only: in a network with attention, the queries' and keys' weights alone, as the public code does
            for its vision transformer. False: every layer, as it does for its language model.
        reset_optimizer: whether moments and step counters begin anew, as in the public code, which makes a new
            optimizer at every boundary.

    Source: Han et al., ICLR 2026, arXiv 2602.08040, and its public code.
    """

    task_boundaries = True

    def __init__(
        self,
        context: Context,
        *,
        iterations: int = 10,
        output: bool = True,
        queries_keys_only: bool = True,
        reset_optimizer: bool = True,
    ):
        super().__init__(context)
        require_range("fire", "iterations", iterations, 1, 1000)
        self.iterations, self.reset_optimizer = iterations, reset_optimizer
        found = matrices(context.model, None if output else context.output)
        attention = [matrix for matrix in found if matrix.parts == 3]
        self._only_two = bool(attention) and queries_keys_only
        self._matrices = attention if self._only_two else found

    def on_task_boundary(self, task: int) -> None:
        for matrix in self._matrices:
            self._project(matrix)
        if self.reset_optimizer:
            clear_all(self.context.optimizer)

    @torch.no_grad()
    def _project(self, matrix: Matrix) -> None:
        weight = matrix.weight
        rows, columns = weight.shape[0] // matrix.parts, weight.shape[1]
        w = weight.reshape(matrix.parts, rows, columns, -1).permute(0, 3, 1, 2)  # (parts, kernel, out, in)
        scale = math.sqrt(rows / columns) / w.shape[1]
        isometries = scale * polar_factor(w, self.iterations)
        if self._only_two:
            isometries = torch.cat((isometries[:2], w[2:]))
        weight.copy_(isometries.permute(0, 2, 3, 1).reshape(weight.shape))


def polar_factor(w: Tensor, iterations: int) -> Tensor:
    """W (W'W)^(-1/2) of every matrix in (..., m, n), nearly; what is zero stays zero."""
    linear, cubic = CUBIC
    wide = w.shape[-2] < w.shape[-1]
    x = w.mT if wide else w  # tall, so that x'x is the smaller of the two
    # The Frobenius norm bounds the largest singular value: no iterate leaves the region of convergence.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(iterations):
        x = linear * x + cubic * x @ (x.mT @ x)
    return x.mT if wide else x
