"""spectral-norm: every hidden layer divided by its largest singular value."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.parameters import Matrix, matrices


class SpectralNorm(Method):
    """W / sigma(W) in place of W in every hidden layer, by torch.nn.utils.parametrizations.spectral_norm.

    sigma by one step of power iteration per forward pass of training; the gradient goes through the division. A conv
    weight is read as (out, in * kernel). Of attention's packed weight queries, keys and values have each their own.

    Args:
        output: whether the layer that gives the scores is normalised as well, which bounds the scores.

    Source: Miyato et al. 2018, arXiv 1802.05957.
    """

    def __init__(self, context: Context, *, output: bool = False):
        super().__init__(context)
        if output:
            # The parameter itself stays what the optimizer holds. The first vectors are drawn from the global state.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.generator.initial_seed())
                hidden = {matrix.name for matrix in matrices(context.model, context.output)}
                for matrix in matrices(context.model):
                    if matrix.name not in hidden:
                        normalise(matrix)

    @classmethod
    def prepare(cls, model: nn.Module) -> None:
        for matrix in matrices(model, str(model.output)):
            normalise(matrix)


class _PartsNorm(nn.Module):
    """The parametrization of a weight whose `parts` matrices lie below each other."""

    # torch's own parametrization of one matrix; it has no public name, and spectral_norm() takes whole parameters only.
    def __init__(self, weight: Tensor, parts: int):
        super().__init__()
        self.norms = nn.ModuleList(parametrizations._SpectralNorm(part) for part in weight.chunk(parts))

    def forward(self, weight: Tensor) -> Tensor:
        parts = zip(self.norms, weight.chunk(len(self.norms)), strict=True)
        return torch.cat([norm(part) for norm, part in parts])


def normalise(matrix: Matrix) -> None:
    """Divide by its largest singular value, from now on and at every use."""
    if matrix.parts == 1:
        parametrizations.spectral_norm(matrix.module, matrix.attribute)
    else:
        parts = _PartsNorm(matrix.weight, matrix.parts)
        parametrize.register_parametrization(matrix.module, matrix.attribute, parts)
