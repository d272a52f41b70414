"""A small vision transformer that runs forward, for the training step: pre-norm blocks, class token, one linear head.

Its layers carry the names of timm, so that the drop-in finds them as it would in a user's model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from bench.models import ViT


class Block(nn.Module):
    def __init__(self, width: int, mlp: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (batch, heads, tokens, width / heads)
        x = x + self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Args: shape: width, depth and MLP; image, patch: side lengths in pixels; heads of 64 where the width allows."""

    def __init__(self, shape: ViT, image: int, patch: int, classes: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, shape.width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (image // patch) ** 2, shape.width))
        heads = max(1, shape.width // 64)
        self.blocks = nn.Sequential(*(Block(shape.width, shape.mlp, heads) for _ in range(shape.depth)))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, classes)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 3, image, image) -> (batch, classes)
        x = self.patch_embed(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])
