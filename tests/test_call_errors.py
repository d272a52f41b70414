"""Calls of the public ops that torch would refuse in words of its own, or halfway through; and numbers of any kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import gaussian, same_bits
from torch import Tensor

from spectral_ops import conv_norm_bound, conv_spectral_norm, power_iteration, spectral_norm, spectral_penalty
from spectral_ops.ops.checks import check_exponent, check_positive_int, check_target, check_tol

W, V = torch.ones(4, 3), torch.ones(3)


def expect(error: type[Exception], text: str) -> Any:
    """The whole message, word for word."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


# ---- numbers ----


def test_numbers_of_numpy() -> None:
    w, kernel = gaussian("numpy", 6, 4), gaussian("kernel", 4, 2, 3)
    same = [
        [spectral_norm(w, tol=f(0.125), max_iter=i(200)) for f, i in ((float, int), (np.float32, np.int64))],
        [spectral_penalty([w], [V4()], exponent=f(1.5), target=f(0.5)) for f in (float, np.float16, np.longdouble)],
        [power_iteration([w], [V4()], n_iter=i(2))[0] for i in (int, np.uint8)],
        [conv_spectral_norm(kernel, i(5), padding=i(1), stride=(i(2),), groups=i(2)) for i in (int, np.int32)],
        [conv_norm_bound(kernel, [i(5)], dilation=i(2), groups=i(2)).bound for i in (int, np.int32)],
    ]
    for first, *others in same:
        assert all(same_bits(first, x) for x in others)
    for value in (check_exponent("op", np.float32(2)), check_target("op", np.int64(1)), check_tol("op", np.half(0.5))):
        assert type(value) is float
    assert type(check_positive_int("op", "n", np.int16(3))) is int  # type: ignore[arg-type]


def V4() -> Tensor:
    return torch.ones(4, dtype=torch.float64) / 2


@pytest.mark.parametrize("value", [np.bool_(True), np.float64(1.0)])
def test_what_is_no_whole_number(value: Any) -> None:
    text = f"spectral_norm: expected max_iter to be an int, got {type(value).__name__}."
    with expect(TypeError, f"{text} Pass a whole number of at least 1."):
        spectral_norm(W, max_iter=value)
    with pytest.raises(TypeError, match="^conv_spectral_norm: expected input_size to be whole numbers"):
        conv_spectral_norm(W[:, :, None], value)


@pytest.mark.parametrize("value", [2**31, 2**70])
def test_counts_beyond_int32(backend: str, value: int) -> None:
    limit = f"to be at most 2147483647, got {value}. Pass a smaller number."
    with expect(ValueError, f"spectral_norm: expected max_iter {limit}"):
        spectral_norm(W, max_iter=value)
    with expect(ValueError, f"conv_spectral_norm: expected max_iter {limit}"):
        conv_spectral_norm(W[:, :, None], 4, max_iter=value)
    with expect(ValueError, f"power_iteration: expected n_iter {limit}"):
        power_iteration([W], [V.clone()], n_iter=value)
    assert spectral_norm(W, max_iter=2**31 - 1).isfinite()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["target", "exponent"])
def test_numbers_that_change_between_calls_of_a_compiled_step(name: str, dynamic: bool | None) -> None:
    w = gaussian("compiled", 4, 3).float()

    def step(w: Tensor, v: Tensor, number: float) -> Tensor:
        return spectral_penalty([w], [v], **{name: number})

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for number in (1.5, 2.5, 3.25):
        torch.testing.assert_close(compiled(w, V.clone(), number), step(w, V.clone(), number))


# ---- vectors that are written to ----


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


UNWRITABLE: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "expanded": (
        lambda: torch.ones(1).expand(3),
        ValueError,
        "expected v[1] to have memory for every element, got an expanded tensor. Keep v.contiguous().",
    ),
    "negative": (
        lambda: torch.complex(V, V).conj().imag,
        TypeError,
        "expected v[1] without the negative bit, got one with it. Keep v.resolve_neg().",
    ),
    "inference": (
        lambda: inference(V),
        ValueError,
        "expected v[1] to be a tensor that can be written outside of torch.inference_mode(), got one made inside. "
        "Keep v.clone().",
    ),
    "sparse": (V.to_sparse, TypeError, "expected v[1] to be dense, got a sparse_coo one. Keep v.to_dense()."),
    "zero_tensor": (
        lambda: torch._efficientzerotensor(3),
        TypeError,
        "expected v[1] to have memory, got a ZeroTensor. Keep v.clone().",
    ),
}
WARM = {"power_iteration": power_iteration, "spectral_penalty": spectral_penalty}


@pytest.mark.parametrize("op", WARM)
@pytest.mark.parametrize("case", UNWRITABLE)
def test_vectors_that_cannot_be_written_change_nothing(op: str, case: str) -> None:
    make, error, text = UNWRITABLE[case]
    first = V.clone()
    with expect(error, f"{op}: {text}"):
        WARM[op]([W, W], [first, make()])
    assert torch.equal(first, V)


@pytest.mark.parametrize("op", WARM)
def test_one_memory_for_two_vectors(op: str) -> None:
    x = V.clone()
    for second in (x, x.view(3)):
        text = "expected vectors of their own for every weight, got the same memory as v[0] and v[2]."
        with expect(ValueError, f"{op}: {text} Keep a clone() for each."):
            WARM[op]([W, W, W], [x, V.clone(), second])
    assert torch.equal(x, V)
    nothing = torch.ones(4, 0)
    WARM[op]([nothing, nothing], [torch.ones(0), torch.ones(0)])  # which have no memory to share
    with torch.inference_mode():
        WARM[op]([W], [inference(V)])


