"""torch's side of SpectralAdamW's state: how it is made, checked before a load, and kept in its own precision."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectral_ops.ops.adamw_state import NAME, STEP_DTYPES, Options, Tensors, like, same_places
from spectral_ops.ops.layout import vector_dtype
from spectral_ops.optim_parts import Part, address_of

STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")
FROM_STATE_DICT = "Pass what state_dict() returned"
HALVES = (torch.float16, torch.bfloat16)


def expected(condition: str, got: object, remedy: str) -> str:
    return f"{NAME}: expected {condition}, got {got}. {remedy}."


@contextlib.contextmanager
def own_name() -> Iterator[None]:
    """Errors of what is shared with SpectralRegularizer name this class."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise type(error)(str(error).replace("SpectralRegularizer", NAME)) from error


def new_state(p: nn.Parameter, options: Options, masters: bool) -> dict[str, Tensor]:
    """As torch's AdamW starts; the count of steps lies with the parameter, where a device reads it."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
    for key in STATES[: 3 if options.amsgrad else 2]:
        state[key] = like(p, vector_dtype(p.dtype)).zero_()
    if masters and p.dtype in HALVES:
        state["master"] = like(p, torch.float32).copy_(p)
    return state


def tensors_of(part: Part, state: Mapping[Any, Any], masters: bool) -> Tensors:
    """Of a step of the part; states are made where there are none."""
    states = []
    for p in part.parameters:
        own = cast(dict[str, Any], state[p])
        if not own:
            own.update(new_state(p, part.options, masters))
        states.append(own)
    steps = [s["step"] for s in states]
    if len(steps) != len(part.steps) or not all(map(operator.is_, steps, part.steps)):
        for entry, own in zip(part.group.entries, states, strict=True):
            own["step"] = exact_step(entry.name, own["step"], part.u.device)
        part.steps = steps = [s["step"] for s in states]
    return Tensors(
        part.parameters,
        [p.grad for p in part.parameters],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        steps,
        [s["max_exp_avg_sq"] for s in states] if part.options.amsgrad else (),
        [s.get("master") for s in states] if masters else (),
    )


def check_step(name: str, step: Any) -> None:
    if isinstance(step, bool) or not isinstance(step, Tensor | int | float):
        remedy = "Delete the parameter's entry in optimizer.state"
        raise TypeError(expected(f"the step of {name!r} to be a tensor or a number", type(step).__name__, remedy))


def exact_step(name: str, step: Any, device: torch.device, copy: bool = False) -> Tensor:
    """A count of steps in a type that kernels count in; torch's AdamW takes any, and numbers."""
    check_step(name, step)
    if not isinstance(step, Tensor):
        step = torch.tensor(float(step))
    return step.to(device, step.dtype if step.dtype in STEP_DTYPES else torch.float32, copy=copy)


def fit_state(name: str, state: dict[str, Any], p: nn.Parameter, masters: bool) -> None:
    """In the vector dtype, lying in memory as the weight does, wherever it came from; with a master, if need be."""
    dtype = vector_dtype(p.dtype)
    for key in STATES:
        x = state.get(key)
        if isinstance(x, Tensor) and x.shape != p.shape:  # p.data was set to another one
            condition = f"the {key} of {name!r} of shape {tuple(p.shape)}, as the parameter is now"
            raise ValueError(expected(condition, tuple(x.shape), "Delete the parameter's entry in optimizer.state"))
        if isinstance(x, Tensor) and not (x.dtype == dtype and x.device == p.device and same_places(x, p)):
            state[key] = like(p, dtype).copy_(x)
    if masters and state and p.dtype in HALVES and "master" not in state:
        state["master"] = like(p, torch.float32).copy_(p)


def follow_weights(part: Part, tensors: Tensors, seen: dict[int, tuple[int, int]]) -> None:
    """Masters of weights that were changed outside, where they differ."""
    place = Tensor.data_ptr if part.addressed else address_of
    members = zip(part.parameters, tensors.weights, tensors.masters, strict=False)  # no masters where none are kept
    for p, w, master in members:
        if master is not None and seen.get(id(p)) != (place(w), part.version(p)):
            master.copy_(torch.where(master.to(w.dtype) == w, master, w.to(master.dtype)))


def saw_weights(part: Part, tensors: Tensors, seen: dict[int, tuple[int, int]]) -> None:
    place = Tensor.data_ptr if part.addressed else address_of
    pairs = zip(part.parameters, tensors.weights, strict=True)
    seen |= {id(p): (place(w), part.version(p)) for p, w in pairs}


# ---- loading ----


def restore(
    own: Mapping[Any, dict[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    state: Mapping[str, Any],
) -> None:
    """What torch has loaded, in its own precision and memory.

    torch rounds moments to a parameter's dtype, and shares what it need not convert with the state that was given.
    """
    parameters = chain.from_iterable(g["params"] for g in groups)
    saved_ids = chain.from_iterable(g["params"] for g in state["param_groups"])
    for name, p, number in zip(names, parameters, saved_ids, strict=True):
        saved = state["state"].get(number)
        if not saved or p not in own:
            continue
        for key in STATES:
            if isinstance(saved.get(key), Tensor):
                own[p][key] = like(p, vector_dtype(p.dtype)).copy_(saved[key])
        own[p]["step"] = exact_step(name, own[p]["step"], p.device, copy=True)
