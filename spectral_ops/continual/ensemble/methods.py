"""Methods on a stack of networks: which can, and how each is made to act on every network as on one alone.

Two kinds need nothing of their own. What treats every entry by itself acts on a stack as on one network. What acts at
task boundaries alone acts there on each network, whose parameters are views of the stack, with its own randomness.

Not here: wasserstein sorts a network's entries, spectral-norm changes its modules, redo and continual-backprop look at
its activations by hooks, in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spectral_ops import SpectralAdamW, SpectralRegularizer
from spectral_ops.continual.ensemble.refused import REMEDY, CannotShare
from spectral_ops.continual.ensemble.rules import stacked_rules
from spectral_ops.continual.ensemble.stack import Stack
from spectral_ops.continual.methods import METHODS, Context, Method, find_method
from spectral_ops.continual.methods.fire import Fire
from spectral_ops.continual.methods.l2 import L2
from spectral_ops.continual.methods.l2_decoupled import L2Decoupled
from spectral_ops.continual.methods.l2_init import L2Init
from spectral_ops.continual.methods.no_method import NoMethod
from spectral_ops.continual.methods.optimizer_reset import OptimizerReset
from spectral_ops.continual.methods.parseval import Parseval
from spectral_ops.continual.methods.reset import Reset
from spectral_ops.continual.methods.shrink_and_perturb import ShrinkAndPerturb
from spectral_ops.continual.methods.spectral import Spectral
from spectral_ops.continual.methods.weight_clipping import WeightClipping

Options = dict[str, Any]
Maker = Callable[[Stack, Context, Sequence[Method], Options], Method]


def check_method(name: str) -> None:
    """To be asked first: what a method has made of the modules of a network may be no stack's.

    Raises:
        CannotShare: a method that cannot act on a stack.
    """
    if find_method(name) not in MAKERS:
        known = ", ".join(known for known, kind in METHODS.items() if kind in MAKERS)
        raise CannotShare(f"run_together: expected one of the methods {known}, got {name!r}. {REMEDY}")


def stack_method(stack: Stack, context: Context, methods: Sequence[Method], options: Options) -> Method:
    """The method on the stack: its `penalty`, `after_backward` and `after_step` are of all networks.

    Args:
        context: of the stack; `initialize` gives stacked states.
        methods: of the networks, with whose `state_dict` the stack's has to be filled.

    Raises:
        CannotShare: an option with which it cannot act on a stack.
    """
    return MAKERS[type(methods[0])](stack, context, methods, options)


def _same(stack: Stack, context: Context, methods: Sequence[Method], options: Options) -> Method:
    return type(methods[0])(context, **options)


def _nothing(stack: Stack, context: Context, methods: Sequence[Method], options: Options) -> Method:
    return NoMethod(context)


def _at_boundaries(stack: Stack, context: Context, methods: Sequence[Method], options: Options) -> Method:
    if options.get("every") == "step":
        raise CannotShare(f"run_together: expected shrink-and-perturb with every task, got every step. {REMEDY}")
    return NoMethod(context)


class StackedParseval(Parseval):
    """Each weight is as many matrices as there are networks."""

    def __init__(self, stack: Stack, context: Context, methods: Sequence[Method], options: Options):
        super().__init__(context, **options)
        self._matrices = [matrix._replace(parts=len(stack) * matrix.parts) for matrix in self._matrices]


class StackedSpectral(Spectral):
    """One regularizer of all networks."""

    def __init__(self, stack: Stack, context: Context, methods: Sequence[Method], options: Options):
        Method.__init__(self, context)
        first = methods[0]
        assert isinstance(first, Spectral)
        single = first.regularizer
        assert single is not None
        rules, targets = stacked_rules(single.entries, len(stack))
        self.regularizer = SpectralRegularizer(
            context.model, strength=single.strength, exponent=single.exponent, target=targets, rules=rules
        )


def _spectral(stack: Stack, context: Context, methods: Sequence[Method], options: Options) -> Method:
    if isinstance(context.optimizer, SpectralAdamW):
        return NoMethod(context)  # its step has the penalty
    return StackedSpectral(stack, context, methods, options)


MAKERS: dict[type[Method], Maker] = {
    NoMethod: _same,
    L2: _same,
    L2Decoupled: _same,
    L2Init: _same,  # from the networks' own initial parameters, stacked
    WeightClipping: _same,  # its bound is of the fan-in, the size of a row, which stacking leaves
    Parseval: StackedParseval,
    Spectral: _spectral,
    OptimizerReset: _nothing,
    Reset: _nothing,
    Fire: _nothing,
    ShrinkAndPerturb: _at_boundaries,
}
