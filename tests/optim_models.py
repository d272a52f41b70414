"""Small models, their data, and two ways to train them: the optimizer step with the penalty folded in, and apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops import SpectralAdamW, SpectralRegularizer

LR, STRENGTH, CLIP = 3e-3, 1e-2, 1.0


class Net(nn.Module):
    """Every kind of parameter: convs with groups and transposed, a norm, attention, an embedding, bare ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.table = nn.Embedding(11, 6)
        self.shift = nn.Parameter(torch.zeros(6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        x = self.up(torch.tanh(self.norm(self.conv(images)))).flatten(2).mT  # (batch, places, 6)
        x = torch.cat([x, self.table(words)], dim=1) + self.shift
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.scale * torch.tanh(x).mean(dim=1))


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


class Batches:
    """The same batches for everybody: step by step a loss of the model, differentiable."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._generator = torch.Generator().manual_seed(5)
        self._dtype = dtype

    def loss(self, model: Callable[..., Tensor]) -> Tensor:
        images = torch.randn(8, 2, 5, 5, generator=self._generator)
        words = torch.randint(11, (8, 3), generator=self._generator)
        labels = torch.randint(5, (8,), generator=self._generator)
        return nn.functional.cross_entropy(model(images.to(self._dtype), words).float(), labels)


def apart(
    model: nn.Module, steps: int, *, dtype: torch.dtype = torch.float32, strength: float = STRENGTH, **options: Any
) -> tuple[nn.Module, torch.optim.AdamW, SpectralRegularizer]:
    """clip -> accumulate_grad_ -> AdamW."""
    reg = SpectralRegularizer(model, strength=strength)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **options)
    batches = Batches(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        batches.loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        reg.accumulate_grad_()
        optimizer.step()
    return model, optimizer, reg


def folded(
    model: nn.Module, steps: int, *, dtype: torch.dtype = torch.float32, strength: float = STRENGTH, **options: Any
) -> tuple[nn.Module, SpectralAdamW]:
    """clip -> SpectralAdamW."""
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=strength, **options)
    train(model, optimizer, Batches(dtype), steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        batches.loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((p.detach().double() - q.detach().double()).abs().max().item() for p, q in pairs)
