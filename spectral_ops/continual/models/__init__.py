"""Models by name. A new one is a file with a subclass of Model and a line here."""

from __future__ import annotations

from typing import Any

from spectral_ops.continual.choices import check_options, choose
from spectral_ops.continual.models.conv_net import ConvNet
from spectral_ops.continual.models.mlp import MLP
from spectral_ops.continual.models.model import Model, StackedModel
from spectral_ops.continual.models.resnet import ResNet18
from spectral_ops.continual.models.vit import ViTBase, ViTSmall, ViTTiny

MODELS: dict[str, type[Model]] = {
    "mlp": MLP,
    "conv": ConvNet,
    "resnet18": ResNet18,
    "vit-tiny": ViTTiny,
    "vit-small": ViTSmall,
    "vit-base": ViTBase,
}

__all__ = ["MODELS", "Model", "StackedModel", "build_model"]


def build_model(name: str, input_shape: tuple[int, ...], classes: int, **options: Any) -> Model:
    """The model of that name, freshly initialised from torch's global random state.

    Args:
        name: one of MODELS.
        input_shape: (C, H, W) of one image.
        classes: scores of every image.
        options: keyword arguments of the model's class, e.g. hidden=(100, 100), activation="crelu".

    Raises:
        ValueError: an unknown model or option, or a value that the model refuses.
        TypeError: an option of another type.

    Example:
        >>> build_model("mlp", (1, 28, 28), 10, norm="layer").units()[0].count
        256
    """
    kind = choose("model", name, MODELS)
    return kind(input_shape, classes, **check_options(f"model {name}", kind, options))
