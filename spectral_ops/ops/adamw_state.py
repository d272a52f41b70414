"""What an optimizer step reads and writes, and what is checked of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_ops.ops.checks import check_gradient
from spectral_ops.ops.dtensor import is_dtensor, local_tensor
from spectral_ops.ops.layout import vector_dtype
from spectral_ops.ops.snapshot import PLAIN, has_memory

NAME = "SpectralAdamW"
STEP_DTYPES = {torch.float32, torch.float64}  # what steps are counted in


class Tensors(NamedTuple):
    """By parameter. Moments and masters are in the vector dtype and lie in memory as their weight does."""

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor | None]  # None: zero for a penalised parameter; a plain one is then left as it is
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]  # 0-d, float32 or float64; incremented
    max_exp_avg_sqs: Sequence[Tensor] = ()  # of all parameters with amsgrad, of none without
    masters: Sequence[Tensor | None] = ()  # None: the weight itself is updated; empty: all of them


class Spectrum(NamedTuple):
    """Of all matrices, flat, of the weights as they are now; updated in place."""

    v: Tensor
    u: Tensor
    exponents: Tensor
    sigma: Tensor


class Hyper(NamedTuple):
    """Of one parameter group at this step."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    strength: float | Tensor


class Options(NamedTuple):
    """The same for all parameters of a call.

    maximize: the task's gradient is negated, the penalty's is not.
    decoupled: W -= lr p, p the penalty's gradient, past the moments.
    stochastic_rounding: of bfloat16 weights without a master; seed and step decide, nothing of torch's random state.
    """

    exponent: float = 2.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = False
    stochastic_rounding: bool = False
    seed: int = 0


def check_tensors(names: Sequence[str], tensors: Tensors) -> None:
    """Raises, naming the parameter, for a gradient or a state that does not fit it."""
    for i, (name, w) in enumerate(zip(names, tensors.weights, strict=True)):
        gradient = tensors.gradients[i]
        if any(stride == 0 and size > 1 for stride, size in zip(w.stride(), w.shape, strict=True)):
            if gradient is not None or w.requires_grad:  # else it is not written to
                raise ValueError(
                    f"{NAME}: expected {name} to have memory for every element, got an expanded tensor with strides "
                    f"{w.stride()}. Make it contiguous."
                )
        if gradient is not None:
            check_gradient(NAME, name, w, gradient, written=False)
        for what, states in (
            ("exp_avg", tensors.exp_avgs),
            ("exp_avg_sq", tensors.exp_avg_sqs),
            ("max_exp_avg_sq", tensors.max_exp_avg_sqs),
            ("master", tensors.masters),
        ):
            state = states[i] if states else None
            if state is not None:
                _check_state(what, name, w, state)
        step = tensors.steps[i]
        if step.dtype not in STEP_DTYPES or step.numel() != 1 or step.device != w.device:
            raise ValueError(
                f"{NAME}: expected the step of {name} to be one float32 or float64 number on {w.device}, got "
                f"{step.dtype} of shape {tuple(step.shape)} on {step.device}. Delete the parameter's entry in "
                "optimizer.state."
            )


def _check_state(what: str, name: str, w: Tensor, state: Tensor) -> None:
    fits = state.dtype == vector_dtype(w.dtype) and state.shape == w.shape and state.device == w.device
    if not (fits and same_places(state, w)):
        raise ValueError(
            f"{NAME}: expected the {what} of {name} to be {vector_dtype(w.dtype)} of shape {tuple(w.shape)} and "
            f"strides {w.stride()} on {w.device}, got {state.dtype} of shape {tuple(state.shape)} and strides "
            f"{state.stride()} on {state.device}. Delete the parameter's entry in optimizer.state."
        )


def same_places(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape lie alike in memory: the stride of a dimension of size 1 says nothing."""
    if is_dtensor(a) and is_dtensor(b):
        return a.placements == b.placements and same_places(local_tensor(a), local_tensor(b))  # type: ignore[attr-defined]
    return all(s == t for s, t, size in zip(a.stride(), b.stride(), b.shape, strict=True) if size > 1)


def like(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor that lies in memory, and across ranks, as w does."""
    if is_dtensor(w):
        from torch.distributed.tensor import DTensor

        local = like(local_tensor(w), dtype)
        where = w.device_mesh, w.placements  # type: ignore[attr-defined]
        return DTensor.from_local(local, *where, run_check=False, shape=w.shape, stride=w.stride())
    if type(w) not in PLAIN and not has_memory(w):  # a subclass makes its own
        return torch.empty_like(w, dtype=dtype)
    return torch.empty_strided(w.shape, w.stride(), dtype=dtype, device=w.device)
