"""Every message of the public ops and of the checks they share: what was expected, what came, the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from spectral_ops import conv_norm_bound, conv_spectral_norm, power_iteration, spectral_norm, spectral_penalty
from spectral_ops.ops.accumulate_grad import accumulate_grad
from spectral_ops.ops.checks import check_exponent, check_gradient, check_positive_int, check_target
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Layout

W, V = torch.ones(4, 3), torch.ones(3)
META = torch.ones(4, 3, device="meta")
# Ops that take (weights, v), then all that take weights.
WARM: list[tuple[str, Callable[..., Any]]] = [
    ("power_iteration", power_iteration),
    ("spectral_penalty", spectral_penalty),
]
ALL: list[tuple[str, Callable[..., Any]]] = [*WARM, ("spectral_norm", lambda w, v=None: spectral_norm(w))]


def expect(error: type[Exception], text: str) -> Any:
    """The whole message, word for word."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def named(op: str, text: str) -> str:
    """As an op calls its argument."""
    return re.sub(r"\bweights\b(?=\[| to |\.)", "w", text) if op == "spectral_norm" else text


@pytest.mark.parametrize(("op", "call"), ALL, ids=[name for name, _ in ALL])
@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        pytest.param(
            {}, TypeError, "expected weights to be a list of tensors, got dict. Pass list(weights.values()).",
            id="dict",
        ),
        pytest.param(
            [], ValueError,
            "expected weights to hold at least one matrix, got an empty list. Leave the call out.", id="empty_list",
        ),
        pytest.param(
            [W, 3.0], TypeError, "expected weights[1] to be a tensor, got float. Pass the weight itself.",
            id="no_tensor",
        ),
        pytest.param(
            [W.to_sparse()], TypeError,
            "expected weights[0] to be a dense tensor, got a sparse_coo one. Convert it (to_dense, dequantize).",
            id="sparse",
        ),
        pytest.param(
            [W.to(torch.int64)], TypeError,
            "expected weights[0] to be float32, bfloat16, float16 or float64, got torch.int64. "
            "Convert it, or leave it out.", id="int64",
        ),
        pytest.param(
            [W, W.to(torch.complex64)], TypeError,
            "expected weights[1] to be float32, bfloat16, float16 or float64, got torch.complex64. "
            "Convert it, or leave it out.", id="complex",
        ),
        pytest.param(
            [W.to(torch.float8_e4m3fn)], TypeError,
            "expected weights[0] to be float32, bfloat16, float16 or float64, got torch.float8_e4m3fn. "
            "Convert it, or leave it out.", id="float8",
        ),
        pytest.param(
            [V], ValueError,
            "expected weights[0] to have at least 2 dimensions (out, in, ...), got shape (3,). Reshape it to a matrix.",
            id="one_dimension",
        ),
        pytest.param(
            [W, META], ValueError,
            "expected all weights on one device, got cpu and meta (weights[1]). Call once per device.",
            id="two_devices",
        ),
        pytest.param(
            [W, W.double()], TypeError,
            "expected all weights or none to be float64, got torch.float32 and torch.float64 (weights[1]). "
            "Call once for the float64 weights and once for the others.", id="float64_and_float32",
        ),
        pytest.param(
            [W.double(), W.bfloat16()], TypeError,
            "expected all weights or none to be float64, got torch.float64 and torch.bfloat16 (weights[1]). "
            "Call once for the float64 weights and once for the others.", id="bfloat16_and_float64",
        ),
    ],
)  # fmt: skip
def test_weights(op: str, call: Callable[..., Any], weights: Any, error: type[Exception], text: str) -> None:
    with expect(error, f"{op}: {named(op, text)}"):
        call(weights, [V] * len(weights))


@pytest.mark.skipif(not hasattr(torch, "quantize_per_tensor"), reason="this torch has no quantized tensors any more")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor.*deprecated")
@pytest.mark.parametrize(("op", "call"), ALL, ids=[name for name, _ in ALL])
def test_quantized_weights(op: str, call: Callable[..., Any]) -> None:
    text = "expected weights[0] to be a dense tensor, got a quantized one. Convert it (to_dense, dequantize)."
    with expect(TypeError, f"{op}: {named(op, text)}"):
        call([torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)], [V])


@pytest.mark.parametrize(("op", "call"), WARM, ids=[name for name, _ in WARM])
def test_a_tensor_in_place_of_a_list(op: str, call: Callable[..., Any]) -> None:
    with expect(TypeError, f"{op}: expected weights to be a list of tensors, got Tensor. Pass [w] for one matrix."):
        call(W, [V])
    with expect(TypeError, f"{op}: expected v to be a list of tensors, got Tensor. Pass one vector per weight."):
        call([W], V)


