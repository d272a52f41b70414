"""Making single units anew: their incoming weights as at an initialisation, their outgoing weights zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectral_ops.continual.methods.entry_steps import EntrySteps
from spectral_ops.continual.methods.method import Context
from spectral_ops.continual.methods.optimizer_state import moments
from spectral_ops.continual.units import Units


class _Entry(NamedTuple):
    """A tensor of a layer with one row for every unit, and its name in the model's state."""

    module: nn.Module
    attribute: str
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.attribute)


class UnitReset:
    """Resets units of a model.

    Incoming weight, bias, and scale, shift and running statistics of the layer's norm come from a freshly initialised
    network, so from whatever distribution the model draws them; outgoing weights become 0. The optimizer's moments of
    all these entries become 0. Its step counters are those of whole parameters and stay (see `moments`): without
    own_steps the next steps of a reset entry are not corrected for its empty moments, and Adam's first is
    (1 - beta_1) / sqrt(1 - beta_2) = 3.2 learning rates long. With it they are those of a counter of its own, which
    begins at the reset (`EntrySteps`), and `after_step` is to be called after every step of the optimizer.

    A row of a fresh network is used once. The networks are initialize(1), initialize(2), ..., the next one as soon as
    a unit is to be reset that was reset from this one before: results depend on the seed and on what is reset alone.
    """

    def __init__(self, context: Context, *, own_steps: bool):
        self._steps = EntrySteps(context.optimizer, context.model) if own_steps else None
        self._context, self._units = context, context.units
        names = {module: name for name, module in context.model.named_modules()}
        self._entries = [_entries(units, names) for units in context.units]
        self._draw = 0  # the number of the fresh network; 0: none yet
        self._used = [torch.ones(units.count, dtype=torch.bool) for units in context.units]
        self._fresh: dict[str, Tensor] = {}

    def after_step(self) -> None:
        if self._steps is not None:
            self._steps.correct()

    @torch.no_grad()
    def reset(self, chosen: list[Tensor]) -> None:
        """Reset the units with these indices: int64 on the CPU, for every layer."""
        if not any(len(index) for index in chosen):
            return
        fresh = self._rows(chosen)
        for entries, index in zip(self._entries, chosen, strict=True):
            for entry in entries if len(index) else ():
                tensor, rows = entry.tensor, index.to(entry.tensor.device)
                tensor[rows] = fresh[entry.name][rows]
                for kept in self._kept(tensor):
                    kept[rows] = 0
        # After all incoming weights: what two reset units have between them is 0, as in ReDo's source.
        for units, index in zip(self._units, chosen, strict=True):
            if len(index):
                weight: Any = units.outgoing.weight
                for tensor in (weight, *self._kept(weight)):
                    units.read_by(tensor)[:, :, index.to(tensor.device)] = 0

    def state_dict(self) -> dict[str, Any]:
        own = {} if self._steps is None else {"steps": self._steps.state_dict()}
        return {"draw": self._draw, "used": self._used, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._draw, self._used, self._fresh = state["draw"], [used.cpu().clone() for used in state["used"]], {}

        if self._steps is not None:
            self._steps.load_state_dict(state["steps"])

    def _kept(self, parameter: Tensor) -> list[Tensor]:
        """What is kept for every entry of a parameter, and becomes 0 where that is reset."""
        shares = [] if self._steps is None else self._steps.shares(parameter)
        return [*moments(self._context.optimizer, parameter), *shares]

    def _rows(self, chosen: list[Tensor]) -> dict[str, Tensor]:
        """Tensors whose chosen rows were not used before."""
        if any(used[index].any() for used, index in zip(self._used, chosen, strict=True)):
            self._draw, self._fresh = self._draw + 1, {}
            for used in self._used:
                used.zero_()
        for used, index in zip(self._used, chosen, strict=True):
            used[index] = True
        if not self._fresh:  # a new one, or a state was loaded
            state = self._context.initialize(self._draw)
            self._fresh = {entry.name: state[entry.name] for entries in self._entries for entry in entries}
        return self._fresh


def _entries(units: Units, names: Mapping[nn.Module, str]) -> list[_Entry]:
    found = []
    for module in (units.incoming, units.norm):
        if module is not None:
            tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            per_unit = [name for name, x in tensors.items() if x.ndim and len(x) == units.count]
            found += [_Entry(module, attribute, f"{names[module]}.{attribute}") for attribute in per_unit]
    return found
