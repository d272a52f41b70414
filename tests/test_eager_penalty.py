"""The loss form in an eager step, which goes past the registered op: its bits, its own backward, its refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64, NAMES, gaussian, unit
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.eager_penalty import WarmStep, eager_penalty
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout, pack


@pytest.fixture(params=["native", "triton"])
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backends that have it."""
    reason = backends.available()[request.param]
    if reason is None and request.param == "triton" and torch.cuda.is_available():
        reason = "it serves CUDA tensors, see tests/test_triton_cuda.py"
    if reason is not None:
        pytest.skip(f"{request.param} not usable: {reason}")
    with backends.use_backend(request.param):
        yield request.param


def eager(backend: str, dtype: torch.dtype, *, advance: bool = True) -> tuple[list[Tensor], WarmStep]:
    weights = [gaussian("eager_m", 20, 30), gaussian("eager_b", 20), gaussian("eager_c", 8, 3, 3, 3)]
    layouts = [Layout(), Layout(Kind.BIAS), Layout(parts=4)]
    v = torch.cat([unit(str(i), n) for i, n in enumerate([30, *[27] * 4])]).to(dtype)
    table = LayerTable(layouts, [0.7] * 3, [1.3] * 3)
    exponents, sigma = torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=dtype)
    step = WarmStep(backend, table, v, exponents, sigma, 28, 2.0, advance)
    return [w.to(dtype).requires_grad_() for w in weights], step


def registered(step: WarmStep, weights: list[Tensor]) -> tuple[Tensor, ...]:
    layouts = pack(step.table.layouts)
    return torch.ops.spectral_ops.spectral_penalty(
        weights, step.v.clone(), step.exponents.clone(), layouts, step.table.targets, step.table.scales, step.exponent
    )


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=NAMES.get)
@pytest.mark.parametrize("advance", [True, False])
def test_eager_form_has_the_bits_of_the_registered_op(compiled: str, dtype: torch.dtype, advance: bool) -> None:
    if compiled == "triton" and dtype == F64:
        pytest.skip("there are no float64 kernels")
    weights, step = eager(compiled, F64 if dtype == F64 else F32, advance=advance)
    weights = [w.detach().to(dtype).requires_grad_() for w in weights]
    kept = [x.clone() for x in (step.v, step.exponents, step.sigma)]
    expected, sigma, _, v, exponents = registered(step, weights)
    value = eager_penalty(step, weights)
    assert torch.equal(value, expected)
    for found, right in zip(
        torch.autograd.grad(0.3 * value, weights), torch.autograd.grad(0.3 * expected, weights), strict=True
    ):
        assert torch.equal(found, right) and found.dtype == dtype
    for x, right in zip((step.v, step.exponents, step.sigma), (v, exponents, sigma) if advance else kept, strict=True):
        assert torch.equal(x, right)


def test_eager_backward_belongs_to_its_own_step(compiled: str) -> None:
    """Two steps, then their backwards, each twice: what was kept is not what the buffers hold by then."""
    weights, step = eager(compiled, F32)
    expected = torch.autograd.grad(registered(step, weights)[0], weights)
    first = eager_penalty(step, weights)
    with torch.no_grad():
        assert eager_penalty(step, weights).grad_fn is None
    second = eager_penalty(step, weights)
    later = torch.autograd.grad(second, weights)
    for _ in range(2):
        found = torch.autograd.grad(first, weights, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert not torch.equal(later[0], expected[0])


def test_eager_form_sees_weights_changed_before_its_backward(compiled: str) -> None:
    weights, step = eager(compiled, F32)
    value = eager_penalty(step, weights)
    with torch.no_grad():
        weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.skipif(not backends.has_native(), reason="the compiled module is not built")
def test_gradcheck_of_the_eager_form() -> None:
    weights, step = eager("native", F64)
    with torch.no_grad():
        for _ in range(3000):  # to a singular vector, where finite differences see u v'
            eager_penalty(step, weights)
    step = step._replace(advance=False)
    assert torch.autograd.gradcheck(lambda *w: eager_penalty(step, w), weights, atol=1e-5, rtol=1e-6)


def test_a_second_derivative_of_the_eager_form_is_refused(compiled: str) -> None:
    weights, step = eager(compiled, F32)
    gradients = torch.autograd.grad(eager_penalty(step, weights), weights, create_graph=True)
    expected = torch.autograd.grad(registered(eager(compiled, F32)[1], weights)[0], weights)
    assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))
    with pytest.raises(RuntimeError, match="expected one differentiation, got a second one"):
        gradients[0].sum().backward()


@pytest.mark.parametrize("case", ["plain", "zero", "not finite", "empty", "out of range"])
def test_the_state_takes_what_is_kept(compiled: str, case: str) -> None:
    """Whichever way a step ends, the state is what the registered op returns; and with advance off it is left alone."""
    w = {"zero": torch.zeros(6, 5), "empty": torch.empty(0, 5), "out of range": 2.0**70 * gaussian("r", 6, 5).float()}
    weight = w.get(case, gaussian("s", 6, 5).float())
    if case == "not finite":
        weight[2, 3] = torch.inf
    table = LayerTable([Layout()], [1.0], [1.0])
    for advance in (True, False):
        v, exponents, sigma = unit("t", 5).float(), torch.tensor([1], dtype=torch.int32), torch.tensor([7.0])
        step = WarmStep(compiled, table, v, exponents, sigma, weight.shape[0], 2.0, advance)
        _, new_sigma, _, new_v, new_exponents = registered(step, [weight])
        before = [x.clone() for x in (v, exponents, sigma)]
        eager_penalty(step, [weight.clone().requires_grad_()])
        for x, kept, new in zip((v, exponents, sigma), before, (new_v, new_exponents, new_sigma), strict=True):
            assert torch.equal(x.nan_to_num(nan=-1.0), (new if advance else kept).nan_to_num(nan=-1.0))


def test_one_launch_forward_and_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.available()["triton"] is not None or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter; on a device tests/test_triton_cuda.py counts kernels")
    from spectral_ops.ops import triton_table

    launches: list[str] = []
    for name in ("launch_penalty", "launch_penalty_backward"):
        launch: Any = getattr(triton_table, name)
        monkeypatch.setattr(
            triton_table, name, lambda *args, launch=launch, name=name: (launches.append(name), launch(*args))
        )
    with backends.use_backend("triton"):
        weights, step = eager("triton", F32)
        start = step.v.clone()
        value = eager_penalty(step, weights)
        assert launches == ["launch_penalty"] and not torch.equal(step.v, start)
        value.backward()
    assert launches == ["launch_penalty", "launch_penalty_backward"]
