"""States of several networks as one, and back: nested dicts of tensors, and of what counts alike in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def cat(trees: Sequence[Any]) -> Any:
    """Dicts of tensors, each with those of all below each other; what has no rows, as a step counter, is the same in
    all."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: cat([tree[key] for tree in trees]) for key in first}
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(trees)  # type: ignore[arg-type]
    assert all(bool(tree == first) for tree in trees), "networks that take their steps together count alike"
    return first.clone() if isinstance(first, Tensor) else first


def chunk(tree: Any, count: int) -> list[Any]:
    """What `cat` was given, as views."""
    if isinstance(tree, dict):
        parts = {key: chunk(value, count) for key, value in tree.items()}
        return [{key: parts[key][i] for key in parts} for i in range(count)]
    if isinstance(tree, Tensor) and tree.ndim:
        return list(tree.chunk(count))
    return [tree] * count
