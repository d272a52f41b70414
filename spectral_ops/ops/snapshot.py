"""What a list of tensors looked like at the last call, compared at the next for ~0.05 us a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from spectral_ops import backends

PLAIN = (Tensor, nn.Parameter)

Addresses: TypeAlias = bytes | list[int]  # what csrc takes


class Snapshot:
    """What a list of tensors looked like (type, dtype, device, shape, strides), to compare later lists with.

    By DLPack's C interface where torch has it and the tensors are plain ones; otherwise attribute by attribute.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._native = _native_snapshot(tensors)
        # A sparse gradient has no strides: never the same as another.
        strided = self._native is None and all(t.layout == torch.strided for t in tensors)
        self._looks = [_look(t) for t in tensors] if strided else None

    def addresses(self, tensors: Sequence[Tensor]) -> Addresses | None:
        """The addresses of tensors that look the same; None where anything differs."""
        if self._native is not None:
            return self._native.addresses(tensors)
        if any(t.layout != torch.strided for t in tensors) or self._looks != [_look(t) for t in tensors]:
            return None
        return [t.data_ptr() for t in tensors]


def gradients_of(tensors: list[Any]) -> list[Tensor] | None:
    """.grad of every tensor, in one call; None where one has none, or without the compiled module."""
    if not backends.has_native():
        return None
    return backends.native().gradients_of(tensors)


def _look(t: Tensor) -> tuple[Any, ...]:
    return type(t), t.dtype, t.device, t.shape, t.stride()


def _native_snapshot(tensors: Sequence[Tensor]) -> Any:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch 2.10 and later
    # A subclass may keep its memory elsewhere.
    if exchange is None or not backends.has_native() or not all(type(t) in PLAIN for t in tensors):
        return None
    try:
        return backends.native().Snapshot(exchange, tensors)
    except (RuntimeError, TypeError, ValueError, BufferError):  # sparse, on meta, inside torch.func: it shows no memory
        return None
