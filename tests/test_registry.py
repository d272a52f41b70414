"""The registered ops as torch sees them: opcheck, one graph under torch.compile, results equal to eager."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64, NAMES, eps, gaussian, relative_error, same_bits, unit
from layout_samples import channels_last
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spectral_ops import power_iteration, spectral_norm, spectral_penalty
from spectral_ops.ops.layout import Kind, Layout, pack, vector_dtype

OPS = torch.ops.spectral_ops


class Example:
    """A small list of everything: a matrix, conv groups, a packed projection, a bias, a transposed and an empty one."""

    def __init__(self, dtype: torch.dtype, *, matrices_only: bool = False, requires_grad: bool = False) -> None:
        tensors = [gaussian("m", 6, 5), channels_last(gaussian("c", 8, 3, 2, 2)), gaussian("p", 4, 9), gaussian("b", 6)]
        tensors += [gaussian("t", 5, 7).T, torch.zeros(0, 3, dtype=F64)]
        layouts = [Layout(), Layout(parts=2), Layout(Kind.MATRIX, 3, 1, 1), Layout(Kind.BIAS, 2), Layout(), Layout()]
        kept = [i for i, layout in enumerate(layouts) if layout.is_matrix or not matrices_only]
        self.weights = [tensors[i].to(dtype).requires_grad_(requires_grad) for i in kept]
        self.layouts = pack([layouts[i] for i in kept])
        self.v = torch.cat([unit(str(i), n) for i, n in enumerate([5, 12, 12, 4, 4, 4, 5, 3])]).to(vector_dtype(dtype))
        self.exponents = torch.zeros(8, dtype=torch.int32)
        self.targets, self.scales = [0.9] * len(kept), [1.3] * len(kept)

    def penalty(self) -> tuple[Any, ...]:
        return self.weights, self.v, self.exponents, self.layouts, self.targets, self.scales, 2.0


# The second of each pair: a value equal to what a schema default might have been is where torch's backward failed.
DTYPE_IDS = {"argvalues": [F32, BF16, F64], "ids": NAMES.get}


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("n_iter", [1, 3])
def test_opcheck_power_iteration(backend: str, dtype: torch.dtype, n_iter: int) -> None:
    e = Example(dtype)
    torch.library.opcheck(OPS.power_iteration, (e.weights, e.v, e.exponents, e.layouts, n_iter))


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "with_gradient"])
def test_opcheck_spectral_penalty(backend: str, dtype: torch.dtype, requires_grad: bool) -> None:
    torch.library.opcheck(OPS.spectral_penalty, Example(dtype, requires_grad=requires_grad).penalty())


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
def test_opcheck_spectral_penalty_backward(backend: str, dtype: torch.dtype) -> None:
    e = Example(dtype)
    value, sigma, u, v, _ = OPS.spectral_penalty(*e.penalty())
    arguments = (torch.ones_like(value), e.weights, sigma, u, v, e.layouts, e.targets, e.scales, 2.0)
    torch.library.opcheck(OPS.spectral_penalty_backward, arguments)


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "with_gradient"])
def test_opcheck_spectral_norm(backend: str, dtype: torch.dtype, requires_grad: bool) -> None:
    e = Example(dtype, matrices_only=True, requires_grad=requires_grad)
    torch.library.opcheck(OPS.spectral_norm, (e.weights, e.layouts, 1e-6, 256))


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
def test_opcheck_spectral_norm_backward(backend: str, dtype: torch.dtype) -> None:
    e = Example(dtype, matrices_only=True)
    sigma, _, u, v, _ = OPS.spectral_norm(e.weights, e.layouts, 1e-6, 256)
    torch.library.opcheck(OPS.spectral_norm_backward, (torch.ones_like(sigma), e.weights, u, v, e.layouts))


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "with_loss_scale"])
def test_opcheck_accumulate_grad(backend: str, dtype: torch.dtype, scaler: bool) -> None:
    e = Example(dtype)
    extra = (torch.tensor(1024.0), torch.tensor(0.0)) if scaler else (None, None)
    gradients = [torch.zeros_like(w) for w in e.weights]
    sigma = torch.zeros(8, dtype=e.v.dtype)
    arguments = (
        gradients,
        e.weights,
        e.v,
        e.exponents,
        sigma,
        e.layouts,
        e.targets,
        e.scales,
        2.0,
        torch.tensor(0.1),
        *extra,
    )
    torch.library.opcheck(OPS.accumulate_grad_, arguments)


def test_no_schema_has_a_default() -> None:
    """With a list of tensors, torch's backward fails where an argument equals its default."""
    both = [f"{name}{end}" for name in ("spectral_penalty", "spectral_norm") for end in ("", "_backward")]
    for name in ["power_iteration", *both, "accumulate_grad_"]:
        schema = getattr(OPS, name).default._schema
        assert not any(argument.has_default_value() for argument in schema.arguments), name
        mutated = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert mutated == ({"gradients", "v", "exponents", "sigma"} if name == "accumulate_grad_" else set())


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
def test_no_output_shares_memory_with_an_input_or_another_output(backend: str, dtype: torch.dtype) -> None:
    e = Example(dtype, matrices_only=True)
    outputs = [*OPS.power_iteration(e.weights, e.v, e.exponents, e.layouts, 1), *OPS.spectral_penalty(*e.penalty())]
    outputs += OPS.spectral_norm(e.weights, e.layouts, 1e-6, 256)
    places = [x.untyped_storage().data_ptr() for x in [*outputs, *e.weights, e.v, e.exponents] if x.numel()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("backward", [False, True], ids=["no_grad", "backward"])
def test_inputs_are_left_as_they_were(backend: str, backward: bool) -> None:
    e = Example(F32, requires_grad=backward)
    kept = [x.detach().clone() for x in [*e.weights, e.v, e.exponents]]
    value, *_ = OPS.spectral_penalty(*e.penalty())
    if backward:
        value.backward()
    assert all(same_bits(x.detach(), y) for x, y in zip([*e.weights, e.v], kept, strict=False))
    assert torch.equal(e.exponents, kept[-1])


@pytest.mark.parametrize("dtype", **DTYPE_IDS)
def test_ops_run_where_autograd_is_off(backend: str, dtype: torch.dtype) -> None:
    """Inference mode, as dispatch modes do, takes autograd from under an op's implementation."""
    e = Example(dtype)
    plain, quiet = ([torch.zeros_like(w) for w in e.weights] for _ in range(2))
    for gradients, mode in ((plain, torch.no_grad()), (quiet, torch.inference_mode())):
        with mode:
            state = (e.v.clone(), e.exponents.clone(), torch.zeros(8, dtype=e.v.dtype))
            settings = (e.layouts, e.targets, e.scales, 2.0, torch.tensor(0.1), None, None)
            OPS.accumulate_grad_(gradients, e.weights, *state, *settings)
    assert all(same_bits(x, y) for x, y in zip(plain, quiet, strict=True))
    assert all(x.any() for x in plain if x.numel())


def made() -> tuple[Any, ...]:
    """The tensors of one run of everything."""
    e = Example(F32)
    strength, sigma = torch.full((), 0.1), torch.zeros(8)
    return *inputs(), e, [torch.zeros_like(x) for x in e.weights], sigma, strength


def results(
    w: list[Tensor], v: list[Tensor], e: Example, gradients: list[Tensor], sigma: Tensor, strength: Tensor
) -> list[Tensor]:
    """Every public function and its gradient, and the accumulation."""
    s, u, _ = power_iteration(w, v, n_iter=2)
    value = spectral_penalty(w, v, exponent=1.5)
    norm, bound, left, right = spectral_norm(w, return_bound=True, return_vectors=True)
    out = [s, *u, *v, value, norm, bound, *left, *right]
    for total in (value, norm.sum()):
        out += torch.autograd.grad(total, w)
    state = (e.v, e.exponents, sigma, e.layouts, e.targets, e.scales)
    out.append(OPS.accumulate_grad_(gradients, e.weights, *state, 2.0, strength, None, None))
    return [x.detach() for x in (*out, *gradients, e.v, sigma)]


@contextlib.contextmanager
def setting(switch: Callable[[Any], None], on: Any, off: Any) -> Iterator[None]:
    switch(on)
    try:
        yield
    finally:
        switch(off)


AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=BF16),
    "default_dtype": lambda: setting(torch.set_default_dtype, F64, F32),
    "default_device": lambda: torch.device("meta"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "flush_denormal": lambda: setting(torch.set_flush_denormal, True, False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    "dispatch_mode": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_what_is_set_around_a_call_does_not_reach_in(backend: str, around: str) -> None:
    expected, tensors = results(*made()), made()
    with AROUND[around]():
        found = results(*tensors)
    for x, y in zip(found, expected, strict=True):
        assert x.device.type == "cpu" and same_bits(x, y)


# ---- torch.compile ----


def penalty_and_norm(w: list[Tensor], v: list[Tensor]) -> Tensor:
    return 0.1 * spectral_penalty(w, v, exponent=1.5, target=0.5) + spectral_norm(w).sum()


def steps(w: list[Tensor], v: list[Tensor]) -> Tensor:
    sigma, u, v = power_iteration(w, v, n_iter=2)
    return sigma.sum() + u[0].sum() + v[1].sum() + sum(0 * x.sum() for x in w)


def inputs() -> tuple[list[Tensor], list[Tensor]]:
    weights = [gaussian("w0", 12, 8).float().requires_grad_(), channels_last(gaussian("w1", 4, 3, 2, 2)).float()]
    weights[1].requires_grad_()
    return weights, [unit("w0", 8).float(), unit("w1", 12).float()]


def check_compiled(function: Callable[..., Tensor], **how: Any) -> None:
    """Three steps, so that the second call meets vectors the first has changed."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, **how)
    eager_w, eager_v = inputs()
    w, v = inputs()
    for _ in range(3):
        expected, found = function(eager_w, eager_v), compiled(w, v)
        # One and the same op runs; only sums around it may be taken in another order.
        assert relative_error(found.detach(), expected.detach()) <= 8 * eps(F32)
        assert all(same_bits(x, y) for x, y in zip(v, eager_v, strict=True))
        for leaf in [*w, *eager_w]:
            leaf.grad = None
        expected.backward()
        found.backward()
        for x, y in zip(w, eager_w, strict=True):
            assert x.grad is not None and y.grad is not None
            assert relative_error(x.grad, y.grad) <= 8 * eps(F32) if y.grad.any() else not x.grad.any()


@pytest.mark.parametrize("function", [penalty_and_norm, steps], ids=lambda f: f.__name__)
def test_compiled_to_one_graph(backend: str, function: Callable[..., Tensor]) -> None:
    check_compiled(function, backend="aot_eager")


@pytest.mark.slow  # inductor compiles C++: ~30 s on two cores
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode: str) -> None:
    check_compiled(penalty_and_norm, mode=mode)


def test_compiled_accumulation(backend: str) -> None:
    """The mutating op inside a graph: the gradient and the state change as in eager."""

    def add(
        gradients: list[Tensor], w: list[Tensor], v: Tensor, exponents: Tensor, sigma: Tensor, by: Tensor
    ) -> Tensor:
        layouts = pack([Layout()] * len(w))
        ones = [1.0] * len(w)
        value = OPS.accumulate_grad_(gradients, w, v, exponents, sigma, layouts, ones, ones, 2.0, by, None, None)
        return value + sigma.sum()

    def state() -> tuple[Any, ...]:
        w, v = inputs()
        w = [x.detach() for x in w]
        return [torch.ones_like(x) for x in w], w, torch.cat(v), torch.zeros(2, dtype=torch.int32), torch.zeros(2)

    torch._dynamo.reset()
    compiled = torch.compile(add, fullgraph=True, backend="aot_eager")
    eager, graph = state(), state()
    for strength in (0.1, 0.2):  # a 0-d tensor: no recompilation for another value
        with torch.compiler.set_stance("fail_on_recompile" if strength == 0.2 else "default"):
            found = compiled(*graph, torch.tensor(strength))
        expected = add(*eager, torch.tensor(strength))
        assert same_bits(found, expected)
        for x, y in zip([*graph[0], graph[2], graph[4]], [*eager[0], eager[2], eager[4]], strict=True):
            assert same_bits(x, y)
        assert torch.equal(graph[3], eager[3])
