"""The tensors of an optimizer step list by list, as compiled backends take them, and which of them there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from spectral_ops.ops.adamw_state import Tensors, like


class Lists(NamedTuple):
    """The tensors of a call, list by list, without what is None."""

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    max_exp_avg_sqs: Sequence[Tensor]
    masters: Sequence[Tensor]
    steps: Sequence[Tensor]


class Masks(NamedTuple):
    """Of all parameters, which have one: a byte each, 1 or 0; empty where all have, or none."""

    gradients: bytes
    masters: bytes


def lists_of(tensors: Tensors) -> Lists:
    return Lists(
        tensors.weights,
        [g for g in tensors.gradients if g is not None],
        tensors.exp_avgs,
        tensors.exp_avg_sqs,
        tensors.max_exp_avg_sqs,
        [m for m in tensors.masters if m is not None],
        tensors.steps,
    )


def masks_of(tensors: Tensors) -> Masks:
    return Masks(_mask(tensors.gradients), _mask(tensors.masters))


def _mask(tensors: Sequence[Tensor | None]) -> bytes:
    return bytes(t is not None for t in tensors) if any(t is None for t in tensors) else b""


def moved_gradients(tensors: Tensors, lists: Lists, elsewhere: Sequence[int]) -> list[Tensor] | None:
    """The gradients given, all of them lying as their weights do; None where they do so by themselves.

    elsewhere: which of them do not.
    """
    if not elsewhere:
        return None
    weights = [w for w, g in zip(tensors.weights, tensors.gradients, strict=True) if g is not None]
    gradients = list(lists.gradients)
    for i in elsewhere:
        gradients[i] = like(weights[i], gradients[i].dtype).copy_(gradients[i])
    return gradients
