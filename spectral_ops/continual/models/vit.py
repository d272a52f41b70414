"""Vision transformers in the sizes of DeiT."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_ops.continual.choices import choose
from spectral_ops.continual.models.activations import ACTIVATIONS, Activation
from spectral_ops.continual.models.model import Model, check_sizes
from spectral_ops.continual.models.norms import VIT_NORMS, Norm
from spectral_ops.continual.units import Units

PATCHES = ((32, 4), (64, 8))  # side of an image up to which a patch of that side is taken: 64 patches at 32 and at 64
LARGE_PATCH = 16  # beyond: DeiT's, for images of 224
STD = 0.02  # of the initial weights, DeiT (arXiv 2012.12877) after BERT
EXPANSION = 4  # hidden units of a block over its width


class SelfAttention(nn.MultiheadAttention):
    """Multi-head attention of x (N, T, D) to itself, with the parameters of nn.MultiheadAttention.

    Its class is what says that `in_proj_weight` (3 D, D) is three matrices: a Linear called qkv would be read as one.
    Computed here, so that training and evaluation take one path, which torch.func maps over, and `out_proj` is called.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (N, T, 3 D)
        q, k, v = packed.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # (N, heads, T, D')
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + fc2(activation(fc1(norm2(x)))). What `fc1` makes are units."""

    def __init__(self, width: int, heads: int, norm: Norm, activation: Activation):
        super().__init__()
        self.norm1 = norm(width)
        self.attention = SelfAttention(width, heads, batch_first=True)
        self.norm2 = norm(width)
        self.fc1 = nn.Linear(width, EXPANSION * width)
        self.activation = activation.module(-1)
        self.fc2 = nn.Linear(activation.copies * EXPANSION * width, width)
        self.copies = activation.copies

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))

    def units(self, name: str) -> Units:
        return Units(f"{name}.fc1", self.fc1, self.activation, self.fc2, dim=-1, copies=self.copies)


class ViT(Model):
    """A vision transformer: norms before the layers, learned positions, the scores read from a class token.

    Dosovitskiy et al. 2021 (arXiv 2010.11929); sizes and initialisation of DeiT, Touvron et al. 2021 (arXiv
    2012.12877), without distillation and dropout. Weights, positions and the class token are normal with standard
    deviation 0.02, cut at 2 (a hundred of them), whatever the fan-in; biases are 0.

    Args:
        input_shape: (C, H, W) of one image.
        classes: scores of every image.
        patch: side of the patches, which divides H and W; None: 4 for images of side up to 32, 8 up to 64, else 16.
        depth: blocks.
        width: features of a token; None: that of the size.
        heads: of the attention, which divide the width; None: that of the size.
        activation: relu, crelu (each unit is read twice, as relu(x) and relu(-x)), gelu or tanh.
        norm: layer (LayerNorm) or layer-plain (without scale and shift): all of them, the one before the head too.

    Raises:
        ValueError: an unknown name, a size below 1, or one that does not divide what it must.
    """

    default_width: ClassVar[int]
    default_heads: ClassVar[int]

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        *,
        patch: int | None = None,
        depth: int = 12,
        width: int | None = None,
        heads: int | None = None,
        activation: str = "gelu",
        norm: str = "layer",
    ):
        super().__init__(input_shape, classes)
        kind, normalise = choose("activation", activation, ACTIVATIONS), choose("norm", norm, VIT_NORMS)
        channels, *sides = input_shape
        patch = _default_patch(max(sides)) if patch is None else patch
        width = self.default_width if width is None else width
        heads = self.default_heads if heads is None else heads
        _check(sides, patch, depth, width, heads)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        tokens = 1 + (sides[0] // patch) * (sides[1] // patch)
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, normalise, kind) for _ in range(depth)))
        self.norm = normalise(width)
        self.head = nn.Linear(width, classes)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT  # (N, T - 1, D)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), 1) + self.positions  # (N, T, D)
        return self.head(self.norm(self.blocks(x))[:, 0])

    def units(self) -> list[Units]:
        return [module.units(name) for name, module in self.named_modules() if isinstance(module, Block)]

    def _initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=STD)
            else:
                nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()  # scales of 1, where it has any


class ViTTiny(ViT):
    default_width, default_heads = 192, 3


class ViTSmall(ViT):
    default_width, default_heads = 384, 6


class ViTBase(ViT):
    default_width, default_heads = 768, 12


def _default_patch(side: int) -> int:
    return next((patch for limit, patch in PATCHES if side <= limit), LARGE_PATCH)


def _check(sides: list[int], patch: int, depth: int, width: int, heads: int) -> None:
    check_sizes("model vit", patch=patch, depth=depth, width=width, heads=heads)
    if any(side % patch for side in sides):
        raise ValueError(
            f"model vit: expected patch to divide the image, {sides[0]} x {sides[1]}, got {patch}. Set patch."
        )
    if width % heads:
        raise ValueError(f"model vit: expected heads to divide the width {width}, got {heads}. Set width and heads.")
