"""The optimizer of a stack, and what it remembers: put together from the networks' own optimizers, and given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_ops import SpectralAdamW
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.ensemble.flat import Flat
from spectral_ops.continual.ensemble.rules import stacked_rules
from spectral_ops.continual.ensemble.stack import Stack
from spectral_ops.continual.ensemble.trees import cat, chunk
from spectral_ops.continual.trainer import make_optimizer
from spectral_ops.optim_parts import checksum

State = dict[str, Any]  # of one tensor: moments, step counter

CHECKSUM = "checksum"  # in the state of SpectralAdamW, of the weight that the vectors are of


def stack_optimizer(config: RunConfig, stack: Stack, single: Sequence[Optimizer]) -> Optimizer:
    """Of all networks as of one; `single`: their own, which it takes its options from where the networks decide them.

    Raises:
        CannotShare: spectral-adamw of a layer that cannot be stacked.
    """
    first = single[0]
    if not isinstance(first, SpectralAdamW):
        return make_optimizer(config, stack.model, None if stack.flat is None else [stack.flat])
    group = first.param_groups[0]
    rules, targets = stacked_rules(first.entries, len(stack))
    return SpectralAdamW(
        stack.model.parameters(),
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        model=stack.model,
        strength=group["strength"],
        exponent=group["exponent"],
        target=targets,
        rules=rules,
    )


def gather(stack: Stack, optimizer: Optimizer, single: Sequence[Optimizer]) -> None:
    """The state of the networks' own optimizers, into that of the stack's."""
    stacked = {}
    for name, _ in stack.model.named_parameters():
        states = [o.state.get(n.get_parameter(name)) for o, n in zip(single, stack.networks, strict=True)]
        if states[0]:
            stacked[name] = cat([state or {} for state in states])
    optimizer.state.clear()
    flat = _flat(stack, optimizer)
    if flat is None:
        optimizer.state.update({stack.model.get_parameter(name): state for name, state in stacked.items()})
    elif stacked:
        optimizer.state[flat] = _join(stack.layout, stacked)
    if isinstance(optimizer, SpectralAdamW):
        optimizer.load_spectral_state_dict(_cat_spectra([o.spectral_state_dict() for o in _folded(single)]))


def scatter(stack: Stack, optimizer: Optimizer, single: Sequence[Optimizer]) -> None:
    """The state of the stack's optimizer, into those of the networks' own; moments as views."""
    flat = _flat(stack, optimizer)
    joined = {} if flat is None else _part(stack.layout, optimizer.state.get(flat, {}))
    for name, stacked in stack.model.named_parameters():
        parts = chunk(optimizer.state.get(stacked, {}) if flat is None else joined.get(name, {}), len(stack))
        for own, network, state in zip(single, stack.networks, parts, strict=True):
            own.state.pop(network.get_parameter(name), None)
            if state:
                own.state[network.get_parameter(name)] = state
    if isinstance(optimizer, SpectralAdamW):
        spectra = _chunk_spectra(optimizer.spectral_state_dict(), stack)
        for own, spectrum in zip(_folded(single), spectra, strict=True):
            own.load_spectral_state_dict(spectrum)


def _flat(stack: Stack, optimizer: Optimizer) -> nn.Parameter | None:
    """What the optimizer steps in place of the stacked parameters."""
    return None if isinstance(optimizer, SpectralAdamW) else stack.flat


def _join(layout: Flat, states: Mapping[str, State]) -> State:
    """States of all tensors as the one of their memory; what is no tensor of entries counts alike in all."""
    joined = dict(next(iter(states.values())))
    for key, value in joined.items():
        if isinstance(value, Tensor) and value.ndim:
            joined[key] = memory = layout.zeros()
            for name, place in layout.views(memory).items():
                place.copy_(states[name][key])
    return joined


def _part(layout: Flat, state: State) -> dict[str, State]:
    """What `_join` was given, as views."""
    parts: dict[str, State] = {name: dict(state) for name in layout.names}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            for name, view in layout.views(value).items():
                parts[name][key] = view
    return parts


def _folded(single: Sequence[Optimizer]) -> list[SpectralAdamW]:
    return [o for o in single if isinstance(o, SpectralAdamW)]


def _cat_spectra(spectra: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = [spectrum[CHECKSUM] for spectrum in spectra]
    together = cat([{key: spectrum[key] for key in spectrum if key != CHECKSUM} for spectrum in spectra])
    return together | {CHECKSUM: {name: torch.stack([s[name] for s in sums]).sum() for name in sums[0]}}


def _chunk_spectra(together: dict[str, Any], stack: Stack) -> list[dict[str, Any]]:
    names = together[CHECKSUM]
    parts = chunk({key: value for key, value in together.items() if key != CHECKSUM}, len(stack))
    return [
        part | {CHECKSUM: {name: checksum(network.get_parameter(name)) for name in names}}
        for part, network in zip(parts, stack.networks, strict=True)
    ]
