"""A launch of the one-launch kernel with its truth in float64, on a device or else in the interpreter."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import F32, F64, eps, error, gaussian, relative_error
from torch import Tensor

pytest.importorskip("triton")

from spectral_ops import backends  # noqa: E402
from spectral_ops.kernels import table  # noqa: E402
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout, as_matrices, sizes  # noqa: E402
from spectral_ops.ops.triton_table import State  # noqa: E402

STRENGTH, EXPONENT, TARGET = 0.37, 2.0, 0.8
MATRIX = Layout()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
looks_inside = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with backends.use_backend("triton"):
        yield


def on_device(t: Tensor) -> Tensor:
    """The same numbers at the same strides and the same distance from an aligned address."""
    store = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(DEVICE)
    return store.as_strided(t.shape, t.stride(), t.storage_offset())


@dataclass
class Problem:
    """Parameters, gradients that are not zero, vectors that are not converged, and a table."""

    weights: list[Tensor]
    layouts: list[Layout]
    gradient_dtype: torch.dtype | None = None
    exponent: float = EXPONENT
    exponents: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weights = [on_device(w) for w in self.weights]
        self.gradients = [(0.1 * torch.randn(w.shape)).to(self.gradient_dtype or w.dtype) for w in self.weights]
        self.gradients = [g.contiguous().to(DEVICE) for g in self.gradients]
        shapes = [sizes(w.shape, x) for w, x in zip(self.weights, self.layouts, strict=True) if x.is_matrix]
        # Of one sign: hardly ever nearly orthogonal to all rows, which would cost y its digits.
        units = [torch.nn.functional.normalize(0.1 + torch.rand(s.parts, s.n), dim=1).flatten() for s in shapes]
        self.v = torch.cat([*units, torch.empty(0)]).to(DEVICE)
        count = sum(s.parts for s in shapes)
        self.exponents = torch.zeros(count, dtype=torch.int32, device=DEVICE)
        self.sigma = torch.full((count,), -1.0, device=DEVICE)
        self.remember()
        ones = [1.0] * len(self.weights)
        targets = [TARGET if x.is_matrix else 1.0 for x in self.layouts]
        self.table = LayerTable(self.layouts, targets, ones).triton

    def remember(self) -> None:
        """What the next step starts from."""
        self.before = [g.double().cpu() for g in self.gradients]
        self.start = self.v.cpu().clone()

    def step(self, **options: Any) -> Tensor:
        state = State(self.v, self.v, self.exponents, self.exponents, self.sigma, None)
        return self.table.step(self.weights, self.gradients, state, self.exponent, STRENGTH, **options)

    def truth(self, factor: float = STRENGTH) -> tuple[float, Tensor, list[Tensor], Tensor]:
        """R, sigmas, what is added to each gradient, and the next v, of one step in float64."""
        value, sigmas, added, vs, at = 0.0, [], [], [], 0
        for w, layout in zip(self.weights, self.layouts, strict=True):
            x = w.detach().cpu().double().requires_grad_()
            if layout.is_matrix:
                parts, _, n = sizes(w.shape, layout)
                v = self.start[at : at + parts * n].view(parts, n).double()
                at += parts * n
                matrices = as_matrices(x, layout).flatten(2)
                y = torch.einsum("pmn,pn->pm", matrices, v)
                u = (y / y.norm(dim=1, keepdim=True)).detach()
                z = torch.einsum("pmn,pm->pn", matrices, u)
                term = ((z.norm(dim=1) ** self.exponent - TARGET**self.exponent) ** 2).sum()
                sigmas.append(z.norm(dim=1).detach())
                vs.append((z / z.norm(dim=1, keepdim=True)).detach().flatten())
            elif layout.kind is Kind.BIAS:
                term = (as_matrices(x, layout).flatten(1).square().sum(dim=1) ** self.exponent).sum()
            elif layout.kind is Kind.SCALE:
                term = ((x.abs() ** self.exponent - 1) ** 2).sum()
            else:
                term = (x.square() ** self.exponent).sum()
            added.append(factor * torch.autograd.grad(term, x)[0])
            value += term.item()
        none = torch.empty(0, dtype=F64)
        return value, torch.cat([*sigmas, none]), added, torch.cat([*vs, none])

    def check(self, value: Tensor, factor: float = STRENGTH) -> None:
        r, sigmas, added, v = self.truth(factor)
        # Sums of a few thousand float32 products: measured 3 roundings.
        assert relative_error(self.sigma.cpu(), sigmas) <= 16 * eps(F32)
        assert error(self.v.cpu(), v) <= 16 * eps(F32)
        assert abs(value.item() - STRENGTH * r) <= 64 * eps(F32) * STRENGTH * max(r, 1.0)
        for gradient, before, more in zip(self.gradients, self.before, added, strict=True):
            largest = (before + more).abs().max().item()
            rounding = 0.5 * torch.finfo(gradient.dtype).eps * largest  # once, to the gradient's dtype
            cancelled = 64 * eps(F32) * max(largest, more.abs().max().item(), TARGET)
            assert error(gradient.cpu(), before + more) <= rounding + cancelled

    def rows(self) -> list[Any]:
        return [rows for cuts in self.table._cuts.values() for rows in cuts.rows]

    def modes(self) -> set[int]:
        return {variant[0] for rows in self.rows() for variant in rows.cut.read_variants}


def columns_last(m: int, n: int) -> Tensor:
    return gaussian("columns", n, m).float().t()


def make(m: int, n: int, dtype: torch.dtype = F32) -> Tensor:
    return (gaussian("w", m, n) / math.sqrt(max(m, n))).to(dtype)


PATHS = {
    # One sweep: aligned, unaligned, in pieces; one row, one column, several strips, several blocks of columns.
    "aligned": (lambda: [make(37, 48)], [MATRIX], {table.ONE_SWEEP.value}),
    "unaligned": (lambda: [make(20, 33)], [MATRIX], {table.ONE_SWEEP.value}),
    "two pieces": (lambda: [make(9, 256)], [MATRIX], {table.ONE_SWEEP.value}),
    "six pieces": (lambda: [make(9, 760)], [MATRIX], {table.ONE_SWEEP.value}),
    "one row": (lambda: [make(1, 70)], [MATRIX], {table.ONE_SWEEP.value}),
    "one column": (lambda: [make(70, 1)], [MATRIX], {table.ONE_SWEEP.value}),
    "one element": (lambda: [make(1, 1)], [MATRIX], {table.ONE_SWEEP.value}),
    "two copies": (lambda: [make(9, 1400)], [MATRIX], {table.ONE_SWEEP.value}),
    "no copies": (lambda: [make(5, 3000)], [MATRIX], {table.ONE_SWEEP.value}),
    "unaligned pieces": (lambda: [make(9, 761)], [MATRIX], {table.ONE_SWEEP.value}),
    "strips": (lambda: [make(300, 40)], [MATRIX], {table.ONE_SWEEP.value}),
    "blocks": (lambda: [make(5, 1300)], [MATRIX], {table.ONE_SWEEP.value}),
    "rows with gaps": (lambda: [make(20, 50)[:, :33]], [MATRIX], {table.ONE_SWEEP.value}),
    "odd address": (lambda: [make(1, 641).flatten()[1:].view(20, 32)], [MATRIX], {table.ONE_SWEEP.value}),
    "channels_last": (
        lambda: [make(8, 144).view(8, 16, 3, 3).to(memory_format=torch.channels_last)],
        [MATRIX],
        {table.ONE_SWEEP.value},
    ),
    "groups": (lambda: [make(8, 36).view(8, 4, 3, 3)], [Layout(Kind.MATRIX, 4, 0, 0)], {table.ONE_SWEEP.value}),
    # Two sweeps: rows too long for registers; strides.
    "chunked": (lambda: [make(5, 9000)], [MATRIX], {table.CHUNKED.value}),
    "chunked, unaligned": (lambda: [make(5, 8201)], [MATRIX], {table.CHUNKED.value}),
    "by column": (lambda: [columns_last(130, 70)], [MATRIX], {table.BY_COLUMN.value}),
    "Conv1D": (lambda: [make(24, 72)], [Layout(Kind.MATRIX, 3, 1, 1)], {table.BY_COLUMN.value}),
    "strided": (lambda: [make(40, 300)[:, ::3]], [MATRIX], {table.STRIDED.value}),
    "expanded": (lambda: [make(1, 30).expand(40, 30)], [MATRIX], {table.ONE_SWEEP.value}),
    "expanded columns": (lambda: [make(40, 1).expand(40, 30)], [MATRIX], {table.BY_COLUMN.value}),
    "transposed conv": (
        lambda: [make(8, 144).view(8, 16, 3, 3)],
        [Layout(Kind.MATRIX, 2, 0, 1)],
        {table.STRIDED.value},
    ),
    # Everything in one launch.
    "mixed": (
        lambda: [
            make(37, 48),
            torch.randn(9),
            make(20, 33),
            columns_last(70, 40),
            1 + 0.1 * torch.randn(1500),
            torch.randn(11),
        ],
        [MATRIX, Layout(Kind.BIAS, 3), MATRIX, MATRIX, Layout(Kind.SCALE), Layout(Kind.SHIFT)],
        {table.ONE_SWEEP.value, table.BY_COLUMN.value},
    ),
}
