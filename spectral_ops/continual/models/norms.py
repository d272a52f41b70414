"""Normalisations by name, each made for a number of features (of vectors) or channels (of images)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import nn

Norm = Callable[[int], nn.Module]

GROUPS = 32  # Wu & He 2018, GroupNorm's default


def group_norm(channels: int) -> nn.Module:
    """In 32 groups, or as many as leave two channels to each: one channel alone, at one pixel, would become 0."""
    return nn.GroupNorm(math.gcd(GROUPS, channels, channels // 2), channels)


FEATURE_NORMS: dict[str, Norm] = {
    "none": lambda features: nn.Identity(),
    "layer": nn.LayerNorm,
    "layer-plain": partial(nn.LayerNorm, elementwise_affine=False),
}
# Over channels and pixels together, with one scale and shift per channel.
CHANNEL_NORMS: dict[str, Norm] = {
    "none": lambda channels: nn.Identity(),
    "layer": partial(nn.GroupNorm, 1),
    "layer-plain": partial(nn.GroupNorm, 1, affine=False),
}
VIT_EPS = 1e-6  # as in the ViT and DeiT sources
VIT_NORMS: dict[str, Norm] = {
    "layer": partial(nn.LayerNorm, eps=VIT_EPS),
    "layer-plain": partial(nn.LayerNorm, eps=VIT_EPS, elementwise_affine=False),
}
RESNET_NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": group_norm}
