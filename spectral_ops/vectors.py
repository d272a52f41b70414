"""The state of a regularizer: a unit vector, an exponent and a sigma for every matrix, flat per group of parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops import backends
from spectral_ops.layers import Entry
from spectral_ops.ops.accumulate_grad import accumulate_grad
from spectral_ops.ops.checks import check_gradient
from spectral_ops.ops.eager_penalty import WarmStep, eager_penalty
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Layout, pack, sizes, vector_dtype
from spectral_ops.ops.power_iteration import counts
from spectral_ops.ops.snapshot import Addresses, Snapshot, gradients_of, has_memory
from spectral_ops.ops.spectral_norm import converged_vectors
from spectral_ops.rules import refuse_transform

# Relative error of sigma that the start vectors are converged to. Warm steps improve on it; from a random vector the
# first sigma would be 30-50 % low.
START_TOL = 1e-5
KEPT = "accumulate_grad_ where gradients are kept"
STATE_KEYS = ("v", "exponent", "sigma")


@dataclass
class Vectors:
    """Of one parameter: v (parts, n), exponent (parts,) int32, sigma (parts,) at the last step."""

    v: Tensor
    exponent: Tensor
    sigma: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Vectors:
        return Vectors(self.v.to(device, dtype), self.exponent.to(device), self.sigma.to(device, dtype))

    def copy_(self, other: Vectors) -> None:
        self.v.copy_(other.v)
        self.exponent.copy_(other.exponent)
        self.sigma.copy_(other.sigma)


@dataclass(eq=False)
class Group:
    """Parameters that one call serves: same device, same vector dtype, same optimizer; conv operators or none.

    Buffers are flat over them.
    """

    entries: list[Entry]
    places: list[int]  # of the entries among all treated ones
    layouts: list[Layout]
    v: Tensor
    exponents: Tensor
    sigma: Tensor
    owner: object | None
    targets: list[float] = field(init=False)
    scales: list[float] = field(init=False)
    packed: str = field(init=False)
    rows: int = field(init=False)  # of all matrices
    table: LayerTable = field(init=False)
    _checked: Snapshot | None = field(init=False, default=None)  # of gradients that were found fine
    _by_address: bool = field(init=False)  # whether kernels can be handed its tensors past the dispatcher

    def __post_init__(self) -> None:
        self.targets = [entry.target for entry in self.entries]
        self.scales = [entry.strength for entry in self.entries]
        self.packed = pack(self.layouts)
        parameters = [entry.parameter for entry in self.entries]
        self.rows = counts(parameters, self.layouts)[1]
        self._by_address = all(has_memory(x) for x in (self.v, *parameters))
        self.table = LayerTable(self.layouts, self.targets, self.scales, [entry.name for entry in self.entries])

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds a launch of it."""
        return self.table.captured

    def check(self, parameters: list[nn.Parameter]) -> None:
        """Raises for gradients that `accumulate` could not add to."""
        gradients = gradients_of(parameters)
        if gradients is not None and self._checked is not None and self._checked.addresses(gradients) is not None:
            return
        for entry, p in zip(self.entries, parameters, strict=True):
            if p.grad is not None:
                check_gradient("accumulate_grad_", entry.name, p, p.grad)
        self._checked = None if gradients is None else Snapshot(gradients)

    @property
    def _dispatched(self) -> bool:
        """Whether this call goes by the registered ops: for the compiler, and what else must see every op.

        A tensor that keeps its memory elsewhere, or none, as a fake one, has no address to hand to a kernel, and under
        a dispatch mode new tensors may be such.
        """
        return torch.compiler.is_compiling() or not self._by_address or torch._C._len_torch_dispatch_stack() > 0

    def accumulate(
        self,
        parameters: list[nn.Parameter],
        exponent: float,
        strength: float | Tensor,
        grad_scale: float | Tensor | None,
        found_inf: Tensor | None,
        addresses: Addresses | None = None,
    ) -> Tensor:
        """strength * R of the group; its gradient added to every .grad, the state advanced."""
        gradients = None if torch.compiler.is_compiling() else gradients_of(parameters)
        if gradients is None:
            if not torch.compiler.is_compiling():
                refuse_transform(KEPT)
                self.check(parameters)  # before the first is made: a step that fails leaves none that decays its weight
            gradients = []
            for p in parameters:
                gradient = p.grad
                if gradient is None:
                    gradient = p.grad = torch.zeros_like(p, dtype=_gradient_dtype(p))
                gradients.append(gradient)
        scale, skip = on_device(grad_scale, self.v.device), on_device(found_inf, self.v.device)
        if not self._dispatched:
            try:
                return accumulate_grad(
                    gradients,
                    parameters,
                    self.v,
                    self.exponents,
                    self.sigma,
                    self.table,
                    exponent,
                    strength,
                    scale,
                    skip,
                    addresses,
                )
            except RuntimeError:
                refuse_transform(KEPT)
                raise
        # The compiler can trace the registered op only; another step goes straight to the kernel, which costs less.
        # Numbers go in as float64, which is what a Python float is.
        factor = torch.as_tensor(strength, dtype=None if isinstance(strength, Tensor) else torch.float64)
        scale = torch.as_tensor(scale, dtype=torch.float64) if isinstance(scale, (int, float)) else scale
        return torch.ops.spectral_ops.accumulate_grad_(
            gradients,
            [p.detach() for p in parameters],
            self.v,
            self.exponents,
            self.sigma,
            self.packed,
            self.targets,
            self.scales,
            exponent,
            factor,
            scale,
            skip,
        )

    def penalty(self, parameters: list[nn.Parameter], exponent: float, advance: bool) -> Tensor:
        """R of the group, differentiable; the state advanced where that is asked for."""
        if not self._dispatched:
            backend = backends.choose(
                self.v.device, backends.op_name("spectral_penalty", self.table.has_operators), self.v.dtype
            )
            if backend != "reference":
                step = WarmStep(backend, self.table, self.v, self.exponents, self.sigma, self.rows, exponent, advance)
                try:
                    return eager_penalty(step, parameters)
                except RuntimeError:
                    refuse_transform("a penalty that torch can differentiate")
                    raise
        value, sigma, _, v, exponents = torch.ops.spectral_ops.spectral_penalty(
            parameters, self.v, self.exponents, self.packed, self.targets, self.scales, exponent
        )
        if advance:
            self.commit(v, exponents, sigma)
        return value

    def commit(self, v: Tensor, exponents: Tensor, sigma: Tensor) -> None:
        self.v.copy_(v)
        self.exponents.copy_(exponents)
        self.sigma.copy_(sigma)


