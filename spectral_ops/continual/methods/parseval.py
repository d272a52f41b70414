"""parseval: rows of every hidden weight toward orthogonality."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.options import require_range
from spectral_ops.continual.methods.parameters import Matrix, gradients, matrices


class Parseval(Method):
    """Adds strength * sum over weights of ||W W' - scale * I||_F^2: singular values toward sqrt(scale).

    The gradient is 4 * strength * (W W' - scale * I) W; coupled. Where W (m, n) has m > n the equal W (W'W - scale * I)
    is computed, on the smaller side: ||W W' - s I||^2 and ||W'W - s I||^2 differ by the constant s^2 (m - n).

    Args:
        strength: the coefficient of the sum of squares.
        scale: what the squared singular values are pulled to.
        output: whether the layer that gives the scores is among them.

    Conv weights are read as (out, in * kernel), packed attention weights as three. Biases and norms are left alone.

    Source: Chung et al. 2024, arXiv 2412.07224, with their scale 2 = sqrt(2)^2 and, as theirs, hidden layers only.
    """

    grid = (1e-5, 1e-4, 1e-3, 1e-2)

    def __init__(self, context: Context, *, strength: float = 1e-3, scale: float = 2.0, output: bool = False):
        super().__init__(context)
        require_range("parseval", "strength", strength, 0, math.inf)
        require_range("parseval", "scale", scale, 0, math.inf)
        self.strength, self.scale = strength, scale
        found = matrices(context.model, None if output else context.output)
        self._matrices = [matrix for matrix in found if matrix.weight.requires_grad]

    @torch.no_grad()
    def after_backward(self) -> None:
        if self._matrices:  # a linear classifier has none that is hidden
            steps = [self._step(matrix) for matrix in self._matrices]
            torch._foreach_add_(gradients([m.weight for m in self._matrices]), steps, alpha=4 * self.strength)

    def _step(self, matrix: Matrix) -> Tensor:
        """(W W' - scale * I) W, of the weight's shape."""
        w = matrix.weight.unflatten(0, (matrix.parts, -1)).flatten(2)  # (parts, m, n)
        wide = w.shape[1] <= w.shape[2]
        gram = w @ w.mT if wide else w.mT @ w
        gram.diagonal(dim1=1, dim2=2).sub_(self.scale)
        return (gram @ w if wide else w @ gram).view_as(matrix.weight)
