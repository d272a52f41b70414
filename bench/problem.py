"""A model with gradients, a start for its vectors, and the truth of one step from there: what penalty cases share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench import models, truth
from bench.baselines import Normalized, UsualPenalty, usual_penalty
from bench.case import Contender, Settings, random_unit_vectors
from bench.device import counted_bytes
from spectral_ops import SpectralRegularizer

STRENGTH = 1e-3

# Largest relative error of R or of a layer's gradient against float64, after one step from a random v.
TOLERANCE = 1e-5

# A model of this size or more does not stay in the caches of the devices measured so far.
CACHE_BYTES = 32 << 20

STREAMS = "Weights and gradients are larger than the caches: every pass streams from memory."
IN_CACHE = "Weights and gradients fit the caches, and so do those of the floor."


class Problem:
    """A model of `bench.models`, its gradients allocated and zero, and unit vectors to start from.

    Args:
        name: the model; a quick run takes a small one of that kind.
    """

    def __init__(self, name: str, settings: Settings):
        self.name, self.device = name, settings.device
        self.model: nn.Module = models.build(name, quick=settings.quick, device=settings.device.kind)
        self.weights, self.biases = models.matrices(self.model), models.biases(self.model)
        self.v = random_unit_vectors([models.columns(w) for w in self.weights], settings.device.kind)
        self.zero_gradients()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def gradients(self) -> list[Tensor]:
        return [_gradient(p) for p in self.parameters]

    @property
    def streams(self) -> bool:
        """Whether the model is too large for the caches."""
        return counted_bytes(self.parameters, ()) > CACHE_BYTES

    def zero_gradients(self) -> None:
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()

    @cached_property
    def truth(self) -> truth.Step:
        return truth.warm_step(self.weights, self.biases, self.v)

    # ---- contenders ----

    def regularizer(self, *, biases: bool = True) -> SpectralRegularizer:
        return SpectralRegularizer(self.model, strength=STRENGTH, biases=biases)

    def restart(self, reg: SpectralRegularizer) -> None:
        """Sets the regularizer's vectors to this problem's."""
        state = reg.state_dict()
        state["v"] = {name: x.view_as(state["v"][name]) for name, x in zip(state["v"], self.v, strict=True)}
        reg.load_state_dict(state)

    def usual(self, code: Callable[..., tuple[Tensor, list[Tensor]]] = usual_penalty) -> Contender:
        """The usual loss form; `code` may be its compiled version."""
        usual = UsualPenalty(self.weights, self.biases, self.v, strength=STRENGTH, penalty=code)

        def error() -> float:
            usual.restart(self.v)
            return self.gradient_error(usual.accumulate_grad_)

        return Contender(usual.accumulate_grad_, error, TOLERANCE)

    def parametrization(self) -> Contender:
        """torch's parametrization on a copy of the model, its gradients allocated too."""
        normalized = Normalized(copy.deepcopy(self.model))
        for w in normalized.originals:
            w.grad = torch.zeros_like(w)
        note = "W / sigma, and the backward of a given gradient: another problem, the same power iteration"
        return Contender(normalized.accumulate_grad_, lambda: self._normalized_error(normalized), TOLERANCE, note)

    # ---- agreement ----

    def gradient_error(self, run: Callable[[], Any]) -> float:
        """The largest error of the value that `run` returns and of what it adds, from zero, to any gradient."""
        self.zero_gradients()
        value = run()
        errors = [truth.relative_error(value, STRENGTH * self.truth.value)]
        # Where sigma is near the target a gradient is a small difference of large terms: relative to these.
        for w, true, scale in zip(self.weights, self.truth.dw, self.truth.scale, strict=True):
            errors.append(truth.relative_error(_gradient(w), STRENGTH * true, STRENGTH * scale))
        for b, true in zip(self.biases, self.truth.db, strict=True):
            errors.append(truth.relative_error(_gradient(b), STRENGTH * true))
        self.zero_gradients()
        return truth.largest(errors)

    def _normalized_error(self, normalized: Normalized) -> float:
        """Of W / sigma and of its gradient for an upstream G: G / sigma - <G, W> / sigma^2 u v'."""
        normalized.restart(self.v)
        for w in normalized.originals:
            w.grad = torch.zeros_like(w)
        weights = normalized.accumulate_grad_()
        true, gradients = [], []
        for w, g, s, u, v in zip(
            self.weights, normalized.upstream, self.truth.sigma, self.truth.u, self.truth.v, strict=True
        ):
            matrix, upstream = w.detach().double(), g.double()
            true.append(matrix / s)
            gradients.append(upstream / s - (upstream * matrix).sum() / s**2 * torch.outer(u, v).view_as(matrix))
        return truth.largest_error([*weights, *map(_gradient, normalized.originals)], [*true, *gradients])


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None  # zero_gradients has allocated it
    return p.grad
