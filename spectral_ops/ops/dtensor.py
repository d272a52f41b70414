"""DTensors, as far as they must be told from plain tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_dtensor(x: Any) -> bool:
    """By its attributes: torch.distributed is missing from some builds."""
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def local_tensor(x: Any) -> Tensor:
    """The shard of a DTensor; any other tensor itself. Where it is still being communicated, waits for it."""
    if not is_dtensor(x):
        return x
    local = x._local_tensor  # to_local() makes a new view of it at every call
    return local.wait() if hasattr(local, "wait") else local
