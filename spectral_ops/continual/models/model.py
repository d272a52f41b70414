"""The contract of a model, and the hidden layer that several of them are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor, nn

from spectral_ops.continual.models.activations import Activation
from spectral_ops.continual.units import Units


class Model(nn.Module):
    """A classifier of images (N, C, H, W) that can name its hidden units; it gives scores (N, classes).

    Args:
        input_shape: (C, H, W) of one image.
        classes: scores of every image.

    Raises:
        ValueError: sizes that cannot be.
    """

    output: ClassVar[str] = "head"
    """The module that gives the scores, a Linear."""
    by_rows: ClassVar[bool] = False
    """Whether samples are rows (N, features) from layer to layer, no row's scores depend on another, and a Linear or
    LayerNorm is used once. Gradients of single samples then need not be made to know their norms. It counts where it
    stands in the class that `forward` is from."""

    def __init__(self, input_shape: tuple[int, ...], classes: int):
        super().__init__()
        if len(input_shape) != 3 or min(input_shape) < 1:
            raise ValueError(
                f"model: expected input_shape to be three sizes >= 1, got {tuple(input_shape)}. "
                "Write (channels, height, width)."
            )
        check_sizes("model", classes=classes)

    def units(self) -> list[Units]:
        """Its hidden units in the order of the layers: those that a method may make anew one by one."""
        raise NotImplementedError

    def stacked(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> StackedModel | None:
        """S networks of this one's shape, their chain rule written out; None: vmap and autograd find the way.

        Args:
            parameters: by this model's names, each (S, ...), not to be differentiated.
            gradients: of those that are trained, of the same shapes, contiguous; `StackedModel.backward` fills them.
        """
        return None


class StackedModel(Protocol):
    """S networks, each on its own images."""

    def forward(self, x: Tensor) -> Tensor:
        """The scores (S, N, classes) of images (S, N, C, H, W), and what `backward` needs of them."""

    def backward(self, d: Tensor) -> None:
        """From the gradient of the last scores those of the parameters, in place of what they were."""


class HiddenLayer(nn.Module):
    """activation(norm(incoming(x))); features are along dimension 1."""

    def __init__(self, incoming: nn.Linear | nn.Conv2d, norm: nn.Module, activation: Activation):
        super().__init__()
        self.incoming, self.norm, self.activation = incoming, norm, activation.module(1)
        self.copies = activation.copies

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.incoming(x)))


def chain_units(model: nn.Module, head: nn.Module) -> list[Units]:
    """The units of a model whose hidden layers follow each other as they are registered; `head` reads the last."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HiddenLayer)}
    readers = [*(layer.incoming for layer in layers.values()), head][1:]
    return [
        Units(
            f"{name}.incoming",
            layer.incoming,
            layer.activation,
            reader,
            copies=layer.copies,
            norm=layer.norm if list(layer.norm.parameters()) else None,  # a plain one has nothing of a unit's own
        )
        for (name, layer), reader in zip(layers.items(), readers, strict=True)
    ]


def check_sizes(what: str, **sizes: int | tuple[int, ...]) -> None:
    """ValueError where one of them, or an item of one, is below 1."""
    for name, value in sizes.items():
        if any(size < 1 for size in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{what}: expected {name} >= 1, got {value}. Change {name}.")