def _gradient_dtype(p: nn.Parameter) -> torch.dtype:
    """What torch lets a gradient of p be: another type than p's where `p.grad_dtype` is set (torch 2.10 and later)."""
    return (None if torch.compiler.is_compiling() else getattr(p, "grad_dtype", None)) or p.dtype


def on_device(x: Any, device: torch.device) -> Any:
    """A factor or flag of a step there where the step is; a number as it is."""
    return x.to(device, non_blocking=True) if isinstance(x, Tensor) and x.device != device else x


def start(entries: Sequence[Entry]) -> dict[str, Vectors]:
    """Converged vectors of parameters on one device and of one vector dtype. Leaves torch's random state alone."""
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


def make_group(
    entries: Sequence[Entry], places: list[int], known: Mapping[str, Vectors], owner: object | None
) -> tuple[Group, dict[str, Vectors]]:
    """A group with flat buffers holding the known vectors, and views of these by parameter name.

    A parameter without vectors gets converged ones.
    """
    parameter = entries[0].parameter
    device, dtype = parameter.device, vector_dtype(parameter.dtype)
    # Of a frozen matrix, which an optimizer's group holds as a plain parameter, vectors may be known and wait.
    matrices = [entry for entry in entries if entry.layout is not None and entry.layout.is_matrix]
    vectors = start([entry for entry in matrices if entry.name not in known])
    vectors |= {entry.name: known[entry.name].to(device, dtype) for entry in matrices if entry.name in known}
    ordered = [vectors[entry.name] for entry in matrices]
    none = torch.empty(0, device=device, dtype=dtype)
    v = torch.cat([none, *(x.v.flatten() for x in ordered)])
    exponents = torch.cat([none.int(), *(x.exponent for x in ordered)])
    sigma = torch.cat([none, *(x.sigma for x in ordered)])
    layouts = [entry.layout for entry in entries if entry.layout is not None]
    group = Group(list(entries), places, layouts, v, exponents, sigma, owner)
    return group, _per_parameter(entries, sigma, v, exponents)


