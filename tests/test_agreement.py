"""native against reference on random problems: any shape, split, strides, dtypes, exponents, ranges, lists of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import BF16, F16, F32, F64, eps, relative_error, same_bits, unscaled
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_samples import channels_last, spread, transposed, window
from torch import Tensor

from spectral_ops import backends, use_backend
from spectral_ops.ops.accumulate_grad import accumulate_grad
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout, as_matrices, pack, sizes, vector_dtype

OPS = torch.ops.spectral_ops
pytestmark = pytest.mark.skipif(backends.available()["native"] is not None, reason="native is not built")

# Deterministic: the same problems in every run of continuous integration.
PROFILE = settings(deadline=None, derandomize=True, max_examples=100)
ROUNDING = 16  # roundings between the backends, relative to ||W|| / ||y||: 6 suffice, 3 do not

SIZE = st.integers(1, 70)
PLACES: list[Callable[[Tensor], Tensor]] = [torch.clone, transposed, spread, window]


@dataclass
class Parameter:
    layout: Layout
    w: Tensor
    v: Tensor  # (parts, n)
    gradient: Tensor
    target: float
    scale: float


@st.composite
def parameters(draw: st.DrawFn, double: bool) -> Parameter:
    shape_kind = draw(st.sampled_from(["matrix", "conv", "rows", "columns", "stack", "transposed_conv", "vector"]))
    m, n, parts = draw(SIZE), draw(SIZE), draw(st.integers(1, 4))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    few = 1 + n % 12
    shape, layout = {
        "matrix": ((m, n), Layout()),
        "conv": ((m * parts, few, *kernel), Layout(parts=parts)),
        "rows": ((m * parts, n), Layout(parts=parts)),
        "columns": ((n, m * parts), Layout(Kind.MATRIX, parts, 1, draw(st.sampled_from([0, 1])))),
        "stack": ((parts, m, n), Layout(parts=parts, row_dim=1)),
        "transposed_conv": ((few * parts, m, *kernel), Layout(Kind.MATRIX, parts, 0, 1)),
        "vector": ((m * parts,), Layout(Kind(draw(st.integers(1, 3))), parts)),
    }[shape_kind]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = F64 if double else draw(st.sampled_from([F32, BF16, F16]))
    gradient_dtype = F64 if double else draw(st.sampled_from([F32, BF16, F16]))
    values = torch.randn(shape, generator=generator, dtype=F64)
    if layout.is_matrix:
        values *= 10.0 ** draw(st.integers(-3, 1))  # the gradient, of sigma^3 and more, still fits into float16
    places = [*PLACES, channels_last] if len(shape) == 4 else PLACES
    w = draw(st.sampled_from(places))(values.to(dtype))
    if layout.is_matrix and draw(st.integers(0, 9)) == 0:  # a weight of equal rows or columns, without memory for them
        w = w[:1].expand(shape) if draw(st.booleans()) else w[..., :1].expand(shape)
    gradient = draw(st.sampled_from(places))(torch.randn(shape, generator=generator, dtype=F64).to(gradient_dtype))
    v = torch.zeros(0, 0, dtype=vector_dtype(dtype))
    if layout.is_matrix:
        stack = as_matrices(w, layout).reshape(sizes(shape, layout)).double()
        v = torch.randn(layout.parts, stack.shape[2], generator=generator, dtype=F64)
        for _ in range(2):  # warm: a v almost orthogonal to the rows would show rounding and nothing else
            v = torch.einsum("pmn,pm->pn", stack, torch.einsum("pmn,pn->pm", stack, v))
            v = v / v.norm(dim=1, keepdim=True)
        v = v.to(vector_dtype(dtype))
    return Parameter(
        layout, w, v, gradient, draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.sampled_from([1.0, 0.1, 7.0]))
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Parameter], float]:
    double = draw(st.booleans())
    return draw(st.lists(parameters(double), min_size=1, max_size=4)), draw(st.sampled_from([1.0, 1.5, 2.0, 3.0]))


def run(backend: str, problem: list[Parameter], exponent: float) -> dict[str, list[Tensor]]:
    weights = [p.w for p in problem]
    layouts, targets, scales = [p.layout for p in problem], [p.target for p in problem], [p.scale for p in problem]
    v = torch.cat([p.v.flatten() for p in problem])
    parts = [p.layout.parts if p.layout.is_matrix else 0 for p in problem]
    rows = [count * sizes(p.w.shape, p.layout).m for count, p in zip(parts, problem, strict=True)]
    zeros = torch.zeros(sum(parts), dtype=torch.int32)
    with use_backend(backend):
        value, sigma, u, v_new, exponents = OPS.spectral_penalty(
            weights, v, zeros, pack(layouts), targets, scales, exponent
        )
        backward = OPS.spectral_penalty_backward(
            torch.tensor(0.5, dtype=v.dtype), weights, sigma, u, v_new, pack(layouts), targets, scales, exponent
        )
        # Into clones with the same strides, gaps and all.
        gradients = [p.gradient.as_strided(p.gradient.shape, p.gradient.stride()) for p in problem]
        kept = [(p.gradient._base if p.gradient._base is not None else p.gradient).clone() for p in problem]
        state = (v.clone(), zeros.clone(), torch.empty(sum(parts), dtype=v.dtype))
        total = accumulate_grad(gradients, weights, *state, LayerTable(layouts, targets, scales), exponent, 0.25)
        added = [p.gradient.double().clone() for p in problem]
        for p, before in zip(problem, kept, strict=True):
            (p.gradient._base if p.gradient._base is not None else p.gradient).copy_(before)
    assert same_bits(state[0], v_new) and same_bits(state[2], sigma) and torch.equal(state[1], exponents)
    return {
        "value": [value, total * 4],
        "sigma": list(sigma.split(parts)),
        "u": list(u.split(rows)),
        "v": list(v_new.split([p.v.numel() for p in problem])),
        "backward": backward,
        "added": added,
    }


@PROFILE
@given(problems())
def test_native_and_reference_agree(problem: tuple[list[Parameter], float]) -> None:
    many, exponent = problem
    found, expected = run("native", many, exponent), run("reference", many, exponent)
    dtype = many[0].w.dtype
    rounding = ROUNDING * eps(dtype)
    largest = 0.0
    for i, p in enumerate(many):
        if p.layout.is_matrix:
            w, _ = unscaled(p.w)
            y = torch.einsum(
                "pmn,pn->pm", as_matrices(w, p.layout).reshape(p.layout.parts, -1, p.v.shape[1]), p.v.double()
            )
            # The part with the worst conditioned direction; parts differ little, being of one size.
            turned = max(1.0, (w.norm() / y.norm(dim=1).min()).item())
            assert relative_error(found["sigma"][i], expected["sigma"][i]) <= rounding
            assert relative_error(found["u"][i], expected["u"][i]) <= rounding * turned
            assert relative_error(found["v"][i], expected["v"][i]) <= rounding * turned
            s = expected["sigma"][i].double()
            terms = p.scale * (s**exponent + p.target**exponent) ** 2
            steepest = (2 * exponent * s ** (exponent - 1) * (s**exponent + p.target**exponent)).max().item() * p.scale
        else:
            turned, x = 1.0, p.w.double().abs()
            size = (x.square().sum() if p.layout.kind == Kind.BIAS else x.max() ** 2) + 1
            terms = p.scale * size**exponent * (1 if p.layout.kind == Kind.BIAS else x.numel())
            steepest = (2 * exponent * size ** (exponent - 0.5)).item() * p.scale
        largest += torch.as_tensor(terms).sum().item()
        for key, factor, gradient_dtype in (("backward", 0.5, dtype), ("added", 0.25, p.gradient.dtype)):
            x, y = found[key][i].double(), expected[key][i].double()
            # Rounded to the gradient's dtype, the two may fall on neighbours where they differ at all.
            place = torch.finfo(gradient_dtype).eps * y.abs() + torch.finfo(gradient_dtype).tiny
            over = (x == y) | (y.isinf() & (x.abs() >= torch.finfo(gradient_dtype).max))
            assert (((x - y).abs() <= place + 2 * rounding * turned * steepest * factor) | over).all(), key
    for x, y in zip(found["value"], expected["value"], strict=True):
        assert (x.double() - y.double()).abs() <= 2 * rounding * largest