@pytest.mark.parametrize(("op", "call"), WARM, ids=[name for name, _ in WARM])
@pytest.mark.parametrize(
    ("weights", "v", "error", "text"),
    [
        pytest.param(
            [W, W], [V], ValueError,
            "expected v to hold one vector per weight (2), got 1. Pass one vector per weight.", id="too_few",
        ),
        pytest.param(
            [W], ["v"], TypeError, "expected v[0] to be a tensor, got str. Pass one vector per weight.", id="no_tensor"
        ),
        pytest.param(
            [W], [torch.ones(4)], ValueError,
            "expected v[0] of shape (3,), got (4,). v has one element per column of its weight.", id="rows_not_columns",
        ),
        pytest.param(
            [torch.ones(2, 3, 5)], [torch.ones(3, 5)], ValueError,
            "expected v[0] of shape (15,), got (3, 5). v has one element per column of its weight.", id="not_flat",
        ),
        pytest.param(
            [W.bfloat16()], [V.bfloat16()], TypeError,
            "expected v[0] to be torch.float32 for a torch.bfloat16 weight, got torch.bfloat16. "
            "Vectors are float32 (float64 for float64 weights).", id="bfloat16",
        ),
        pytest.param(
            [W.double()], [V], TypeError,
            "expected v[0] to be torch.float64 for a torch.float64 weight, got torch.float32. "
            "Vectors are float32 (float64 for float64 weights).", id="float32_for_float64",
        ),
        pytest.param(
            [W, W], [V, torch.ones(3, device="meta")], ValueError,
            "expected v[1] on cpu with its weight, got meta. Move it: v.to(weight.device).", id="device",
        ),
        pytest.param(
            [W], [torch.ones(3, requires_grad=True)], ValueError,
            "expected v[0] without gradient, got requires_grad=True. v is a buffer: pass v.detach().",
            id="requires_grad",
        ),
    ],
)  # fmt: skip
def test_vectors(op: str, call: Callable[..., Any], weights: Any, v: Any, error: type[Exception], text: str) -> None:
    with expect(error, f"{op}: {text}"):
        call(weights, v)


@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one(value: int) -> None:
    for op, name, call in (
        ("power_iteration", "n_iter", lambda: power_iteration([W], [V], n_iter=value)),
        ("spectral_norm", "max_iter", lambda: spectral_norm(W, max_iter=value)),
    ):
        with expect(
            ValueError, f"{op}: expected {name} to be at least 1, got {value}. Pass a whole number of at least 1."
        ):
            call()


@pytest.mark.parametrize(("value", "kind"), [(1.0, "float"), (True, "bool"), ("2", "str"), (None, "NoneType")])
def test_counts_that_are_no_int(value: Any, kind: str) -> None:
    for op, name, call in (
        ("power_iteration", "n_iter", lambda: power_iteration([W], [V], n_iter=value)),
        ("spectral_norm", "max_iter", lambda: spectral_norm(W, max_iter=value)),
    ):
        with expect(TypeError, f"{op}: expected {name} to be an int, got {kind}. Pass a whole number of at least 1."):
            call()


@pytest.mark.parametrize("value", [0.99, 0, -1.0, float("inf"), float("nan")])
def test_exponent_out_of_range(value: float) -> None:
    text = f"spectral_penalty: expected exponent to be finite and at least 1, got {value}. 2.0 is the paper's."
    with expect(ValueError, text):
        spectral_penalty([W], [V], exponent=value)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_target_out_of_range(value: float) -> None:
    text = f"spectral_penalty: expected target to be finite and at least 0, got {value}. 1.0 is the paper's."
    with expect(ValueError, text):
        spectral_penalty([W], [V], target=value)


@pytest.mark.parametrize(("value", "kind"), [(True, "bool"), ("2", "str"), (torch.ones(()), "Tensor")])
def test_exponent_and_target_that_are_no_number(value: Any, kind: str) -> None:
    with expect(TypeError, f"spectral_penalty: expected exponent to be a number, got {kind}. 2.0 is the paper's."):
        spectral_penalty([W], [V], exponent=value)
    with expect(TypeError, f"spectral_penalty: expected target to be a number, got {kind}. 1.0 is the paper's."):
        spectral_penalty([W], [V], target=value)


