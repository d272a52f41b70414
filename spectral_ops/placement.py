"""Where a model's parameters and layers are, and whether they are still what they were at the last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from spectral_ops import backends
from spectral_ops.layers import Entry
from spectral_ops.ops.dtensor import is_dtensor, local_tensor
from spectral_ops.ops.snapshot import Addresses, Snapshot
from spectral_ops.rules import expected

Child: TypeAlias = tuple[nn.Module, str, nn.Module | None]  # (parent, name, layer)


class Placement:
    """How parameters lay when the groups were made."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.facts = [facts_of(p) for p in parameters]  # for the compiler, which traces no csrc
        self._trained = [p.requires_grad for p in parameters]
        self._sharded = any(is_dtensor(p) for p in parameters)
        self._sharding = self._sharding_of(parameters)
        self._looks = Snapshot(self._here(parameters))

    def _here(self, parameters: list[nn.Parameter]) -> Sequence[Tensor]:
        return [local_tensor(p) for p in parameters] if self._sharded else parameters

    def _sharding_of(self, parameters: list[nn.Parameter]) -> list[Any]:
        return [(p.device_mesh, p.placements) if is_dtensor(p) else None for p in parameters] if self._sharded else []  # type: ignore[attr-defined]

    def addresses(self, parameters: list[nn.Parameter]) -> Addresses | None:
        """Of parameters that lie as they did; None where anything differs."""
        if [p.requires_grad for p in parameters] != self._trained:
            return None
        if self._sharded and self._sharding_of(parameters) != self._sharding:
            return None
        return self._looks.addresses(self._here(parameters))


def parameters_of(entries: Sequence[Entry]) -> list[nn.Parameter]:
    """As they are now. One tied to another since would be penalised twice, its gradient written by two tasks; of one
    that was tied and is no more, as after load_state_dict(assign=True), a copy would go without a penalty."""
    for entry in entries:
        for module, attribute, name in entry.ties:
            assert entry.module is not None and module is not None
            if module._parameters.get(attribute) is not entry.module._parameters.get(entry.attribute):
                condition, got = f"parameter {name!r} to be tied to {entry.name!r}", "another one since"
                raise RuntimeError(expected(condition, got, "Tie them again, or build the regularizer again"))
    names: dict[int, str] = {}
    found = [entry.parameter for entry in entries]
    for entry, p in zip(entries, found, strict=True):
        first = names.setdefault(id(p), entry.name)
        if first != entry.name:
            condition, got = f"parameter {entry.name!r} apart from {first!r}", "one tied to it since"
            raise RuntimeError(expected(condition, got, "Build the regularizer again"))
    return found


def facts_of(p: nn.Parameter) -> tuple[Any, ...]:
    return type(p), p.dtype, p.device, p.requires_grad, p.shape


def fsdp_records(model: nn.Module | None) -> dict[tuple[nn.Module, str], Any]:
    """What FSDP knows of each parameter that it shards, by module and name; it has no public way to the sharded one.

    Without these a gathered weight would be read as a whole one, whose gradient FSDP shards: the same, but gathered.
    """
    out: dict[tuple[nn.Module, str], Any] = {}
    if model is None or not torch.distributed.is_available():
        return out
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        groups = getattr(state, "_fsdp_param_groups", None)  # of torch 2.13; before, one
        for group in groups if groups is not None else [getattr(state, "_fsdp_param_group", None)]:
            for record in getattr(group, "fsdp_params", ()):
                info = record._module_info
                modules, names = [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names]
                out |= {key: record for key in zip(modules, names, strict=True)}
    return out


def native_lookup(entries: Sequence[Entry], children: list[Child]) -> Any:
    """csrc's look-up of parameters and layers, one call a step: ~0.05 us each, where Python takes 0.3.

    None without the compiled module, and where parameters were given without their modules.
    """
    if not backends.has_native() or any(entry.module is None for entry in entries):
        return None
    owners = [(entry.module, entry.attribute) for entry in entries]
    ties = [(module, attribute, i) for i, entry in enumerate(entries) for module, attribute, _ in entry.ties]
    return backends.native().ModelLookup(owners, children, ties)


def children_of(model: nn.Module | None) -> list[Child]:
    modules = [] if model is None else list(model.modules())
    return [(module, name, child) for module in modules for name, child in module._modules.items()]
