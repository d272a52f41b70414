"""SpectralAdamW: AdamW with the penalty folded into its pass over the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from spectral_ops.layers import Entry
from spectral_ops.ops.adamw_state import Hyper
from spectral_ops.ops.capture import refuse_first
from spectral_ops.ops.snapshot import has_memory
from spectral_ops.optim_checks import SPECTRAL_KEYS, check_arguments, check_group, check_kept, hyper_of
from spectral_ops.optim_cut import Cut
from spectral_ops.optim_entries import are_of, entries_of, refuse_twice, table_of
from spectral_ops.optim_loading import check_mapping, check_saved, own_settings
from spectral_ops.optim_parts import Part
from spectral_ops.optim_spectra import Spectra
from spectral_ops.optim_state import follow_weights, own_name, restore, saw_weights, tensors_of
from spectral_ops.rules import Pattern, Patterns, Rule
from spectral_ops.vectors import on_device

# Of the object beside torch's attributes: what a copy takes along. The rest is made anew.
OWN = ("penalty", "_decoupled", "_masters", "_stochastic", "_seed", "_model", "_reading", "entries", "_ready")


class SpectralAdamW(AdamW):
    """AdamW whose step also pulls the largest singular value of every layer toward a target, in the same pass.

        optimizer = SpectralAdamW(model.parameters(), lr=1e-3, model=model, strength=1e-3)

    A drop-in for torch.optim.AdamW: param groups, hooks, lr schedulers, GradScaler, state_dict. Equivalent, to
    rounding, to

        reg = SpectralRegularizer(model, strength=1e-3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ...
        loss.backward(); clip_grad_norm_(model.parameters(), 1.0)
        reg.accumulate_grad_(); optimizer.step()

    without reading any weight for it: the step reads and writes them all, and takes what the next step's penalty
    needs of the new ones as it goes. `.grad` is read and stays as it is.

    Args:
        params: parameters, (name, parameter) pairs or groups, as torch takes them. A group may set `strength` (a
            float or a 0-d tensor, which a schedule may change; what it writes into a tensor, or puts in its place, is
            not checked), `exponent` and `target` (of its matrices) for itself. A key that misspells an option is an
            error, and so is decoupled_weight_decay=False; other keys are kept, as torch keeps them.
        lr, betas, eps, weight_decay, amsgrad, capturable: as torch has them.
        maximize: of the task's objective. The penalty is made smaller all the same; torch's AdamW, given the sum, would
            drive every sigma up.
        foreach, fused: kept in the groups and otherwise without effect. differentiable: False alone.
        model: tells what the parameters are: Linear, conv, norm, embedding. Without it they are read by name and shape:
            two and more dimensions are a matrix, one whose name ends in "bias" a bias, the rest is left out.
        strength, exponent, target, include, exclude, rules, weights, biases, norms: as SpectralRegularizer has them.
            Conv weights are read as matrices.
        decoupled: the penalty's gradient p goes past the moments, as weight decay does: W -= lr * p.
        master_weights: 16-bit weights are updated in a float32 copy, state["master"], and rounded from it.
        stochastic_rounding: bfloat16 weights are rounded up or down by chance, so that small updates count on average.
            Without effect on float32 and float64 weights; float16 ones are refused.
        seed: of that chance; torch's random state has no part in it.

    Moments of 16-bit weights are float32. A penalised parameter without a gradient counts as one with a gradient of
    zero; a frozen one (requires_grad=False) has no penalty, and moves by a gradient that it still has, as torch has it.
    Parameters that are put into a group's list, or get another shape, are read anew. A step that GradScaler skips
    changes nothing. What is written into a weight through `.data` or numpy, or into shards (`to_local()`), goes unseen,
    and the next step's penalty is then that of the weight before: call `prime()` after it, of sharded parameters on all
    ranks. `entries` lists what every parameter is read as.

    Raises:
        ValueError, TypeError: bad arguments; a parameter in two groups; later, from step(): a gradient that is sparse,
            complex or of another shape or device, before anything is changed.
        RuntimeError: a DTensor that is neither sharded in contiguous blocks nor replicated, or on a mesh of its own.

    Source: Lewandowski et al., ICLR 2025, arXiv 2406.06811; Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> optimizer = SpectralAdamW(model.parameters(), model=model, strength=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    _step_supports_amp_scaling = True  # gradients come scaled, with grad_scale and found_inf set

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        model: nn.Module | None = None,
        strength: float | Tensor | Mapping[Pattern, float],
        exponent: float = 2.0,
        target: float | Mapping[Pattern, float] = 1.0,
        decoupled: bool = False,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        rules: Mapping[Pattern, Rule | str] | None = None,
        weights: bool = True,
        biases: bool = True,
        norms: bool = True,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        roundings = master_weights, stochastic_rounding
        seed = check_arguments(params, strength, exponent, seed, differentiable, roundings)
        self.penalty: Tensor | None = None
        self._decoupled, self._masters = decoupled, master_weights
        self._stochastic, self._seed = stochastic_rounding, seed
        self._model = model
        self._reading: dict[str, Any] = {
            "include": include,
            "exclude": exclude,
            "rules": rules,
            "target": target,
            "strength": strength if isinstance(strength, Mapping) else None,
            "weights": weights,
            "biases": biases,
            "norms": norms,
        }
        self.entries: list[Entry] = []
        self._spectra = Spectra()
        self._cut: Cut | None = None
        self._captured: list[Part] = []  # of earlier cuts, used at every replay of a CUDA graph
        self._followed: dict[int, tuple[int, int]] = {}  # of weights that masters hold, address and version
        self._ready = False
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=False, fused=fused,
        )  # fmt: skip
        defaults = (1.0 if isinstance(strength, Mapping) else strength, exponent, None)
        for key, value in zip(SPECTRAL_KEYS, defaults, strict=True):
            self.defaults[key] = value
            for group in self.param_groups:
                group.setdefault(key, value)
        self._ready = True
        self._discover()

    # ---- the step ----

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss. `penalty` is then strength * R of the new weights, 0-d, no sync."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
            return loss
        hyper = [hyper_of(number, group) for number, group in enumerate(self.param_groups)]
        found = None if self._cut is None else self._cut.as_before(self.param_groups, self.state)
        if found is None:
            self.penalty = self._step_afresh(hyper, scale, found_inf)
            return loss
        total = None
        for part, addresses in found:
            self._spectra.refresh(part)
            device = part.u.device
            value = part.step_again(addresses, hyper, on_device(scale, device), on_device(found_inf, device))
            self._spectra.record(part)
            total = value if total is None else total + value.to(total.device)
        self.penalty = total
        return loss

    def _step_afresh(self, hyper: Sequence[Hyper], scale: Any, found_inf: Tensor | None) -> Tensor | None:
        """A step that looks at every tensor, and remembers how they look."""
        with own_name():
            parts = self._current_parts()
            work = [(part, part.prepared(tensors_of(part, self.state, self._masters))) for part in parts]
        for part, tensors in work:  # all of them, before anything is changed
            part.check(tensors)
        total = None
        for part, tensors in work:
            part.lookup = None  # of the step before, should this one fail
            self._spectra.refresh(part)
            if self._masters:
                follow_weights(part, tensors, self._followed)
            device = part.u.device
            value = part.step(tensors, hyper, on_device(scale, device), on_device(found_inf, device))
            self._spectra.record(part)
            if self._masters:
                saw_weights(part, tensors, self._followed)
            else:
                part.remember(self.state, tensors)
            total = value if total is None else total + value.to(total.device)
        return total

    @torch.no_grad()
    def prime(self) -> None:
        """Reads every weight again: for changes that left no trace, through `.data` or numpy."""
        self._spectra.forget()
        for part in self._current_parts():
            self._spectra.refresh(part)

    # ---- parameters, and what they are read as ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch has it; the penalty comes to the new parameters too."""
        group = dict(param_group)
        params = group["params"]
        if not isinstance(params, set):  # which torch refuses
            group["params"] = [params] if isinstance(params, Tensor) else list(params)
            refuse_twice(group["params"], self.param_groups, self._model)
        check_group(len(self.param_groups), group, self.defaults)
        super().add_param_group(group)
        if self._ready:
            try:
                self._discover()
            except BaseException:
                self.param_groups.pop()
                raise

    @torch.no_grad()
    def _discover(self) -> None:
        """What every parameter is read as, and s, u, v of those that have them."""
        self._read()
        if not any(p.is_meta for group in self.param_groups for p in group["params"]):
            for part in self._current_parts():
                self._spectra.refresh(part)

    def _read(self) -> None:
        entries = entries_of(self.param_groups, self.entries, self._model, self._reading, self._stochastic)
        self._spectra.keep(self._cut.parts if self._cut is not None else ())
        self._spectra.follow(self.entries, entries)
        self._drop_cut()
        self.entries = entries

    def _follow_groups(self) -> None:
        """Reads parameters anew where the lists of the groups were edited, or one is of another shape."""
        if not are_of(self.entries, self.param_groups):
            self._read()

    def _drop_cut(self) -> None:
        """The next step cuts anew."""
        if self._cut is not None:
            self._captured += [part for part in self._cut.parts if part.captured]
            self._cut = None

    def _current_parts(self) -> list[Part]:
        """The calls of a step; cut anew where a parameter was moved, cast, frozen, replaced or first got a gradient."""
        cut = self._cut
        if cut is None or not cut.holds_throughout(self.param_groups):
            self._spectra.keep(cut.parts if cut is not None else ())
            self._follow_groups()
            for number, group in enumerate(self.param_groups):
                check_kept(number, group)
            for group in self.param_groups:
                for p in group["params"][:1]:  # copies of s, u, v would be made anew at every replay
                    refuse_first("a step", p.device)
            self._drop_cut()
            self._cut = cut = Cut(
                self.param_groups,
                self.entries,
                self.state,
                self._spectra,
                decoupled=self._decoupled,
                masters=self._masters,
                stochastic=self._stochastic,
                seed=self._seed,
            )
        return cut.parts

    # ---- looking at it, saving, copying ----

    def sigmas(self) -> dict[str, Tensor]:
        """The singular value of every matrix as the last step left it, (parts,) by parameter name; copies, no sync."""
        names = {entry.name for entry in self.entries if entry.layout is not None and entry.layout.is_matrix}
        return {name: x.sigma.clone() for name, x in self._spectra.vectors.items() if name in names}

    @torch.no_grad()
    def penalty_gradients(self) -> dict[str, Tensor]:
        """strength * dR/dp of every penalised parameter by name, which the next step takes in: to look at, new tensors.

        Raises:
            NotImplementedError: sharded parameters.
        """
        hyper = [hyper_of(number, group) for number, group in enumerate(self.param_groups)]
        out: dict[str, Tensor] = {}
        for part in self._current_parts():
            self._spectra.refresh(part)
            out |= part.penalty_gradients(hyper)
        return out

    def __repr__(self) -> str:
        shown = {name: sigma.tolist() for name, sigma in self.sigmas().items() if has_memory(sigma)}
        return f"{super().__repr__()}\n{table_of(self.entries, self.param_groups, shown)}"

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """torch's, which AdamW loads too, and under "spectral" s, u, v by parameter name.

        Of sharded parameters all ranks call it together.
        """
        return super().state_dict() | {"spectral": self._saved_spectra()}

    def spectral_state_dict(self) -> dict[str, dict[str, Tensor]]:
        """s, u, v by parameter name, whole: what torch.distributed.checkpoint saves beside get_optimizer_state_dict.

        Of sharded parameters all ranks call it together.
        """
        return self._saved_spectra()

    def load_spectral_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `spectral_state_dict` returned, on however many ranks; after weights and optimizer state."""
        self._follow_groups()
        self._take_spectra(self._loaded_spectra(state))

    def _take_spectra(self, spectra: Spectra) -> None:
        self._drop_cut()
        self._spectra, self._followed = spectra, {}

    def _loaded_spectra(self, state: Mapping[str, Any]) -> Spectra:
        with own_name():
            return self._spectra.load(state, self.entries)

    @torch.no_grad()
    def _saved_spectra(self) -> dict[str, dict[str, Tensor]]:
        parts = [] if any(entry.parameter.is_meta for entry in self.entries) else self._current_parts()
        for part in parts:
            self._spectra.refresh(part)
        return self._spectra.state_dict(parts, self.entries)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state, one of torch's AdamW too.

        Where a weight is the one that the state was saved with when the next step comes, training goes on bit by bit;
        otherwise it is read once before that step.

        Hooks are given the whole state, "spectral" too, and what they return is what is loaded.

        Raises:
            ValueError, TypeError: an entry of another shape or another kind of optimizer's, which is named; no state at
                all; before anything is changed.
        """
        check_mapping("state_dict", state_dict)
        self._follow_groups()
        loaded: dict[str, Any] = {}

        def check(_: Any, state: Mapping[str, Any]) -> dict[str, Any]:
            loaded["spectra"], loaded["state"] = self._loadable(state)
            loaded["own"] = own_settings(self.param_groups, state["param_groups"])
            return cast(dict[str, Any], loaded["state"])

        def take(_: Any) -> None:
            for group, own in zip(self.param_groups, loaded["own"], strict=True):
                group.update(own)  # of which torch makes copies, which a schedule's tensor would not reach
            restore(self.state, self.param_groups, [entry.name for entry in self.entries], loaded["state"])
            self._take_spectra(loaded["spectra"])

        # Between the user's hooks: what theirs made of the state is what counts, and what they make of ours.
        hooks = self.register_load_state_dict_pre_hook(check), self.register_load_state_dict_post_hook(take, True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def _loadable(self, state_dict: Mapping[str, Any]) -> tuple[Spectra, dict[str, Any]]:
        """What is known of s, u, v by a state, and what torch loads of it."""
        state = dict(state_dict)
        spectral = state.pop("spectral", None)
        check_saved(state, self.param_groups, [entry.name for entry in self.entries])
        spectra = self._spectra
        if spectral is None:
            spectra.forget()
        else:
            spectra = self._loaded_spectra(spectral)
        return spectra, state

    def __getstate__(self) -> dict[str, Any]:
        saved = self._saved_spectra()  # first: it may read parameters anew
        return super().__getstate__() | {key: self.__dict__[key] for key in OWN} | {"_saved": saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.get("_saved")
        super().__setstate__({key: value for key, value in state.items() if key != "_saved"})
        if saved is not None:
            self._spectra, self._cut, self._captured = Spectra(), None, []
            self.load_spectral_state_dict(saved)
