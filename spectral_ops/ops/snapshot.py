"""What a list of tensors looked like at the last call, compared at the next for ~0.05 us a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
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
        self._native = _native(lambda exchange: backends.native().Snapshot(exchange, tensors), tensors)
        # A sparse gradient has no strides: never the same as another.
        strided = self._native is None and all(t.layout == torch.strided for t in tensors)
        self._looks = [_look(t) for t in tensors] if strided else None

    def addresses(self, tensors: Sequence[Tensor]) -> Addresses | None:
        """The addresses of tensors that look the same; None where anything differs."""
        if self._native is not None:
            return self._native.addresses(tensors)
        if any(t.layout != torch.strided for t in tensors) or self._looks != [_look(t) for t in tensors]:
            return None
        return [t.data_ptr() if has_memory(t) else 0 for t in tensors]


def has_memory(t: Tensor) -> bool:
    """Whether a tensor's address is that of its elements: not of subclasses that hold other tensors or none (fake)."""
    return not t.is_neg() and not torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python)


def as_bytes(addresses: Addresses) -> bytes:
    """int64 each."""
    return addresses if isinstance(addresses, bytes) else np.array(addresses, dtype=np.int64).tobytes()


def step_lookup(parameters: list[Any], state: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    """csrc's StepLookup of an optimizer's parameters, of their gradients and of these states of theirs.

    Its `addresses(state)` finds and compares them all: rows of addresses, one for each parameter, of the parameters, of
    gradients and of each key, 0 where there is none; None where anything looks otherwise.

    None where there is no such thing: without the compiled module, of tensors that are not plain ones.
    """
    tensors = [*parameters, *(p.grad for p in parameters), *(state[p].get(key) for p in parameters for key in keys)]
    return _native(lambda exchange: backends.native().StepLookup(exchange, parameters, state, list(keys)), tensors)


def versions_of(tensors: list[Tensor]) -> list[int]:
    """._version of every tensor."""
    return backends.native().versions_of(tensors) if backends.has_native() else [t._version for t in tensors]


def gradients_of(tensors: list[Any]) -> list[Tensor] | None:
    """.grad of every tensor, in one call; None where one has none, or without the compiled module."""
    if not backends.has_native():
        return None
    return backends.native().gradients_of(tensors)


def _look(t: Tensor) -> tuple[Any, ...]:
    return type(t), t.dtype, t.device, t.shape, t.stride()


def _native(make: Callable[[Any], Any], tensors: Sequence[Tensor | None]) -> Any:
    """What csrc makes with DLPack's exchange interface; None without it, and of tensors it cannot look at."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch 2.10 and later
    # A subclass may keep its memory elsewhere.
    plain = all(t is None or type(t) in PLAIN for t in tensors)
    if exchange is None or not plain or not backends.has_native():
        return None
    try:
        return make(exchange)
    except (RuntimeError, TypeError, ValueError, BufferError):  # sparse, on meta, inside torch.func: it shows no memory
        return None
