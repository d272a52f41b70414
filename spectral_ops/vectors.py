"""The state of a regularizer: a unit vector, an exponent and a sigma for every matrix, kept flat per group of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops.layers import Entry
from spectral_ops.ops.layout import Layout, pack, sizes, vector_dtype
from spectral_ops.ops.native_table import NativeTable
from spectral_ops.ops.spectral_norm import converged_vectors

# Relative error of sigma that the start vectors are converged to. Warm steps improve on it; from a random vector the first
# sigma would be 30-50 % low.
START_TOL = 1e-5
STATE_KEYS = ("v", "exponent", "sigma")


@dataclass
class Vectors:
    """Of one parameter: v (parts, n), exponent (parts,) int32, sigma (parts,) at the last step."""

    v: Tensor
    exponent: Tensor
    sigma: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Vectors:
        return Vectors(self.v.to(device, dtype), self.exponent.to(device), self.sigma.to(device, dtype))


@dataclass(eq=False)
class Group:
    """Parameters that one call serves: same device, same vector dtype, same optimizer. Buffers are flat over them."""

    entries: list[Entry]
    layouts: list[Layout]
    v: Tensor
    exponents: Tensor
    sigma: Tensor
    owner: object | None
    targets: list[float] = field(init=False)
    scales: list[float] = field(init=False)
    packed: list[int] = field(init=False)
    table: NativeTable = field(init=False)

    def __post_init__(self) -> None:
        self.targets = [entry.target for entry in self.entries]
        self.scales = [entry.strength for entry in self.entries]
        self.packed = pack(self.layouts)
        self.table = NativeTable(self.layouts, self.targets, self.scales, [entry.name for entry in self.entries])

    def parameters(self) -> list[nn.Parameter]:
        return [entry.parameter for entry in self.entries]

    def commit(self, v: Tensor, exponents: Tensor, sigma: Tensor) -> None:
        self.v.copy_(v)
        self.exponents.copy_(exponents)
        self.sigma.copy_(sigma)


def start(entries: Sequence[Entry]) -> dict[str, Vectors]:
    """Converged vectors of parameters on one device and of one vector dtype. Draws nothing from torch's random state."""
    matrices = [(entry, entry.layout) for entry in entries if entry.layout is not None and entry.layout.is_matrix]
    if not matrices:
        return {}
    weights = [entry.parameter for entry, _ in matrices]
    with torch.no_grad():
        flat = converged_vectors(weights, [layout for _, layout in matrices], START_TOL)
    return _per_parameter([entry for entry, _ in matrices], *flat)


def _per_parameter(entries: Sequence[Entry], sigma: Tensor, v: Tensor, exponents: Tensor) -> dict[str, Vectors]:
    """Views into flat buffers, by parameter name."""
    out = {}
    index = at = 0
    for entry in entries:
        assert entry.layout is not None
        if not entry.layout.is_matrix:
            continue
        parts, _, n = sizes(entry.shape, entry.layout)
        out[entry.name] = Vectors(
            v[at : at + parts * n].view(parts, n), exponents[index : index + parts], sigma[index : index + parts]
        )
        index, at = index + parts, at + parts * n
    return out


def make_group(entries: Sequence[Entry], known: Mapping[str, Vectors], owner: object | None) -> tuple[Group, dict[str, Vectors]]:
    """A group with flat buffers holding the known vectors, and views of these by parameter name.

    A parameter without vectors gets converged ones.
    """
    parameter = entries[0].parameter
    device, dtype = parameter.device, vector_dtype(parameter.dtype)
    vectors = start([entry for entry in entries if entry.name not in known])
    vectors |= {entry.name: known[entry.name].to(device, dtype) for entry in entries if entry.name in known}
    ordered = [vectors[entry.name] for entry in entries if entry.name in vectors]
    new = {"device": device, "dtype": dtype}
    v = torch.cat([torch.empty(0, **new), *(x.v.flatten() for x in ordered)])
    exponents = torch.cat([torch.empty(0, device=device, dtype=torch.int32), *(x.exponent for x in ordered)])
    sigma = torch.cat([torch.empty(0, **new), *(x.sigma for x in ordered)])
    layouts = [entry.layout for entry in entries if entry.layout is not None]
    group = Group(list(entries), layouts, v, exponents, sigma, owner)
    return group, _per_parameter(entries, sigma, v, exponents)


# ---- saving and loading ----


def to_state(vectors: Mapping[str, Vectors]) -> dict[str, dict[str, Tensor]]:
    """{"v": {name: (parts, n)}, "exponent": {name: (parts,)}, "sigma": {name: (parts,)}}, copies."""
    return {key: {name: getattr(x, key).detach().clone() for name, x in vectors.items()} for key in STATE_KEYS}


def from_state(state: Any, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Vectors]:
    """The vectors of a state, every one checked against the (parts, n) that the model asks for.

    Raises ValueError or TypeError naming the entry; nothing is changed before all of it has been checked.
    """
    where = "SpectralRegularizer.load_state_dict: expected"
    if not isinstance(state, Mapping) or set(state) != set(STATE_KEYS):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{where} state with the keys {sorted(STATE_KEYS)}, got {got}. Pass what state_dict() returned.")
    for key in STATE_KEYS:
        if not isinstance(state[key], Mapping):
            raise TypeError(f"{where} state[{key!r}] to be a dict, got {type(state[key]).__name__}. Pass what state_dict() returned.")
        missing, extra = sorted(set(shapes) - set(state[key])), sorted(set(state[key]) - set(shapes))
        if missing or extra:
            raise ValueError(
                f"{where} state[{key!r}] to hold exactly the matrices of this model, got missing {missing} and unexpected {extra}. "
                "Build the regularizer with the rules the state was saved under."
            )
    for name, (parts, n) in shapes.items():
        for key in STATE_KEYS:
            x, shape = state[key][name], (parts, n) if key == "v" else (parts,)
            if not isinstance(x, Tensor):
                raise TypeError(f"{where} state[{key!r}][{name!r}] to be a tensor, got {type(x).__name__}. Pass what state_dict() returned.")
            if tuple(x.shape) != shape:
                raise ValueError(
                    f"{where} state[{key!r}][{name!r}] of shape {shape}, got {tuple(x.shape)}. The state belongs to another model or other rules."
                )
            if x.is_floating_point() != (key != "exponent") or x.is_complex():
                raise TypeError(f"{where} state[{key!r}][{name!r}] to be {'an integer' if key == 'exponent' else 'a float'} tensor, got {x.dtype}. Pass what state_dict() returned.")
        if not bool(state["v"][name].isfinite().all()):
            raise ValueError(f"{where} state['v'][{name!r}] to be finite, got NaN or infinity. The state is damaged: start from a new regularizer.")
    return {
        name: Vectors(state["v"][name].clone(), state["exponent"][name].to(torch.int32, copy=True), state["sigma"][name].clone())
        for name in shapes
    }