# ---- saving and loading ----


def to_state(vectors: Mapping[str, Vectors]) -> dict[str, dict[str, Tensor]]:
    """{"v": {name: (parts, n)}, "exponent": {name: (parts,)}, "sigma": {name: (parts,)}}, copies."""
    return {key: {name: getattr(x, key).detach().clone() for name, x in vectors.items()} for key in STATE_KEYS}


def from_state(state: Any, shapes: Mapping[str, tuple[int, int]], optional: Collection[str] = ()) -> dict[str, Vectors]:
    """The vectors of a state, every one checked against the (parts, n) that the model asks for.

    Raises ValueError or TypeError naming the entry; nothing is changed before all of it has been checked.
    """
    remedy = "Pass what state_dict() returned"
    if not isinstance(state, Mapping) or set(state) != set(STATE_KEYS):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(_expected(f"state with the keys {sorted(STATE_KEYS)}", got, remedy))
    for key in STATE_KEYS:
        if not isinstance(state[key], Mapping):
            raise TypeError(_expected(f"state[{key!r}] to be a dict", type(state[key]).__name__, remedy))
    there = set(state["v"])
    for key in STATE_KEYS:
        # What is optional has all of its entries or none.
        wanted = {name for name in shapes if name in there or name not in optional}
        missing, extra = sorted(wanted - set(state[key])), sorted(set(state[key]) - wanted)
        if missing or extra:
            condition = f"state[{key!r}] to hold exactly the matrices of this model"
            model = "Build the regularizer with the rules, and freeze the parameters, that the state was saved under"
            raise ValueError(_expected(condition, f"missing {missing} and unexpected {extra}", model))
    loaded = {name: shape for name, shape in shapes.items() if name in there}
    for name, (parts, n) in loaded.items():
        for key in STATE_KEYS:
            _check_entry(f"state[{key!r}][{name!r}]", state[key][name], (parts, n) if key == "v" else (parts,), key)
    return {
        name: Vectors(
            v=state["v"][name].detach().clone(),
            exponent=state["exponent"][name].to(torch.int32, copy=True),
            sigma=state["sigma"][name].detach().clone(),
        )
        for name in loaded
    }


def _check_entry(where: str, x: Any, shape: tuple[int, ...], key: str) -> None:
    remedy = "Pass what state_dict() returned"
    if not isinstance(x, Tensor):
        raise TypeError(_expected(f"{where} to be a tensor", type(x).__name__, remedy))
    if tuple(x.shape) != shape:
        other = "The state belongs to another model, or to other rules, conv or input_size"
        raise ValueError(_expected(f"{where} of shape {shape}", tuple(x.shape), other))
    if key == "exponent":
        if x.is_floating_point() or x.is_complex():
            raise TypeError(_expected(f"{where} to be an integer tensor", x.dtype, remedy))
    elif not x.is_floating_point():
        raise TypeError(_expected(f"{where} to be a float tensor", x.dtype, remedy))
    # sigma may be NaN, where a weight was; it only tells of the last step.
    if key == "v" and not bool(x.isfinite().all()):
        damaged = "The state is damaged: start from a new regularizer"
        raise ValueError(_expected(f"{where} to be finite", "NaN or infinity", damaged))


def _expected(condition: str, got: object, remedy: str) -> str:
    return f"SpectralRegularizer.load_state_dict: expected {condition}, got {got}. {remedy}."