def test_what_is_accepted_comes_back_as_it_is_used() -> None:
    assert check_exponent("op", 1) == 1.0 and isinstance(check_exponent("op", 2), float)
    assert check_target("op", 0) == 0.0 and isinstance(check_target("op", 0), float)
    assert check_positive_int("op", "n", 1) == 1


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-6, float("nan")])
def test_tol_out_of_range(value: float) -> None:
    with expect(ValueError, f"spectral_norm: expected tol between 0 and 1, got {value}. 1e-6 is the default."):
        spectral_norm(W, tol=value)


@pytest.mark.parametrize(("value", "kind"), [(True, "bool"), ("1e-6", "str"), (None, "NoneType")])
def test_tol_that_is_no_number(value: Any, kind: str) -> None:
    with expect(TypeError, f"spectral_norm: expected tol to be a number, got {kind}. 1e-6 is the default."):
        spectral_norm(W, tol=value)


@pytest.mark.parametrize(
    ("w", "error", "text"),
    [
        (W.int(), TypeError, "expected w to be float32, bfloat16, float16 or float64, got torch.int32. "
                             "Convert it, or leave it out."),
        (W.to_sparse(), TypeError, "expected w to be a dense tensor, got a sparse_coo one. "
                                   "Convert it (to_dense, dequantize)."),
        (V, ValueError, "expected w to have at least 2 dimensions (out, in, ...), got shape (3,). "
                        "Reshape it to a matrix."),
        ("w", TypeError, "expected w to be a list of tensors, got str. Pass [w] for one matrix."),
        (None, TypeError, "expected w to be a list of tensors, got NoneType. Pass [w] for one matrix."),
    ],
    ids=["int32", "sparse", "one_dimension", "str", "none"],
)  # fmt: skip
def test_spectral_norm_of_one(w: Any, error: type[Exception], text: str) -> None:
    with expect(error, f"spectral_norm: {text}"):
        spectral_norm(w)


FORWARD_MODE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "spectral_norm": (lambda w: spectral_norm([W, w]), "w[1]"),
    "spectral_norm_of_one": (spectral_norm, "w"),
    "spectral_penalty": (lambda w: spectral_penalty([W, w], [V.clone(), V.clone()]), "weights[1]"),
    "conv_spectral_norm": (lambda w: conv_spectral_norm(w[:, :, None], 4), "weight"),
    "conv_norm_bound": (lambda w: conv_norm_bound(w[:, :, None], 4).bound, "weight"),
}


@pytest.mark.parametrize("case", FORWARD_MODE)
def test_forward_mode(case: str) -> None:
    """torch takes the tangent of a registered op for none."""
    call, name = FORWARD_MODE[case]
    op = case.removesuffix("_of_one")
    message = f"{op}: expected {name} without a tangent, got one of forward-mode differentiation."
    with expect(NotImplementedError, f"{message} Differentiate by torch.autograd.grad."):
        torch.func.jvp(call, (W,), (W,))
    with forward_ad.dual_level():
        call(W)


# ---- gradients to add into ----


class Held(Tensor):
    """A gradient of W that has no memory of its own."""

    @staticmethod
    def __new__(cls) -> Held:
        return Tensor._make_wrapper_subclass(cls, W.shape, dtype=W.dtype)

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: NotImplemented)


GRADIENTS: list[Any] = [
    pytest.param(
        W, W.to_sparse(), TypeError,
        "expected the gradient of layer.weight to be dense, got a sparse_coo one. "
        "Exclude the parameter, or use an embedding without sparse=True.", id="sparse",
    ),
    pytest.param(
        W, W.int(), TypeError,
        "expected the gradient of layer.weight to be float32, bfloat16 or float16, got torch.int32. Convert it.",
        id="int",
    ),
    pytest.param(
        W, W.double(), TypeError,
        "expected the gradient of layer.weight to be float32, bfloat16 or float16, got torch.float64. Convert it.",
        id="float64_of_float32",
    ),
    pytest.param(
        W.double(), W, TypeError,
        "expected the gradient of layer.weight to be float64, got torch.float32. Convert it.", id="float32_of_float64",
    ),
    pytest.param(
        W, torch.ones(3, 4), ValueError,
        "expected the gradient of layer.weight of shape (4, 3) on cpu, got (3, 4) on cpu. "
        "Set it to None and run backward again.", id="shape",
    ),
    pytest.param(
        W, META, ValueError,
        "expected the gradient of layer.weight of shape (4, 3) on cpu, got (4, 3) on meta. "
        "Set it to None and run backward again.", id="device",
    ),
    pytest.param(
        W, torch.ones(3).expand(4, 3), ValueError,
        "expected the gradient of layer.weight to have memory for every element, got an expanded tensor with strides "
        "(0, 1). Make it contiguous.", id="expanded",
    ),
    pytest.param(
        W, Held(), TypeError,
        "expected the gradient of layer.weight to hold its elements in memory of its own, got a Held. Write "
        "p.grad = torch.zeros_like(p).copy_(p.grad).", id="subclass",
    ),
    pytest.param(
        W, torch._efficientzerotensor((4, 3)), TypeError,
        "expected the gradient of layer.weight to hold its elements in memory of its own, got a ZeroTensor. Write "
        "p.grad = torch.zeros_like(p).copy_(p.grad).", id="zero_tensor",
    ),
]  # fmt: skip


