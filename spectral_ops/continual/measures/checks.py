"""What `probe` refuses: arguments of another kind, and those that the model or the loss cannot take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # cross_entropy's ignore_index


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"probe: expected model to be a torch.nn.Module, got {type(model).__name__}. Write probe(model, (x, y)), "
            "once for each model."
        )


def check_batch(batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise TypeError(
            f"probe: expected batch to be two tensors, inputs and targets, got {type(batch).__name__}. Write (x, y)."
        )
    x, y = batch
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        raise ValueError(
            f"probe: expected inputs and targets of one length >= 1, got shapes {tuple(x.shape)} and {tuple(y.shape)}. "
            "Give every sample its target."
        )
    return x, y


def scores_of(model: nn.Module, x: Tensor) -> Any:
    """model(x)."""
    with _refused(f"batch to hold inputs x that the model takes, of shape {_shown(x)}", "Correct x, or the model"):
        return model(x)


def value_of(loss: Callable[[Any, Tensor], Tensor], scores: Any, y: Tensor) -> Tensor:
    """loss(scores, y), one number."""
    of_classes = loss is F.cross_entropy and isinstance(scores, Tensor) and scores.ndim > 1
    if of_classes and not y.is_floating_point():
        _check_classes(scores, y)
    what = f"batch to hold targets y that the loss takes, of shape {_shown(y)}"
    if isinstance(scores, Tensor):
        what += f" for scores of shape {_shown(scores)}"
    remedy = "Correct y, or pass the loss that takes it"
    if of_classes:
        remedy = "Give the number of a class for each sample, int64 (N,); loss=... is for other targets"
    with _refused(what, remedy):
        value = loss(scores, y)
    if value.numel() != 1:
        raise ValueError(
            f"probe: expected loss to give one number, got shape {tuple(value.shape)}. Take the mean over the batch."
        )
    return value


def _check_classes(scores: Tensor, y: Tensor) -> None:
    """Before the loss: on CUDA a class that is none would end the process's use of the device."""
    classes = scores.shape[1]
    wrong = (y != IGNORED) & ((y < 0) | (y >= classes))
    if wrong.any():
        raise ValueError(
            f"probe: expected batch to hold targets y from 0 to {classes - 1}, the model's {classes} scores, got "
            f"{int(y[wrong][0])}. Number the classes from 0, or give the model more scores."
        )


def _shown(x: Tensor) -> str:
    return f"{tuple(x.shape)} and {str(x.dtype).removeprefix('torch.')} on {x.device}"


@contextlib.contextmanager
def _refused(condition: str, remedy: str) -> Iterator[None]:
    """What torch says of shapes and dtypes in a model or a loss names neither."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"probe: expected {condition}, got {type(error).__name__}: {said}. {remedy}.") from error
