"""Hidden units: where the weights that make a unit, and those that read it, lie in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Units:
    """A layer of hidden units: made by the rows of one module's weight, read by the columns of another's.

    Args:
        name: of the incoming module in the model.
        incoming: a Linear or Conv2d; output row i of its weight (and its bias, if any) makes unit i.
        activation: the module whose output the units are, an instance of their own, so that a forward hook on it sees
            them: shape (N, F), (N, F, H, W) or (N, T, F), F = copies * U features, feature c * U + i being unit i's.
        outgoing: the Linear or Conv2d that reads them.
        dim: the dimension of the features in the activation's output: 1, or -1 for (N, T, F).
        copies: features of one unit: 1, or 2 for CReLU, which gives (relu(x), relu(-x)).
        norm: the normalisation between incoming and activation, with one scale and shift per unit, if it has any.
    """

    name: str
    incoming: nn.Module
    activation: nn.Module
    outgoing: nn.Module
    dim: int = 1
    copies: int = 1
    norm: nn.Module | None = None

    @property
    def count(self) -> int:
        """U, the number of units."""
        weight: Any = self.incoming.weight
        return weight.shape[0]

    def read_by(self, weight: Tensor) -> Tensor:
        """Outgoing weights as a view (outputs, copies, U, rest): [:, :, i] is what reads unit i.

        `rest` is the kernel of a Conv2d, or the positions that were flattened before a Linear.
        """
        return weight.view(weight.shape[0], self.copies, self.count, -1)
