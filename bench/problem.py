"""A model with gradients, a start for its vectors, and the truth of one step from there: what penalty cases share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bench import models, truth
from bench.baselines import VARIANTS, Normalized, UsualPenalty, Variant, usual_penalty
from bench.case import Contender, Settings, random_unit_vectors
from bench.device import counted_bytes
from bench.graph import Captured
from spectral_ops import SpectralRegularizer, backends

STRENGTH = 1e-3

# Largest relative error of R or of a layer's gradient against float64 of the same weights, after one step from a
# random v.
TOLERANCE = 1e-5
# Of ours with bfloat16 weights: everything is computed in float32, and only a gradient is rounded to bfloat16, once, to
# the nearest of 8 bits: an element moves by at most 2^-8 of it. Measured: 2.1e-3, in a bias (EPYC, 2026-11-25).
# Triton's interpreter cuts bits off instead of rounding, and can be off by twice that; a device rounds.
BFLOAT16_GRADIENT = 2**-8 + TOLERANCE
# Of the usual code with bfloat16 weights, which computes in bfloat16 throughout: W v, u, W'u, v, sigma and their
# product each round to 8 bits, and R, a small difference of large terms, is off by several times that. Measured: 2e-3
# to 1.9e-2 over models and forms, the small ones of quick runs included (EPYC, 2026-11-25); a wrong factor gives 0.5.
BFLOAT16_USUAL = 0.05

# A model of this size or more does not stay in the caches of the devices measured so far.
CACHE_BYTES = 32 << 20

STREAMS = "Weights and gradients are larger than the caches: every pass streams from memory."
IN_CACHE = "Weights and gradients fit the caches, and so do those of the floor."


class Problem:
    """A model of `bench.models`, its gradients allocated and zero, and unit vectors to start from.

    Args:
        name: the model; a quick run takes a small one of that kind.
        dtype: "float32" or "bfloat16", of weights and gradients.
        blocks: so many blocks of a ViT in place of all.
    """

    def __init__(self, name: str, settings: Settings, dtype: str = "float32", blocks: int | None = None):
        self.name, self.device, self.settings = name, settings.device, settings
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._shape = {"quick": settings.quick, "dtype": self.dtype, "blocks": blocks}
        self.model: nn.Module = models.build(name, device=settings.device.kind, **self._shape)
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

    @property
    def in_bfloat16(self) -> bool:
        return self.dtype == torch.bfloat16

    @property
    def usual_tolerance(self) -> float:
        return BFLOAT16_USUAL if self.in_bfloat16 else TOLERANCE

    @property
    def gradient_tolerance(self) -> float:
        return BFLOAT16_GRADIENT if self.in_bfloat16 else TOLERANCE

    def regularizer(self, *, biases: bool = True) -> SpectralRegularizer:
        """One of this model, which starts from this problem's vectors."""
        twin = models.build(self.name, device="meta", **self._shape)
        return regularizer_of(self.model, twin, biases=biases)

    def restart(self, reg: SpectralRegularizer) -> None:
        """Sets the regularizer's vectors to this problem's."""
        state = reg.state_dict()
        state["v"] = {name: x.view_as(state["v"][name]) for name, x in zip(state["v"], self.v, strict=True)}
        reg.load_state_dict(state)

    def truth_from(self, reg: SpectralRegularizer) -> truth.Step:
        """Of the step that the regularizer is about to take, from the vectors it has now."""
        v = [x.flatten() for x in reg.state_dict()["v"].values()]
        return truth.warm_step(self.weights, self.biases, v)

    def usual_codes(
        self, plain: Callable[..., Any], stacked: Callable[..., Any]
    ) -> tuple[dict[str, tuple[Variant, Callable[..., Any]]], dict[str, str]]:
        """Every variant of the usual code that is run on this model, and why the others are not."""
        codes, left_out = {}, {}
        for name, variant in VARIANTS.items():
            reason = self.settings.left_out(name, self.name, str(self.dtype).removeprefix("torch."))
            if reason:
                left_out[name] = reason
            else:
                codes[name] = variant, variant.code(plain, stacked)
        return codes, left_out

    def forward_only(
        self, codes: dict[str, tuple[Variant, Callable[..., Any]]], error: Callable[[Tensor, list[Tensor]], float]
    ) -> dict[str, Contender]:
        """Contenders of (v) -> (result, the next v), without gradients; error(result, the next v) against the truth."""
        return {name: self._forward_only(variant, code, error) for name, (variant, code) in codes.items()}

    def _forward_only(self, variant: Variant, code: Callable[..., Any], error: Callable[..., float]) -> Contender:
        v = [x.to(self.dtype, copy=True) for x in self.v]

        @torch.no_grad()
        def run() -> Tensor:
            found, new = code(v)
            if variant.graph:  # a graph finds its v where it was
                torch._foreach_copy_(v, new)
            else:
                v[:] = new
            return found

        return self._contender(variant, run, lambda: torch._foreach_copy_(v, self.v), lambda found: error(found, v))

    def usual(self, variant: Variant | None = None, code: Callable[..., Any] = usual_penalty) -> Contender:
        """The usual loss form; `code` may be its stacked or compiled version."""
        variant = variant or Variant()
        v = [x.to(self.dtype) for x in self.v]
        usual = UsualPenalty(self.weights, self.biases, v, strength=STRENGTH, penalty=code, in_place=variant.graph)

        def restart() -> None:
            usual.restart(self.v)
            self.zero_gradients()

        return self._contender(variant, usual.accumulate_grad_, restart, self.gradient_error_of)

    def _contender(
        self,
        variant: Variant,
        run: Callable[[], Tensor],
        restart: Callable[[], Any],
        error_of: Callable[[Tensor], float],
    ) -> Contender:
        """Checked by one call after `restart`; in a CUDA graph where the variant says so."""
        graph = Captured(run) if variant.graph else None
        called: Callable[[], Tensor] = graph or run
        contender = Contender(called, tolerance=self.usual_tolerance, optional=True)
        contender.compiles = variant.mode is not None

        def error() -> float:
            if graph is not None:
                graph.capture()
                contender.note = held(graph)
            restart()
            return error_of(called())

        contender.error = error
        return contender

    def parametrization(self) -> Contender:
        """torch's parametrization on a copy of the model, its gradients allocated too."""
        normalized = Normalized(copy.deepcopy(self.model))
        for w in normalized.originals:
            w.grad = torch.zeros_like(w)
        note = "W / sigma, and the backward of a given gradient: another problem, the same power iteration"
        error = functools.partial(self._normalized_error, normalized)
        return Contender(normalized.accumulate_grad_, error, self.usual_tolerance, note, optional=True)

    # ---- agreement ----

    def gradient_error(self, run: Callable[[], Any], true: truth.Step | None = None) -> float:
        """The largest error of the value that `run` returns and of what it adds, from zero, to any gradient."""
        self.zero_gradients()
        return self.gradient_error_of(run(), true)

    def gradient_error_of(self, value: Tensor, true: truth.Step | None = None) -> float:
        """The same of a call that is over; leaves the gradients zero."""
        true = true or self.truth
        errors = [truth.relative_error(value, STRENGTH * true.value)]
        # Where sigma is near the target a gradient is a small difference of large terms: relative to these.
        for w, dw, scale in zip(self.weights, true.dw, true.scale, strict=True):
            errors.append(truth.relative_error(_gradient(w), STRENGTH * dw, STRENGTH * scale))
        for b, db in zip(self.biases, true.db, strict=True):
            errors.append(truth.relative_error(_gradient(b), STRENGTH * db))
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


