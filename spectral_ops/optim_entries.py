"""What SpectralAdamW reads every parameter of its groups as."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from spectral_ops.layers import Entry, discover, format_table
from spectral_ops.optim_state import expected, own_name
from spectral_ops.rules import FLOATS, collect

Groups = Sequence[Mapping[str, Any]]


def entries_of(
    groups: Groups, before: Sequence[Entry], model: nn.Module | None, reading: Mapping[str, Any], stochastic: bool
) -> list[Entry]:
    """One for each parameter, in the order of the groups.

    Args:
        before: what was read last; a parameter that was given by name keeps it.
        model: what holds them all; None: they are read by name and shape.
        reading: include, exclude, rules and the like, as `discover` takes them.
        stochastic: whether weights are rounded by chance.
    """
    with own_name():
        if model is not None:
            names = {id(f.parameter): f.name for f in collect(model)}
            found = discover(model, **reading)
        else:
            names = _names(groups, before)
            found = discover([(names[id(p)], _stand_in(p)) for group in groups for p in group["params"]], **reading)
    by_name = {entry.name: entry for entry in found}
    entries = []
    for number, group in enumerate(groups):
        for place, p in enumerate(group["params"]):
            if id(p) not in names:
                condition, got = "every parameter to be one of model's", f"number {place} of group {number}"
                raise ValueError(expected(condition, f"{got}, which is not", "Pass the model that holds them all"))
            entry = by_name[names[id(p)]]
            if p.dtype not in FLOATS:
                if p.requires_grad:
                    refuse_dtype(entry.name, p.dtype)
                entry = dataclasses.replace(entry, layout=None, reason=f"frozen, {str(p.dtype).removeprefix('torch.')}")
            if stochastic and p.dtype == torch.float16:
                condition = f"bfloat16 for stochastic_rounding in {names[id(p)]!r}"
                raise TypeError(expected(condition, p.dtype, "Use master_weights=True"))
            # The very parameter that is optimized, whatever its module holds later; as torch's optimizers do.
            entries.append(dataclasses.replace(entry, module=None, held=p))
    return entries


def _stand_in(p: Tensor) -> nn.Parameter:
    """What is read in place of a tensor that is no nn.Parameter, or of a frozen one that holds no floats."""
    if p.dtype not in FLOATS and not p.requires_grad:
        return nn.Parameter(torch.empty(p.shape, device="meta"))
    return p if isinstance(p, nn.Parameter) else nn.Parameter(p.detach(), p.requires_grad)


def refuse_dtype(name: str, dtype: torch.dtype) -> NoReturn:
    condition = f"parameter {name!r} to be float16, bfloat16, float32 or float64"
    raise TypeError(expected(condition, dtype, "Leave it to another optimizer"))


def with_target(entry: Entry, group: Mapping[str, Any]) -> Entry:
    """With the target that a group sets for its matrices."""
    if group["target"] is None or entry.layout is None or not entry.layout.is_matrix:
        return entry
    return dataclasses.replace(entry, target=float(group["target"]))


def table_of(entries: Sequence[Entry], groups: Groups, sigmas: Mapping[str, Sequence[float]]) -> str:
    """What every parameter is read as, as text."""
    held = {id(p): group for group in groups for p in group["params"]}
    shown = [with_target(e, held[id(e.held)]) if id(e.held) in held else e for e in entries]
    notes = {e.name: "frozen now" for e in entries if e.layout is not None and not e.parameter.requires_grad}
    return format_table(shown, sigmas, notes)


def _names(groups: Groups, before: Sequence[Entry]) -> dict[int, str]:
    """By id: those given, which torch keeps beside the list of parameters when that is edited, or places."""
    known, names = {id(entry.held): entry.name for entry in before}, {}
    members = [(n, i, group, p) for n, group in enumerate(groups) for i, p in enumerate(group["params"])]
    for _, _, group, p in members:
        if "param_names" in group and id(p) in known:
            names[id(p)] = known[id(p)]
    taken = set(names.values())
    for number, place, group, p in members:
        if id(p) not in names:
            given = group.get("param_names", ())
            name = given[place] if place < len(given) and given[place] not in taken else f"{number}.{place}"
            names[id(p)] = name
    return names


def are_of(entries: Sequence[Entry], groups: Groups) -> bool:
    """Whether entries are those of the parameters that the groups hold now, and of their shapes."""
    parameters = [p for group in groups for p in group["params"]]
    return len(entries) == len(parameters) and all(
        entry.held is p and entry.shape == tuple(cast(Tensor, p).shape)
        for entry, p in zip(entries, parameters, strict=True)
    )


def refuse_twice(params: Sequence[Any], groups: Groups, model: nn.Module | None) -> None:
    """ValueError, naming it, for a parameter of a new group that is there already; params: as the user gives them."""
    held = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    for place, item in enumerate(params):
        name, p = item if isinstance(item, tuple) else (None, item)
        if id(p) in held:
            shown = repr(name) if name is not None else _name_in(model, p, place)
            got = f"one that group {held[id(p)]} holds too"
            raise ValueError(expected(f"parameter {shown} once", got, "Leave it out of one of the groups"))
        held[id(p)] = len(groups)


def _name_in(model: nn.Module | None, p: Tensor, place: int) -> str:
    named = [] if model is None else model.named_parameters()
    return next((repr(name) for name, q in named if q is p), f"{place} of shape {tuple(p.shape)}")
