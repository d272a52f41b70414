"""SpectralRegularizer: the penalty of a whole model, as a drop-in for a training loop."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_ops.attachment import Attachment
from spectral_ops.conv_sizes import InputSize
from spectral_ops.layers import discover, format_table
from spectral_ops.ops.checks import check_exponent
from spectral_ops.ops.dtensor import is_dtensor
from spectral_ops.ops.layout import sizes, vector_dtype
from spectral_ops.ops.snapshot import Addresses
from spectral_ops.placement import Placement, facts_of, fsdp_records, native_lookup, parameters_of
from spectral_ops.rules import (
    Pattern,
    Patterns,
    Rule,
    check_grad_scale,
    check_strength_value,
    check_treatable,
    checked_strength,
    expected,
    is_readable,
    known_value,
    refuse_transform,
)
from spectral_ops.sharding.group import ShardedGroup, make_sharded_group
from spectral_ops.structure import Choice, Structure
from spectral_ops.vectors import Group, Vectors, from_state, make_group, to_state

NAME = "SpectralRegularizer"


class SpectralRegularizer:
    """Spectral regularization of a model: pulls the largest singular value of every layer toward a target.

        reg = SpectralRegularizer(model, strength=1e-3)

        loss = task_loss + reg()                               # differentiable, clipped with the task's gradient; or
        loss.backward(); reg.accumulate_grad_()                # straight into .grad, the fastest; or
        handle = reg.attach(optimizer)                         # the same from every optimizer.step()

    computes strength * R with

        R = sum over matrices (sigma_1^k - t^k)^2 + sum over biases ||b||^(2k)
          + sum over norm scales sum_i (|g_i|^k - 1)^2 + sum over norm shifts sum_i |s_i|^(2k)

    by one step of warm-started power iteration per call. `print(reg)` shows what is done with each parameter, and why.
    The model is not touched: no hooks, no buffers, no renamed keys. Parameters are found through their modules at each
    call, so that moving, casting, freezing and `load_state_dict(assign=True)` are followed; a frozen parameter is left
    out while it is frozen. A layer that is replaced by another, or comes later, is an error at the next call: build the
    object again.

    Args:
        model: a module, or (name, parameter) pairs such as `model.named_parameters()`, which are read by shape and name
            alone; leaf tensors that require a gradient are parameters, too.
        strength: the coefficient, >= 0: a float, a 0-d tensor (a schedule may fill_ it without recompiling; what it
            writes is not checked), or a mapping from pattern to float, the first match counting, which must cover every
            treated parameter: {"head.*": 1e-2, "*": 1e-3}. No default: it is a choice; 1e-4 to 1e-2 is where to look.
        exponent: k >= 1.
        target: t of the matrices, >= 0, or a mapping from pattern to t, which may also name norm scales.
        include, exclude: patterns (fnmatch on the parameter's name, or a callable (module, name) -> bool) that limit
            what is treated.
        rules: pattern to `Rule`, for packed layers and whatever is not recognised.
        weights, biases, norms: False leaves these out.
        conv: "reshape" reads a conv weight as the matrix (out, in / groups * kernel), as the paper does; "operator" as
            the linear map that the layer is on inputs of its size, whose norm is up to sqrt(kernel sizes) times that
            (of circular layers with windows that begin at the same place, more).
            One layer alone goes back by rules={pattern: "matrix"}. One sigma for every group in both.
        input_size: with "operator": the shape of an input of the model without its batch dimension, (C, H, W), or
            several; one forward on meta tensors, which leaves the model as it is, shows the size at every layer. Or a
            mapping from pattern, of a layer's name or its weight's, to the spatial size of the layer's input.

    Raises:
        ValueError, TypeError: bad arguments, nothing to treat, a treated parameter that is not dense floating point; a
            conv layer of no or several input sizes.
        NotImplementedError: "operator" on a layer with reflect or replicate padding; later, a call inside vmap, grad or
            jvp of torch.func that has wrapped a parameter, or would differentiate the penalty.
        RuntimeError: a DTensor that is neither sharded in contiguous blocks nor replicated, or on a mesh of its own.

    Source: Lewandowski et al., ICLR 2025, arXiv 2406.06811.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> reg = SpectralRegularizer(model, strength=1e-3)
        >>> (model(torch.ones(1, 4)).sum() + reg()).backward()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        strength: float | Tensor | Mapping[Pattern, float],
        exponent: float = 2.0,
        target: float | Mapping[Pattern, float] = 1.0,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        rules: Mapping[Pattern, Rule | str] | None = None,
        weights: bool = True,
        biases: bool = True,
        norms: bool = True,
        conv: str = "reshape",
        input_size: InputSize | None = None,
    ):
        self.exponent = exponent
        by_pattern = strength if isinstance(strength, Mapping) else None
        self._by_pattern = by_pattern is not None
        self.strength = 1.0 if isinstance(strength, Mapping) else strength
        if isinstance(strength, Tensor):
            check_strength_value(known_value(strength))  # on any device: a sync does no harm before training
        self._root = model if isinstance(model, nn.Module) else None
        self.entries = discover(
            model,
            include=include,
            exclude=exclude,
            rules=rules,
            target=target,
            strength=by_pattern,
            weights=weights,
            biases=biases,
            norms=norms,
            conv=conv,
            input_size=input_size,
        )
        self._treated = [entry for entry in self.entries if entry.layout is not None]
        switches = {"weights": weights, "biases": biases, "norms": norms}
        self._structure = Structure(self._root, Choice(include, exclude, rules, switches))
        self._vectors: dict[str, Vectors] = {}
        self._owners: dict[str, Attachment] = {}  # parameter name -> the optimizer that adds its penalty
        self._groups: list[Group | ShardedGroup] = []
        self._captured: list[Group | ShardedGroup] = []
        self._placed: Placement | None = None
        self._addresses: Addresses | None = None  # of all treated parameters, as of this call
        self._lookup: Any = None  # made at the first call
        if not any(entry.parameter.is_meta for entry in self._treated):
            self._current_groups()

    # ---- the three forms ----

    def __call__(self, *, advance: bool = True) -> Tensor:
        """strength * R, 0-d, differentiable in the parameters.

        Advances the power iteration by one step, once per call, while gradients are enabled; with advance=False, and
        under no_grad, nothing of the state changes. Call it once per optimizer step.

        Raises:
            RuntimeError: it is attached to an optimizer, except where nothing of the state changes; a layer was
                replaced or removed, or came later; parameters were tied since or are no more; a parameter is on meta;
                under torch.compile, parameters that were moved, cast or frozen since the last call, or sharded ones.
            ValueError, TypeError: a parameter of another shape than at construction, or no longer dense floating point.
        """
        advance = advance and torch.is_grad_enabled()
        if self._owners and advance:
            self._refuse_twice("reg()")
        total = None
        for group, parameters in self._current_groups():
            value = group.penalty(parameters, self._exponent, advance)
            total = value if total is None else total + value.to(total.device)
        return self._strength * (torch.zeros(()) if total is None else total)

    def accumulate_grad_(self, *, grad_scale: float | Tensor | None = None) -> Tensor:
        """Adds the gradient of strength * R into every .grad, in one pass, and returns strength * R (0-d, no sync).

        Equivalent to `reg().backward()`, without the graph. Missing gradients are created. Call it after `backward`
        (under DDP that is after the all-reduce) and before `optimizer.step()`: before clipping to clip the sum, after
        it to leave the penalty unclipped.

        Args:
            grad_scale: for use before `GradScaler.unscale_`: `scaler.get_scale()`; the added gradient is multiplied by
                it, the returned value is not.

        Raises:
            RuntimeError: it is attached to an optimizer; a layer was replaced or removed, or came later; a parameter is
                on meta.
            ValueError, TypeError: a grad_scale that is not finite and positive, a gradient that does not fit its
                parameter; a parameter of another shape than at construction, or no longer dense floating point.
        """
        if self._owners:
            self._refuse_twice("reg.accumulate_grad_()")
        check_grad_scale(grad_scale)
        return self._accumulate(None, grad_scale, None)

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Adds the penalty's gradient at the start of every `optimizer.step()`; returns a handle with `remove()`.

        It is added after clipping, and once per step whatever the number of accumulated micro-steps. With GradScaler a
        fused optimizer enters its step with gradients still scaled, and the penalty is scaled alike; a step skipped for
        overflow changes nothing. Only parameters of this optimizer are served: attach to each of several optimizers.

        float16 gradients saturate at +-65504 under a fused optimizer with GradScaler, which has looked for infinities
        before the penalty comes: one of the penalty's own would reach the weights. The scale does not shrink for it; a
        strong penalty on float16 weights is better added to the loss.

        Raises:
            ValueError: the optimizer holds none of the treated parameters.
            RuntimeError: a parameter is attached already; later, from step(): a closure, which would discard the
                penalty.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"attach: expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}. Pass the "
                "optimizer itself."
            )
        return Attachment(self, optimizer)

    # ---- looking at it ----

    @property
    def strength(self) -> float | Tensor:
        """The coefficient; may be set at any time. Of a mapping: a factor of all its numbers, 1 at first.

        The value of a CPU tensor is checked when it is set, one on a device at construction alone, for a schedule
        shall not wait for the device. What is written into a tensor later is not checked.
        """
        return self._strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        self._strength = checked_strength(value)

    @property
    def exponent(self) -> float:
        """k; may be set at any time."""
        return self._exponent

    @exponent.setter
    def exponent(self, value: float) -> None:
        self._exponent = check_exponent(NAME, value)

    def sigmas(self) -> dict[str, Tensor]:
        """The singular value of every matrix at the last step, (parts,) by parameter name; copies, no sync."""
        return {name: x.sigma.clone() for name, x in self._vectors.items()}

    def __str__(self) -> str:
        factor = known_value(self._strength) if isinstance(self._strength, Tensor) else self._strength
        strength = "a tensor" if factor is None else f"{factor:g}"
        if self._by_pattern:
            strength = "by pattern" if factor == 1 else f"{strength} * by pattern"
        notes = {entry.name: entry.note for entry in self._treated if entry.note}
        sigmas = {name: x.sigma.tolist() for name, x in self._vectors.items() if is_readable(x.sigma)}
        head = f"{NAME}(strength={strength}, exponent={self.exponent:g})"
        return f"{head}\n{format_table(self.entries, sigmas, notes)}"

    __repr__ = __str__

    # ---- saving and copying ----

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{"v", "exponent", "sigma"}: {parameter name: (parts, n) or (parts,)}; resuming from it keeps every bit."""
        self._require_data()
        self._current_groups()
        return to_state(self._vectors)

    @torch.inference_mode(False)  # torch refuses to let a later step write into what is made under inference_mode
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over a state. A missing, extra or wrongly shaped entry is a ValueError naming it and changes nothing.

        What is frozen may be missing: it has vectors only once it has been trained.
        """
        shapes = {}
        for entry in self._treated:
            if entry.layout is not None and entry.layout.is_matrix:
                parts, _, n = sizes(entry.shape, entry.layout)
                shapes[entry.name] = (parts, n)
        loaded = from_state(state, shapes, {e.name for e in self._treated if e.frozen})
        if self._placed is not None and set(loaded) == set(self._vectors):
            # In place: a captured CUDA graph goes on with these very buffers.
            for name, vectors in loaded.items():
                self._vectors[name].copy_(vectors)
            return
        self._vectors, self._placed = loaded, None
        if not any(entry.parameter.is_meta for entry in self._treated):
            self._current_groups()  # now, so that a compiled step finds the groups in place

    def __getstate__(self) -> dict[str, Any]:
        # Made anew at the next call.
        made: dict[str, Any] = {"_groups": [], "_captured": [], "_placed": None, "_lookup": None, "_addresses": None}
        return self.__dict__ | made | {"_owners": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralRegularizer:
        # A copy by itself would drag along a hidden copy of the model and regularize that.
        held = [self._root] if self._root is not None else [entry.held for entry in self._treated]
        if any(id(item) not in memo for item in held):
            remedy = "Use copy.deepcopy((model, reg)), model first, or build a new one and load this one's state_dict()"
            raise RuntimeError(expected("deepcopy together with its model", "the regularizer alone", remedy))
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__getstate__().items()})
        return new

    # ---- inside ----

    def _current_groups(self) -> list[tuple[Group | ShardedGroup, list[nn.Parameter]]]:
        """The groups, with their parameters as they are now; made anew where one moved, was cast, frozen or sharded."""
        if torch.compiler.is_compiling():
            parameters = [entry.parameter for entry in self._treated]
            if self._placed is None or [facts_of(p) for p in parameters] != self._placed.facts:
                remedy = "After moving, casting, freezing or copying parameters call reg(advance=False) once, outside"
                raise RuntimeError(
                    expected("parameters placed as at the last call", "a change inside torch.compile", remedy)
                )
            if any(isinstance(group, ShardedGroup) for group in self._groups):
                remedy = "Compile the model, and call the regularizer outside: accumulate_grad_() after backward"
                raise RuntimeError(expected("whole parameters inside torch.compile", "sharded ones", remedy))
        else:
            structure = self._structure
            look_again = self._lookup is None or (structure.waiting and structure.woken())
            found = None if look_again else self._lookup.parameters()
            if found is None:
                structure.check(self.entries)
                found = parameters_of(self._treated)
                gathered = any(entry.record is not None for entry in self._treated)  # looked up in Python, see Entry
                self._lookup = None if gathered else native_lookup(self._treated, structure.children)
            parameters = found
            self._addresses = None if self._placed is None else self._placed.addresses(parameters)
            if self._addresses is None:
                parameters = self._regroup()
                self._placed = Placement(parameters)
        if len(self._groups) == 1 and len(self._groups[0].places) == len(parameters):
            return [(self._groups[0], parameters)]
        return [(group, [parameters[i] for i in group.places]) for group in self._groups]

    def _require_data(self) -> None:
        for entry in self._treated:
            if entry.parameter.is_meta:
                remedy = "Materialise the model first (to_empty, then its initialisation or load_state_dict)"
                raise RuntimeError(expected(f"parameter {entry.name!r} to hold data", "one on the meta device", remedy))

    @torch.inference_mode(False)  # as of load_state_dict: an evaluation may be the first call after a move
    def _regroup(self) -> list[nn.Parameter]:
        """Makes the groups anew; the parameters."""
        refuse_transform("parameters as they were at the last call")  # vmap and the like have put theirs in their place
        records = fsdp_records(self._root)
        for entry in self._treated:
            entry.record = records.get((entry.module, entry.attribute)) if entry.module is not None else None
        if records:
            self._lookup = None
        self._require_data()
        sorted_out: dict[Any, list[int]] = {}
        for place, entry in enumerate(self._treated):
            p = entry.parameter
            if tuple(p.shape) != entry.shape:
                condition, remedy = f"parameter {entry.name!r} of shape {entry.shape}", "Build the regularizer again"
                raise ValueError(expected(condition, f"{tuple(p.shape)} since", remedy))
            check_treatable(entry.name, p)  # again: it may have been sharded or cast since
            if not entry.frozen:
                on_operators = entry.layout is not None and entry.layout.operator is not None
                dtype, owner = vector_dtype(p.dtype), id(self._owners.get(entry.name))
                key = (p.device, dtype, owner, on_operators, is_dtensor(p))
                sorted_out.setdefault(key, []).append(place)
        groups, vectors = [], dict(self._vectors)
        for (*_, sharded), places in sorted_out.items():
            entries = [self._treated[place] for place in places]
            make = make_sharded_group if sharded else make_group
            group, views = make(entries, places, self._vectors, self._owners.get(entries[0].name))
            groups.append(group)
            vectors |= views
        # Groups that a CUDA graph was captured with are kept: it may still be replayed.
        self._captured += [group for group in self._groups if group.captured]
        self._groups = groups
        # In the order of the table, so that two states print and compare alike.
        self._vectors = {entry.name: vectors[entry.name] for entry in self._treated if entry.name in vectors}
        return [entry.parameter for entry in self._treated]

    def _accumulate(
        self, owner: Attachment | None, grad_scale: float | Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        total = None
        groups = [(group, parameters) for group, parameters in self._current_groups() if group.owner is owner]
        several = len(groups) > 1 and not torch.compiler.is_compiling()
        if several or any(isinstance(group, ShardedGroup) for group, _ in groups):
            for group, parameters in groups:  # all of them before the first changes a gradient
                group.check(parameters)
        for group, parameters in groups:
            # Of this very list, where one group holds it all.
            known = self._addresses if len(group.places) == len(self._treated) else None
            value = group.accumulate(parameters, self._exponent, self._strength, grad_scale, found_inf, known)
            total = value if total is None else total + value.to(total.device)
        return torch.zeros(()) if total is None else total

    def _refuse_twice(self, call: str) -> None:
        got = "one attached to an optimizer, which adds the penalty at each step"
        remedy = "Use one of the forms; to look at the value: reg(advance=False) under torch.no_grad()"
        raise RuntimeError(expected(f"{call} on a regularizer that is not attached", got, remedy))
