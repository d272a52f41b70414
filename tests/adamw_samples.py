"""An optimizer step of the op on a few parameters, and the same in float64 by code of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from helpers import F32, F64, gaussian, step_in_float64
from layout_samples import SAMPLES, Sample, vector_penalty_in_float64
from torch import Tensor

from spectral_ops.ops.adamw import adamw_step
from spectral_ops.ops.adamw_state import Hyper, Options, Spectrum, Tensors, like
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout, vector_dtype

HYPER = Hyper(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1, strength=0.03)
TARGET, SCALE, EXPONENT, STEP = 0.4, 1.7, 1.5, 6
OPTIONS = Options(exponent=EXPONENT)
PLAIN = Layout(Kind.PLAIN)


def numbers(name: str, w: Tensor) -> Tensor:
    """Of the shape of w, which may have no dimensions."""
    return gaussian(name, *w.shape) if w.ndim else gaussian(name, 1).view(())


def sample_of(name: str) -> Sample:
    return next(sample for sample in SAMPLES if sample.name == name)


@dataclass
class Problem:
    """Parameters as samples have them, with random moments, at step STEP."""

    samples: Sequence[Sample]
    dtype: torch.dtype = F32
    gradient_dtype: torch.dtype | None = None
    options: Options = OPTIONS
    hyper: Hyper = HYPER
    masters: bool = False
    place: Callable[[Tensor], Tensor] = torch.clone  # of gradients
    tensors: Tensors = field(init=False)
    spectrum: Spectrum = field(init=False)
    table: LayerTable = field(init=False)

    def __post_init__(self) -> None:
        exact = vector_dtype(self.dtype)

        def state(w: Tensor, name: str, positive: bool = False) -> Tensor:
            x = 0.1 * numbers(name, w).to(exact)
            # Away from zero: a quotient of two roundings would say nothing.
            return like(w, exact).fill_(0).copy_(x.square() + 1e-3 if positive else x)

        named = [(s.name, s.tensor(self.dtype)) for s in self.samples]
        weights = [w for _, w in named]
        self.tensors = Tensors(
            weights,
            [self.place((0.2 * numbers(n + "g", w)).to(self.gradient_dtype or self.dtype)) for n, w in named],
            [state(w, n + "m") for n, w in named],
            [state(w, n + "s", positive=True) for n, w in named],
            [torch.tensor(float(STEP - 1)) for _ in named],
            [state(w, n + "top", positive=True) for n, w in named] if self.options.amsgrad else (),
            # A little off the weights, as masters are.
            [state(w, n).mul_(1e-3).add_(w) for n, w in named] if self.masters else (),
        )
        reads = [
            step_in_float64(w, v) if w.numel() else (torch.zeros((), dtype=F64), torch.zeros(len(w), dtype=F64), v)
            for w, v in self.matrices_and_starts()
        ]
        none = torch.zeros(0, dtype=F64)
        v, u = torch.cat([none] + [v for _, _, v in reads]), torch.cat([none] + [u for _, u, _ in reads])
        sigma = torch.stack([sigma for sigma, _, _ in reads]) if reads else none
        exponents = torch.zeros(len(reads), dtype=torch.int32)
        self.spectrum = Spectrum(v.to(exact), u.to(exact), exponents, sigma.to(exact))
        layouts = [s.layout for s in self.samples]
        self.table = LayerTable(
            layouts, [TARGET] * len(layouts), [SCALE] * len(layouts), [s.name for s in self.samples]
        )

    def matrices_and_starts(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (matrix.double(), v.double())
            for s, w in zip(self.samples, self.tensors.weights, strict=True)
            if s.layout.is_matrix
            for matrix, v in zip(s.matrices(w.detach()), s.vectors(self.dtype), strict=True)
        ]

    def step(self, grad_scale: float | Tensor | None = None, found_inf: Tensor | None = None) -> Tensor:
        groups = [0] * len(self.samples)
        arguments = self.tensors, self.spectrum, self.table, groups, [self.hyper], self.options
        return adamw_step(*arguments, grad_scale, found_inf)

    def all_tensors(self) -> list[Tensor]:
        """Everything that a step may change."""
        lists = [t for t in self.tensors._replace(gradients=()) if t]
        return [x for tensors in lists for x in tensors if x is not None] + list(self.spectrum)

    def penalty_gradients(self) -> list[Tensor]:
        """strength * scale * dR/dW in float64, of the spectrum as it is."""
        out = []
        v, u, sigma = (x.double() for x in (self.spectrum.v, self.spectrum.u, self.spectrum.sigma))
        at_v = at_u = at = 0
        for s, w in zip(self.samples, self.tensors.weights, strict=True):
            w64 = w.detach().double().clone().requires_grad_()
            total = (0.0 * w64).sum()
            if s.layout.is_matrix:
                for matrix in s.matrices(w64):
                    m, n = matrix.shape
                    x = sigma[at].item()
                    slope = 2 * EXPONENT * x ** (EXPONENT - 1) * (x**EXPONENT - TARGET**EXPONENT) if x else 0.0
                    total = total + slope * (u[at_u : at_u + m] @ matrix @ v[at_v : at_v + n])
                    at, at_u, at_v = at + 1, at_u + m, at_v + n
            elif s.layout.kind != Kind.PLAIN:
                total = total + vector_penalty_in_float64(w64, s.layout.kind, s.layout.parts, EXPONENT, TARGET)
            (gradient,) = torch.autograd.grad(total, w64)
            out.append(float(self.hyper.strength) * SCALE * gradient)
        return out

    def step_in_float64(self, grad_scale: float = 1.0) -> list[dict[str, Tensor]]:
        """What every parameter's weight (before it is rounded) and moments become."""
        h, o, out = self.hyper, self.options, []
        for i, penalty in enumerate(self.penalty_gradients()):
            state = {key: x[i] for key, x in self.tensors._asdict().items() if key != "steps" and x}
            w, g, m, s = (
                torch.zeros_like(penalty) if x is None else x.detach().double()
                for x in (state["weights"], state["gradients"], state["exp_avgs"], state["exp_avg_sqs"])
            )
            w = state["masters"].double() if state.get("masters") is not None else w
            g = g / grad_scale * (-1 if o.maximize else 1) + (0 if o.decoupled else penalty)
            w = w * (1 - h.lr * h.weight_decay) - (h.lr * penalty if o.decoupled else 0)
            m = h.beta1 * m + (1 - h.beta1) * g
            s = h.beta2 * s + (1 - h.beta2) * g**2
            top = torch.maximum(state["max_exp_avg_sqs"].double(), s) if o.amsgrad else s
            denominator = (top / (1 - h.beta2**STEP)).sqrt() + h.eps
            w = w - h.lr * (m / (1 - h.beta1**STEP)) / denominator
            out.append({"weights": w, "exp_avgs": m, "exp_avg_sqs": s, "max_exp_avg_sqs": top, "masters": w})
        return out


def plain(name: str, *shape: int, place: Callable[[Tensor], Tensor] = torch.clone) -> Sample:
    return Sample(name, shape, PLAIN, place=place)


SHORT_STRIPS = Sample("short_strips", (40, 1100), Layout())  # native: two strips
NUMBER = Sample("number", (1,), PLAIN, place=lambda w: w.view(()))


def vector(kind: Kind, *shape: int, parts: int = 1, place: Callable[[Tensor], Tensor] = torch.clone) -> Sample:
    return Sample(f"{kind.name.lower()}{shape}{parts}", shape, Layout(kind, parts), place=place)


OPTION_SETS = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"decoupled": True},
    {"amsgrad": True, "maximize": True, "decoupled": True},
]
LAYOUTS = [s for s in SAMPLES if not s.overlaps]
EVERY_KIND = [
    SHORT_STRIPS,
    sample_of("conv_groups_channels_last"),
    sample_of("packed_columns"),
    vector(Kind.BIAS, 6, parts=3),
    vector(Kind.SCALE, 37),
    vector(Kind.SHIFT, 5, 3),
    plain("plain", 41, 3),
    NUMBER,
]
