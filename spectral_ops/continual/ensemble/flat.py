"""Tensors of several names in one, so that what an optimizer does to every entry is one call."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes that a tensor begins at a multiple of: what vector loads and products like


class Flat:
    """Where each tensor lies in a memory of them all, one behind the other.

    Args:
        tensors: what the memory has room for, all of one dtype and on one device; at least one.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        first = next(iter(tensors.values()))
        step = _ALIGNMENT // first.element_size()
        self._like = first.detach()[:0]
        self._places: dict[str, tuple[int, torch.Size]] = {}
        self._entries = 0
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.device) == (first.dtype, first.device), "one memory"
            self._places[name] = self._entries, tensor.shape
            self._entries += -(-tensor.numel() // step) * step

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def zeros(self) -> Tensor:
        """A memory, (entries), 0 also between the tensors, where it stays so: no gradient reaches there."""
        return self._like.new_zeros(self._entries)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors in a memory, by name."""
        return {name: memory[at : at + prod(shape)].view(shape) for name, (at, shape) in self._places.items()}
