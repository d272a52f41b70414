"""What SpectralAdamW asks of a state before it takes it over: torch's side of it, then s, u, v."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from spectral_ops.layers import Entry
from spectral_ops.ops.dtensor import is_dtensor
from spectral_ops.ops.layout import Kind, Sizes, sizes
from spectral_ops.optim_checks import SPECTRAL_KEYS
from spectral_ops.optim_state import FROM_STATE_DICT, STATES, check_step, expected
from spectral_ops.vectors import STATE_KEYS, Vectors, from_state

KEYS = (*STATE_KEYS, "u", "checksum")
# Of sigma = x * 2^exponent; float64 reaches from -1074 to 1024, before a weight's elements are summed up.
MOST_EXPONENT = 2048


def check_mapping(where: str, x: Any) -> None:
    if not isinstance(x, Mapping):
        raise TypeError(expected(f"{where} to be a mapping", type(x).__name__, FROM_STATE_DICT))


def check_saved(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raises, naming the parameter, for what does not fit."""
    for key in ("state", "param_groups"):
        if key not in state:
            condition = "state_dict to hold 'state' and 'param_groups'"
            raise ValueError(expected(condition, f"one without {key!r}", FROM_STATE_DICT))
    check_mapping("state_dict['state']", state["state"])
    saved_groups = state["param_groups"]
    if not isinstance(saved_groups, list | tuple) or not all(map(_is_group, saved_groups)):
        found = type(saved_groups).__name__ if not isinstance(saved_groups, list) else "one with something else in it"
        raise TypeError(expected("state_dict['param_groups'] to be a list of groups", found, FROM_STATE_DICT))
    remedy = f"{FROM_STATE_DICT}, of an optimizer with these parameters in this order"
    got = [len(g["params"]) for g in saved_groups]
    if [len(g["params"]) for g in groups] != got:
        sizes = [len(g["params"]) for g in groups]
        raise ValueError(expected(f"a state of parameter groups of {sizes} parameters", got, remedy))
    parameters = chain.from_iterable(g["params"] for g in groups)
    saved_ids = chain.from_iterable(g["params"] for g in saved_groups)
    for name, p, number in zip(names, parameters, saved_ids, strict=True):
        saved = state["state"].get(number, {})
        check_mapping(f"the state of {name!r}", saved)
        missing = [key for key in ("step", *STATES[:2]) if key not in saved]
        if saved and missing:
            another = f"{remedy}; another kind of optimizer keeps other things"
            raise ValueError(expected(f"a state of {name!r} with step, exp_avg and exp_avg_sq", sorted(saved), another))
        if saved:
            check_step(name, saved["step"])
        for key in STATES:
            x = saved.get(key)
            if x is not None and (not isinstance(x, Tensor) or x.shape != p.shape):
                seen = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(expected(f"the {key} of {name!r} of shape {tuple(p.shape)}", seen, remedy))
            if x is not None and _sharding(x) != _sharding(p):
                seen = "one sharded otherwise" if is_dtensor(x) else "a plain tensor"
                by_dcp = "Load it by torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                raise ValueError(expected(f"the {key} of {name!r} sharded as its weight, or both whole", seen, by_dcp))


def own_settings(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of every group, the spectral settings that a state lacks, as one of torch's AdamW does."""
    return [
        {key: own[key] for key in SPECTRAL_KEYS if key not in given} for own, given in zip(groups, saved, strict=True)
    ]


def _is_group(group: Any) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)


def _sharding(x: Any) -> Any:
    return (x.device_mesh, tuple(x.placements)) if is_dtensor(x) else None


# ---- s, u, v ----


def checked_spectra(state: Any, entries: Sequence[Entry]) -> dict[str, Vectors]:
    """Copies of the vectors that a state holds, by parameter name.

    Args:
        state: what `Spectra.state_dict` returned.
        entries: what every parameter is read as.

    Raises:
        ValueError, TypeError: what is malformed or damaged, or not of the matrices there are.
    """
    missing = list(KEYS) if not isinstance(state, Mapping) else [key for key in KEYS if key not in state]
    if missing:
        condition = f"state['spectral'] with the keys {list(KEYS)}"
        raise ValueError(expected(condition, f"none of {missing}", FROM_STATE_DICT))
    for key in KEYS:
        check_mapping(f"state['spectral'][{key!r}]", state[key])
    shapes, there = _shapes(entries), set(state["v"])
    # One that is missing may have been frozen until now: its own vectors are kept, and its weight is read.
    extra = sorted(map(str, there - set(shapes)))
    if extra:
        condition = f"state['spectral'] to hold matrices of this optimizer, {sorted(shapes)}"
        remedy = "Build it with the model=, names and rules that the state was saved under"
        raise ValueError(expected(condition, extra, remedy))
    known = {key: {name: x for name, x in state[key].items() if name in there} for key in STATE_KEYS}
    vectors = from_state(known, {name: (s.parts, s.n) for name, s in shapes.items() if name in there})
    for name, x in vectors.items():
        _check_u(name, state["u"].get(name), (shapes[name].parts, shapes[name].m), x.sigma)
        if bool((x.exponent.abs() > MOST_EXPONENT).any()):
            condition = f"state['spectral']['exponent'][{name!r}] within {MOST_EXPONENT} of 0"
            raise ValueError(expected(condition, x.exponent.tolist(), FROM_STATE_DICT))
    return vectors


def _shapes(entries: Sequence[Entry]) -> dict[str, Sizes]:
    """Of all that may have vectors."""
    shapes = {}
    for entry in entries:
        layout, shape = entry.layout, entry.shape
        if layout is None:
            continue
        if layout.is_matrix:
            shapes[entry.name] = sizes(shape, layout)
        elif layout.kind == Kind.BIAS:  # which has them where it is sharded
            shapes[entry.name] = Sizes(layout.parts, shape[0] // layout.parts, 1)
    return shapes


def _check_u(name: str, u: Any, shape: tuple[int, int], sigma: Tensor) -> None:
    where = f"state['spectral']['u'][{name!r}]"
    if not isinstance(u, Tensor) or tuple(u.shape) != shape:
        got = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(expected(f"{where} of shape {shape}", got, FROM_STATE_DICT))
    if not u.is_floating_point():
        raise TypeError(expected(f"{where} to be a float tensor", u.dtype, FROM_STATE_DICT))
    # Of a weight with NaN or infinity sigma is NaN and u anything, and such a state must load.
    if not bool((u.isfinite().all(dim=1) | ~sigma.to(u.device).isfinite()).all()):
        condition = f"{where} to be finite where sigma is"
        raise ValueError(expected(condition, "NaN or infinity", "The state is damaged: load another"))