def regularizer_of(model: nn.Module, twin: nn.Module, **options: Any) -> SpectralRegularizer:
    """A regularizer of the model that starts from `random_unit_vectors`.

    Made on a twin of the model on the meta device, where nothing is computed: its own converged start, which no
    benchmark needs, would cost more than all that is measured of a large model. The twin then gets the parameters.
    """
    reg = SpectralRegularizer(twin, strength=STRENGTH, **options)
    matrices = [entry for entry in reg.entries if entry.layout is not None and entry.layout.is_matrix]
    names, device = [entry.name for entry in matrices], str(next(model.parameters()).device)
    v = random_unit_vectors([models.columns(entry.parameter) for entry in matrices], device)
    reg.load_state_dict(
        {
            "v": {name: x.view(1, -1) for name, x in zip(names, v, strict=True)},
            "exponent": {name: torch.zeros(1, dtype=torch.int32, device=device) for name in names},
            "sigma": {name: torch.ones(1, device=device) for name in names},
        }
    )
    for module, real in zip(twin.modules(), model.modules(), strict=True):
        for name, p in real.named_parameters(recurse=False):
            setattr(module, name, p)
    return reg


def backend_note(kind: str, op: str) -> str:
    """Which implementation of ours a row measures."""
    return f"backend {backends.choose(torch.device(kind), op)}"


def held(graph: Captured) -> str:
    """A note: replays allocate nothing, so that the column of peak memory says nothing of a graph."""
    return f"its graph holds {graph.held_bytes:,} bytes between calls"


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None  # zero_gradients has allocated it
    return p.grad