def test_a_gradient_with_the_negative_bit() -> None:
    """Its memory holds the numbers with the other sign."""
    message = "expected the gradient of layer.weight without the negative bit, got one with it."
    with expect(TypeError, f"accumulate_grad_: {message} Write p.grad = p.grad.resolve_neg()."):
        check_gradient("accumulate_grad_", "layer.weight", W, torch.complex(W, W).conj().imag)


def test_gradients_that_are_fine() -> None:
    check_gradient("op", "w", W, W.bfloat16())
    check_gradient("op", "w", W.half(), W.T.contiguous().T)
    check_gradient("op", "w", torch.ones(1, 3), torch.ones(3).expand(1, 3))  # stride 0 over one element
    check_gradient("op", "w", W.double(), W.double())
    check_gradient("op", "w", Held(), Held())  # an op is dispatched to what they hold
    with FakeTensorMode() as mode:
        check_gradient("op", "w", W, mode.from_tensor(W))


@pytest.mark.parametrize(("w", "gradient", "error", "text"), GRADIENTS)
def test_gradients(w: Tensor, gradient: Tensor, error: type[Exception], text: str) -> None:
    with expect(error, f"accumulate_grad_: {text}"):
        check_gradient("accumulate_grad_", "layer.weight", w, gradient)


@pytest.mark.parametrize(("w", "gradient", "error", "text"), GRADIENTS)
@pytest.mark.parametrize("first", ["cold", "after_a_good_one"])
def test_a_refused_gradient_changes_nothing(
    backend: str, first: str, w: Tensor, gradient: Tensor, error: type[Exception], text: str
) -> None:
    """Checked before anything is written, in every backend, whether or not the table was used before."""
    v, exponents, sigma = (
        torch.ones(6, dtype=w.dtype) / 2,
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, dtype=w.dtype),
    )
    table = LayerTable([Layout()] * 2, [1.0] * 2, [1.0] * 2, ["other", "layer.weight"])
    other = torch.zeros_like(w)
    if first == "after_a_good_one":
        accumulate_grad([other, torch.zeros_like(w)], [w, w], v, exponents, sigma, table, 2.0, 0.1)
    kept = [x.clone() for x in (v, exponents, sigma, other)]
    with expect(error, f"accumulate_grad_: {text}"):
        accumulate_grad([other, gradient], [w, w], v, exponents, sigma, table, 2.0, 0.1)
    for x, y in zip((v, exponents, sigma, other), kept, strict=True):
        assert torch.equal(x, y)


# ---- the compiled module ----


def test_the_table_refuses_what_python_would_never_send() -> None:
    native = pytest.importorskip("spectral_ops._native")
    row = (0, 0, 1.0, 1.0, [1, 4, 3], [12, 3, 1], 0, [], 0, 0, 0)
    with pytest.raises(ValueError, match="^Table: expected sizes and strides of one length"):
        native.Table([(*row[:5], [3, 1], *row[6:])])
    with pytest.raises(ValueError, match="^Table: expected sizes and strides of one length"):
        native.Table([(*row[:7], [3, 1], *row[8:])])
    with pytest.raises(ValueError, match="^Table: expected all float64 or none, got both"):
        native.Table([row, (0, 1, *row[2:])])
    with pytest.raises(ValueError, match=r"^Table: expected fewer than 2\^31 columns"):
        native.Table([(*row[:4], [1, 1, 2**31], [2**31, 2**31, 1], *row[6:])])
    table = native.Table([row])
    with pytest.raises(ValueError, match="^Table: expected one address per item"):
        table.step([], [], *[0] * 7, 2.0, 1.0, 1.0, 1, 1)
    with pytest.raises(ValueError, match="^Table: expected one address per item"):
        table.step([1], [1, 2], *[0] * 7, 2.0, 1.0, 1.0, 1, 1)
    with pytest.raises(ValueError, match="^Table: expected one address per item"):
        table.backward([1], [], 0, 0, 0, 2.0, 1.0, False, 1)
    with pytest.raises(ValueError, match="^Table: expected one address per item"):
        table.spectral_norm([], 0, 0, 0, 0, 0, 1e-6, 10, 1)
