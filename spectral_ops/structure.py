"""Whether a model still has the layers that its regularizer was built for: a new one would go without a penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spectral_ops.layers import SWITCHES, Entry
from spectral_ops.placement import Child, children_of
from spectral_ops.recognition import recognise
from spectral_ops.rules import Found, Pattern, Patterns, Rule, as_several, collect, expected, matches

REMEDY = "Build the regularizer again"


@dataclass(frozen=True)
class Choice:
    """What the user asked to treat, for parameters that come later."""

    include: Patterns | None
    exclude: Patterns | None
    rules: Mapping[Pattern, Rule | str] | None
    switches: Mapping[str, bool]  # weights, biases, norms

    def treats(self, found: Found) -> bool:
        if self.exclude is not None and any(matches(p, found) for p in as_several(self.exclude)):
            return False
        if self.include is not None and not any(matches(p, found) for p in as_several(self.include)):
            return False
        for pattern, rule in (self.rules or {}).items():
            if matches(pattern, found):
                return (rule if isinstance(rule, str) else rule.kind) != "skip"
        layout, _ = recognise(found)
        return layout is not None and self.switches[SWITCHES[layout.kind]]

    def __getstate__(self) -> dict[str, Any]:
        """Most callables cannot be pickled: without them nobody knows what comes later, and nothing is refused."""
        include = None if self.include is None else list(as_several(self.include))
        exclude, rules = list(as_several(self.exclude)), dict(self.rules or {})
        if not all(isinstance(pattern, str) for pattern in [*(include or ()), *exclude, *rules]):
            include, exclude, rules = [], [], {}
        return {"include": include, "exclude": exclude, "rules": rules, "switches": self.switches}

    def __deepcopy__(self, memo: dict[int, Any]) -> Choice:
        return self


class Structure:
    """The layers of a model and the names of their parameters, as they were when last looked at."""

    children: list[Child]

    def __init__(self, root: nn.Module | None, choice: Choice):
        self._root, self._choice = root, choice
        self.waiting: list[tuple[nn.Module, str]] = []  # came later, frozen: an error once they are trained
        self._look()

    def _look(self) -> None:
        self.children = children_of(self._root)
        modules = [] if self._root is None else list(self._root.modules())
        self._modules = [(module, len(module._modules), _names(module)) for module in modules]

    def _same(self) -> bool:
        return all(parent._modules.get(name) is child for parent, name, child in self.children) and all(
            len(module._modules) == children and _names(module) == names for module, children, names in self._modules
        )

    def woken(self) -> bool:
        """Whether a parameter that came later, frozen, is trained now."""
        return any(_trained(module._parameters.get(name)) for module, name in self.waiting)

    def check(self, entries: Sequence[Entry]) -> None:
        """RuntimeError for a layer that was replaced, that came later or that has the name of another one.

        Wrapped layers are followed, under the names that they had, and layers that would not be treated may change.
        """
        if self._root is None or (self._same() and not self.woken()):
            return
        treated = [entry for entry in entries if entry.layout is not None]
        held = set(self._root.modules())
        for entry in treated:
            if entry.module not in held:
                got = "one that was replaced or removed since"
                raise RuntimeError(expected(f"the layer of {entry.name!r} to be in the model", got, REMEDY))
        everything = collect(self._root)
        self._check_names(treated, everything)
        known = {(id(entry.module), entry.attribute) for entry in entries}
        known |= {(id(owner.module), owner.attribute) for entry in entries for owner in entry.ties}
        later = [found for found in everything if known.isdisjoint((id(o.module), o.attribute) for o in found.owners)]
        later = [found for found in later if self._choice.treats(found)]
        for found in later:
            if found.parameter.requires_grad:
                condition = "every parameter to be there when the regularizer is built"
                got = f"{found.name!r}, which came later and has no penalty"
                raise RuntimeError(expected(condition, got, REMEDY))
        owners = [found.owners[0] for found in later]
        self.waiting = [(owner.module, owner.attribute) for owner in owners if owner.module is not None]
        self._look()

    def _check_names(self, treated: Sequence[Entry], everything: Sequence[Found]) -> None:
        """Layers that changed places: each would go by the name, and the target, of the other."""
        by_name = {owner.name: found for found in everything for owner in found.owners}
        names = {id(found.parameter): found.name for found in everything}
        for entry in treated:
            there = by_name.get(entry.name)
            own = None if entry.module is None else entry.module._parameters.get(entry.attribute)
            if there is not None and own is not None and there.parameter is not own:
                got = f"it at {names[id(own)]!r} and another in its place"
                raise RuntimeError(expected(f"parameter {entry.name!r} to stay where it was", got, REMEDY))


def _names(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def _trained(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad
