"""The conv layers of a network as linear maps, a start for their vectors, and everybody who takes a step from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench import conv_truth, models, truth
from bench.case import Contender, Settings, random_unit_vectors
from bench.conv_baselines import LayerByLayer
from bench.graph import Captured
from bench.problem import STRENGTH, TOLERANCE, backend_note, held
from spectral_ops import backends
from spectral_ops.ops.accumulate_grad import accumulate_grad
from spectral_ops.ops.conv_operator import conv_operator
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout, pack

# torch's convolutions take TF32 on CUDA unless told otherwise, and so do the baselines, as users have them: inputs of
# 11 bits, each off by 2^-11 at most, through two convolutions. Estimated, no device has run it.
TF32 = 5e-3
GEMM_SIDE, QUICK_GEMM_SIDE = 2048, 128


class ConvProblem:
    """Layers of `models.CONV_NETS`, float32, their gradients allocated and zero, and unit vectors to start from.

    Args:
        places: of the layers to take; all of them unless given.
        circular: with circular padding in place of zeros.
    """

    def __init__(
        self, name: str, settings: Settings, *, places: Sequence[int] | None = None, circular: bool = False
    ):
        self.device, self.settings = settings.device, settings
        kind, convs = settings.device.kind, models.conv_net(name, quick=settings.quick)
        weights = models.matrices(models.build(name, quick=settings.quick, device=kind))
        taken = range(len(convs)) if places is None else places
        self.convs, self.weights = [convs[i] for i in taken], [weights[i] for i in taken]
        self.layouts = [
            Layout(
                Kind.MATRIX,
                operator=conv_operator(
                    "ConvProblem",
                    w.shape,
                    c.size,
                    stride=c.stride,
                    padding=c.padding,
                    padding_mode="circular" if circular else "zeros",
                ),
            )
            for w, c in zip(self.weights, self.convs, strict=True)
        ]
        flat = random_unit_vectors([c.inputs * c.size**2 for c in self.convs], kind)
        self.v = [x.view(1, c.inputs, c.size, c.size) for x, c in zip(flat, self.convs, strict=True)]
        self.zero_gradients()

    def zero_gradients(self) -> None:
        for w in self.weights:
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad.zero_()

    @property
    def gradients(self) -> list[Tensor]:
        return [w.grad for w in self.weights if w.grad is not None]

    @property
    def macs(self) -> int:
        """Of one application of every layer."""
        return sum(conv.macs for conv in self.convs)

    @property
    def flat_v(self) -> Tensor:
        """A copy."""
        return torch.cat([x.flatten() for x in self.v])

    @cached_property
    def truth(self) -> conv_truth.ConvStep:
        return conv_truth.warm_step(self.weights, self.convs, self.v)

    # ---- ours ----

    def power_iteration(self, *, graph: bool = False) -> Contender:
        """The registered op: one warm step, the value alone."""
        v, exponents = self.flat_v, self._exponents()
        weights, packed = [w.detach() for w in self.weights], pack(self.layouts)

        def run() -> Tensor:
            nonlocal v, exponents
            sigma, _, v_new, exponents_new = torch.ops.spectral_ops.power_iteration(weights, v, exponents, packed, 1)
            if graph:  # which reads the same memory at every replay
                v.copy_(v_new)
                exponents.copy_(exponents_new)
            else:
                v, exponents = v_new, exponents_new
            return sigma

        def restart() -> None:
            v.copy_(self.flat_v)

        def error_of(sigma: Tensor) -> float:
            sizes = [x.numel() for x in self.v]
            return self.step_error(sigma, [x.view_as(y) for x, y in zip(v.split(sizes), self.v, strict=True)])

        return self._contender(run, restart, error_of, graph, self._backend("power_iteration"))

    def accumulate_grad(self, *, graph: bool = False) -> Contender:
        """What `reg.accumulate_grad_()` calls for its conv operators: one warm step, the gradient added into .grad."""
        v, exponents = self.flat_v, self._exponents()
        sigma = torch.ones(len(self.weights), device=v.device)
        ones = [1.0] * len(self.weights)
        table = LayerTable(self.layouts, ones, ones)
        gradients = self.gradients

        def run() -> Tensor:
            return accumulate_grad(gradients, self.weights, v, exponents, sigma, table, 2.0, STRENGTH)

        def restart() -> None:
            v.copy_(self.flat_v)
            self.zero_gradients()

        return self._contender(run, restart, self.gradient_error, graph, self._backend("accumulate_grad_"))

    def _exponents(self) -> Tensor:
        return torch.zeros(len(self.weights), dtype=torch.int32, device=self.device.kind)

    def _backend(self, op: str) -> str:
        return backend_note(self.device.kind, backends.op_name(op, True))

    # ---- the baseline ----

    def layer_by_layer(self, *, gradient: bool, graph: bool = False) -> Contender:
        usual = LayerByLayer(self.weights, self.convs, self.v, strength=STRENGTH, in_place=graph)
        step = usual.accumulate_grad_ if gradient else usual.power_iteration
        on_cuda = self.device.kind == "cuda"

        def run() -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):  # its fastest choice
                return step()

        def restart() -> None:
            usual.restart(self.v)
            self.zero_gradients()

        def error_of(found: Tensor) -> float:
            return self.gradient_error(found) if gradient else self.step_error(found, usual.v)

        note = "conv2d and conv_transpose2d" + ", then conv2d_weight" * gradient + ", cudnn.benchmark, TF32" * on_cuda
        contender = self._contender(run if on_cuda else step, restart, error_of, graph, note)
        contender.tolerance, contender.optional = TF32 if on_cuda else TOLERANCE, True
        return contender

    # ---- arithmetic ----

    def gemm(self, passes: int) -> Contender:
        """One matrix product of as many multiplications as so many applications of every layer."""
        side = QUICK_GEMM_SIDE if self.settings.quick else GEMM_SIDE
        depth = max(1, round(passes * self.macs / side**2))
        a, b = (torch.randn(size, device=self.device.kind) for size in ((side, depth), (depth, side)))
        out = torch.empty(side, side, device=self.device.kind)
        note = f"torch.mm of ({side}, {depth}) and ({depth}, {side}), float32: {passes * self.macs * 1e-9:.3g} GMAC"
        return Contender(lambda: torch.mm(a, b, out=out), note=note)

    # ---- agreement ----

    def step_error(self, sigma: Tensor, v: list[Tensor]) -> float:
        """Of every sigma and every next v."""
        return truth.largest_error([*sigma, *v], [*self.truth.sigma, *self.truth.v])

    def gradient_error(self, value: Tensor) -> float:
        """Of the value and of what was added, from zero, to any gradient; leaves the gradients zero."""
        true = self.truth
        errors = [truth.relative_error(value, STRENGTH * true.value)]
        for gradient, dw, scale in zip(self.gradients, true.dw, true.scale, strict=True):
            errors.append(truth.relative_error(gradient, STRENGTH * dw, STRENGTH * scale))
        self.zero_gradients()
        return truth.largest(errors)

    def _contender(
        self,
        run: Callable[[], Tensor],
        restart: Callable[[], Any],
        error_of: Callable[[Tensor], float],
        graph: bool,
        note: str,
    ) -> Contender:
        """Checked by one call after `restart`; in a CUDA graph where that is asked for."""
        captured = Captured(run) if graph else None
        called: Callable[[], Tensor] = captured or run
        contender = Contender(called, tolerance=TOLERANCE, note=note, optional=graph)

        def error() -> float:
            if captured is not None:
                captured.capture()
                contender.note = f"{note}, {held(captured)}"
            restart()
            return error_of(called())

        contender.error = error
        return contender