# ---- transforms of torch.func ----

CALLS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "spectral_norm": (lambda w: spectral_norm([W, w])[1], "w[1]"),
    "spectral_norm_of_one": (spectral_norm, "w"),
    "spectral_penalty": (lambda w: spectral_penalty([W, w], [V.clone(), V.clone()]), "weights[1]"),
    "conv_spectral_norm": (lambda w: conv_spectral_norm(w[:, :, None], 4), "weight"),
    "conv_norm_bound": (lambda w: conv_norm_bound(w[:, :, None], 4).bound, "weight"),
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f)(W),
    "vjp": lambda f: torch.func.vjp(f, W),
    "jacrev": lambda f: torch.func.jacrev(f)(W),
    "hessian": lambda f: torch.func.hessian(f)(W),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CALLS)
def test_derivatives_of_torch_func(case: str, transform: str) -> None:
    call, name = CALLS[case]
    text = f"{case.removesuffix('_of_one')}: expected {name} outside of torch.func, got one that grad, vjp or jacrev"
    with expect(NotImplementedError, f"{text} differentiates in. Differentiate by torch.autograd.grad."):
        TRANSFORMS[transform](call)
    # Matrices that are not differentiated, made inside and outside.
    assert torch.func.grad(lambda x: x * call(W) * call(W.clone()))(torch.tensor(1.0)) == call(W) ** 2
    assert torch.func.grad(lambda w: w.sum() * call(w.detach()))(W)[0, 0] == call(W)


@pytest.mark.parametrize("case", [*CALLS, "power_iteration"])
def test_vmap(case: str) -> None:
    if case == "power_iteration":
        call, name = (lambda w: power_iteration([W, w], [V.clone(), V.clone()])[0]), "weights[1]"
    else:
        call, name = CALLS[case]
    text = f"{case.removesuffix('_of_one')}: expected {name} outside of vmap, got a batch of them."
    with expect(NotImplementedError, f"{text} Call it with a list of matrices."):
        torch.func.vmap(call)(torch.ones(2, 4, 3))


@pytest.mark.parametrize("op", WARM)
def test_vmap_over_vectors(op: str) -> None:
    text = f"{op}: expected v[0] outside of vmap, got a batch of them. Call it with a list of matrices."
    with expect(NotImplementedError, text):
        torch.func.vmap(lambda v: WARM[op]([W], [v]))(torch.ones(2, 3))


@pytest.mark.parametrize("op", ["spectral_norm", "spectral_penalty"])
def test_gradients_in_batches(op: str) -> None:
    w = W.clone().requires_grad_()
    result = CALLS[op][0](w)
    text = f"{op}: expected one gradient of its result at a time, got a batch of them."
    with expect(NotImplementedError, f"{text} Leave is_grads_batched, vectorize and vmap out."):
        torch.autograd.grad(result, w, torch.ones(2), is_grads_batched=True, retain_graph=True)
    with expect(NotImplementedError, f"{text} Leave is_grads_batched, vectorize and vmap out."):
        torch.func.vmap(lambda g: torch.autograd.grad(result, w, g, retain_graph=True)[0])(torch.ones(2))


# ---- what is given in place of plain matrices ----


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (np.ones((4, 3)), "Pass [torch.as_tensor(w)] for one matrix."),
        ((x for x in [W]), "Pass list(w)."),
        (torch.nn.ParameterList([W]), "Pass list(w)."),
        ({"a": W}.values(), "Pass list(w)."),
        ({"a": W}, "Pass list(w.values())."),
        (3.0, "Pass [w] for one matrix."),
    ],
    ids=["ndarray", "generator", "parameter_list", "values", "dict", "number"],
)
def test_what_is_no_list(given: Any, remedy: str) -> None:
    kind = type(given).__name__
    with expect(TypeError, f"spectral_norm: expected w to be a list of tensors, got {kind}. {remedy}"):
        spectral_norm(given)
    for op, call in WARM.items():
        text = remedy.replace("w)", "weights)").replace("w.", "weights.")
        with expect(TypeError, f"{op}: expected weights to be a list of tensors, got {kind}. {text}"):
            call(given, [V.clone()])


ALL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "spectral_norm": (spectral_norm, "w"),
    "power_iteration": (lambda w: power_iteration([w], [V.clone()]), "weights[0]"),
    "spectral_penalty": (lambda w: spectral_penalty([w], [V.clone()]), "weights[0]"),
    "conv_spectral_norm": (lambda w: conv_spectral_norm(w, 4), "weight"),
    "conv_norm_bound": (lambda w: conv_norm_bound(w, 4), "weight"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("op", ALL)
def test_nested_tensors(op: str) -> None:
    call, name = ALL[op]
    text = f"{op}: expected {name} to be one tensor, got a nested one."
    with expect(TypeError, f"{text} Pass a list: unbind() makes one."):
        call(torch.nested.nested_tensor([W, W]))


class Shards(Tensor):
    """What tells a DTensor from other tensors."""

    placements = ("Shard(0)",)
    device_mesh = None


@pytest.mark.parametrize("op", ALL)
def test_dtensors(op: str) -> None:
    call, name = ALL[op]
    text = f"{op}: expected {name} to be a plain tensor, got a DTensor. Pass its full_tensor(), or take"
    with expect(TypeError, f"{text} SpectralRegularizer or SpectralAdamW, which read shards."):
        call(W.as_subclass(Shards))
