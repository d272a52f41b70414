"""What SpectralAdamW asks of its arguments before torch sees them."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from spectral_ops.ops.adamw_state import NAME, Hyper
from spectral_ops.ops.checks import check_exponent, check_target
from spectral_ops.optim_state import expected
from spectral_ops.rules import known_value

SPECTRAL_KEYS = ("strength", "exponent", "target")  # of a parameter group, beside torch's
TERM_CHECKS: dict[str, Callable[[str, Any], float]] = {"exponent": check_exponent, "target": check_target}
# Of torch's, what has one value here, and the remedy.
FIXED: dict[str, tuple[bool, str]] = {
    "differentiable": (False, "Autograd does not trace the step: leave it out"),
    "decoupled_weight_decay": (True, "Leave it out, or add weight_decay * w to the loss's gradients"),
}
# Of difflib's ratio: strenght 0.88, exponant 0.88, maximise 0.88, tagret 0.83; decoupled_decay, timm's, 0.81.
NEAR_MISS = 0.83
SHORT = 5  # letters; names up to here are near to other optimizers' own: eps to eps1, betas to etas (Rprop)


def check_arguments(
    params: Any, strength: Any, exponent: Any, seed: Any, differentiable: bool, roundings: tuple[bool, bool]
) -> int:
    """The constructor's, before torch sees them; the seed as an int. roundings: master_weights, stochastic_rounding."""
    if differentiable:
        raise ValueError(expected("differentiable=False", "True", FIXED["differentiable"][1]))
    if all(roundings):
        remedy = "A weight rounded from its master loses nothing: choose one"
        raise ValueError(expected("master_weights or stochastic_rounding", "both", remedy))
    _check_params(params)
    check_exponent(NAME, exponent)
    if not isinstance(strength, Mapping):
        check_strength("strength", strength)
    return _check_seed(seed)


def _check_params(params: Any) -> None:
    # A ParameterList gives its parameters one by one; other modules fail in torch, which does not name the remedy.
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        got = f"a module ({type(params).__name__})"
        raise TypeError(expected("params to be parameters or groups of them", got, "Pass model.parameters()"))
    if not isinstance(params, Iterable):
        got = type(params).__name__
        raise TypeError(expected("params to be parameters or groups of them", got, "Pass model.parameters()"))


def check_strength(where: str, value: Any) -> None:
    """Of a tensor its value too, where it can be read; that may wait for the device."""
    remedy = "Use a float such as 1e-3"
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(expected(f"{where} to be a 0-d float tensor", f"{value.dtype}, {value.ndim}-d", remedy))
        value = known_value(value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(expected(f"{where} to be a number or a 0-d tensor", type(value).__name__, remedy))
    if value is not None and not (value >= 0 and math.isfinite(value)):
        raise ValueError(expected(f"{where} to be finite and not negative", value, remedy))


def check_group(number: int, group: Mapping[str, Any], options: Collection[str]) -> None:
    """The spectral keys of a parameter group; and no key that is a misspelt option, which torch would only keep."""
    for key in group:
        if isinstance(key, str) and (meant := _meant(key, {*options, *SPECTRAL_KEYS})) is not None:
            condition = f"the keys of param_groups[{number}] to be options, or names unlike them"
            raise ValueError(expected(condition, repr(key), f"Write {meant!r}"))
    if group.get("strength") is not None:
        check_strength(f"param_groups[{number}]['strength']", group["strength"])
    check_kept(number, {key: group[key] for key in (*TERM_CHECKS, *FIXED) if group.get(key) is not None})


def check_kept(number: int, group: Mapping[str, Any]) -> None:
    """What of a group is read at each cut: the exponent, the target where there is one, and what has one value."""
    for key, (value, remedy) in FIXED.items():
        if bool(group.get(key, value)) != value:
            raise ValueError(expected(f"param_groups[{number}]['{key}'] to be {value}", group[key], remedy))
    for key, check in TERM_CHECKS.items():
        if key not in group or (key == "target" and group[key] is None):
            continue
        try:
            check(NAME, group[key])
        except (TypeError, ValueError) as error:
            where = f"param_groups[{number}]['{key}']"
            raise type(error)(str(error).replace(f"expected {key} ", f"expected {where} ")) from None


def _meant(key: str, options: Collection[str]) -> str | None:
    """The option that a key misspells; None for options themselves and for what other code keeps in a group."""
    long = [option for option in options if len(option) > SHORT]
    # no_weight_decay, weight_decay_scale: a word more is a name of its own.
    if key in options or any(f"_{option}" in key or f"{option}_" in key for option in long):
        return None
    near = difflib.get_close_matches(key, long, n=1, cutoff=NEAR_MISS)
    return near[0] if near else None


def hyper_of(number: int, group: Mapping[str, Any]) -> Hyper:
    """The numbers of a step; a strength that is a tensor is taken as it is."""
    strength = group["strength"]
    if not isinstance(strength, Tensor):
        check_strength(f"param_groups[{number}]['strength']", strength)
    beta1, beta2 = group["betas"]
    return Hyper(group["lr"], float(beta1), float(beta2), group["eps"], group["weight_decay"], strength)


def _check_seed(seed: Any) -> int:
    try:
        if isinstance(seed, bool):
            raise TypeError
        return operator.index(seed)
    except TypeError:
        raise TypeError(expected("seed to be a whole number", repr(seed), "Use one such as 0")) from None
