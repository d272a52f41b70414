"""Argument checks shared by the public ops. Every message: what was expected, what came, the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spectral_ops.ops.dtensor import is_dtensor
from spectral_ops.ops.layout import vector_dtype
from spectral_ops.ops.snapshot import PLAIN, has_memory

LARGEST_INT = 2**31 - 1  # csrc and kernels count in int32
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_weight(op: str, name: str, w: Tensor) -> None:
    """A dense real floating-point tensor of a dtype the ops read."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(w).__name__}. Pass the weight itself.")
    if not torch.compiler.is_compiling() and is_dtensor(w):
        raise TypeError(
            f"{op}: expected {name} to be a plain tensor, got a DTensor. Pass its full_tensor(), or take "
            "SpectralRegularizer or SpectralAdamW, which read shards."
        )
    if w.is_nested:
        raise TypeError(f"{op}: expected {name} to be one tensor, got a nested one. Pass a list: unbind() makes one.")
    if w.layout != torch.strided or w.is_quantized:
        kind = "quantized" if w.is_quantized else str(w.layout).removeprefix("torch.")
        raise TypeError(
            f"{op}: expected {name} to be a dense tensor, got a {kind} one. Convert it (to_dense, dequantize)."
        )
    if w.dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"{op}: expected {name} to be float32, bfloat16, float16 or float64, got {w.dtype}. "
            "Convert it, or leave it out."
        )


def check_matrices(op: str, weights: Sequence[Tensor], name: str = "weights", *, single: bool = False) -> None:
    """A non-empty list of matrices (out, ...), on one device, all float64 or none.

    single: whether it holds the one tensor that the caller was given as `name`.
    """
    if isinstance(weights, Tensor) or not isinstance(weights, (list, tuple)):
        raise TypeError(
            f"{op}: expected {name} to be a list of tensors, got {type(weights).__name__}. {_as_list(weights, name)}"
        )
    if len(weights) == 0:
        raise ValueError(f"{op}: expected {name} to hold at least one matrix, got an empty list. Leave the call out.")
    for i, w in enumerate(weights):
        each = name if single else f"{name}[{i}]"
        check_weight(op, each, w)
        if w.ndim < 2:
            raise ValueError(
                f"{op}: expected {each} to have at least 2 dimensions (out, in, ...), got shape {tuple(w.shape)}. "
                "Reshape it to a matrix."
            )
        if w.device != weights[0].device:
            raise ValueError(
                f"{op}: expected all weights on one device, got {weights[0].device} and {w.device} ({each}). "
                "Call once per device."
            )
        if vector_dtype(w.dtype) != vector_dtype(weights[0].dtype):
            raise TypeError(
                f"{op}: expected all weights or none to be float64, got {weights[0].dtype} and {w.dtype} "
                f"({each}). Call once for the float64 weights and once for the others."
            )


def _as_list(weights: object, name: str) -> str:
    """What to write in place of what is no list."""
    if isinstance(weights, Mapping):
        return f"Pass list({name}.values())."
    if hasattr(weights, "__array__") and not isinstance(weights, Tensor):
        return f"Pass [torch.as_tensor({name})] for one matrix."
    if isinstance(weights, Iterable) and not isinstance(weights, (Tensor, str, bytes)):
        return f"Pass list({name})."
    return "Pass [w] for one matrix."


def check_no_transform(op: str, tensors: Sequence[Tensor], name: str = "weights", *, single: bool = False) -> None:
    """None under forward-mode differentiation or a transform of torch.func.

    torch would take the derivative of a registered op for zero, or refuse it by what it lacks.
    """
    if forward_ad._current_level >= 0:  # outside of any, as nearly always, nothing is looked at
        for i, x in enumerate(tensors):
            if forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(
                    f"{op}: expected {name if single else f'{name}[{i}]'} without a tangent, got one of forward-mode "
                    "differentiation. Differentiate by torch.autograd.grad."
                )
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    for i, x in enumerate(tensors):
        each = name if single else f"{name}[{i}]"
        # Inside of a transform every tensor that was made there is of this kind, differentiated or not.
        if torch._C._functorch.is_gradtrackingtensor(x) and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{op}: expected {each} outside of torch.func, got one that grad, vjp or jacrev differentiates in. "
                "Differentiate by torch.autograd.grad."
            )
        _check_not_batched(op, each, x)


def check_no_batch(op: str, tensors: Sequence[Tensor], name: str) -> None:
    """None under vmap, for an op without a derivative, which may stand inside of what is differentiated."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        for i, x in enumerate(tensors):
            _check_not_batched(op, f"{name}[{i}]", x)


def _check_not_batched(op: str, name: str, x: Tensor) -> None:
    if torch._C._functorch.is_batchedtensor(x):
        raise NotImplementedError(
            f"{op}: expected {name} outside of vmap, got a batch of them. Call it with a list of matrices."
        )


def check_upstream(op: str, upstream: Tensor) -> None:
    """Not several at once, which torch hands down by vmap, or by an older one of its own."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_batchedtensor(upstream) or torch._C._functorch.is_legacy_batchedtensor(upstream):
        raise NotImplementedError(
            f"{op}: expected one gradient of its result at a time, got a batch of them. Leave is_grads_batched, "
            "vectorize and vmap out."
        )


def check_vectors(op: str, weights: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """One v of shape (n,) per weight, in the vector dtype, beside its weight."""
    if isinstance(v, Tensor) or not isinstance(v, (list, tuple)):
        raise TypeError(
            f"{op}: expected v to be a list of tensors, got {type(v).__name__}. Pass one vector per weight."
        )
    if len(v) != len(weights):
        raise ValueError(
            f"{op}: expected v to hold one vector per weight ({len(weights)}), got {len(v)}. Pass one vector per "
            "weight."
        )
    for i, (w, x) in enumerate(zip(weights, v, strict=True)):
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{op}: expected v[{i}] to be a tensor, got {type(x).__name__}. Pass one vector per weight."
            )
        if x.layout != torch.strided:
            kind = str(x.layout).removeprefix("torch.")
            raise TypeError(f"{op}: expected v[{i}] to be dense, got a {kind} one. Keep v.to_dense().")
        n = math.prod(w.shape[1:])
        if x.shape != (n,):
            raise ValueError(
                f"{op}: expected v[{i}] of shape ({n},), got {tuple(x.shape)}. v has one element per column of its "
                "weight."
            )
        if x.dtype != vector_dtype(w.dtype):
            raise TypeError(
                f"{op}: expected v[{i}] to be {vector_dtype(w.dtype)} for a {w.dtype} weight, got {x.dtype}. "
                "Vectors are float32 (float64 for float64 weights)."
            )
        if x.device != w.device:
            raise ValueError(
                f"{op}: expected v[{i}] on {w.device} with its weight, got {x.device}. Move it: v.to(weight.device)."
            )
        if x.requires_grad:
            raise ValueError(
                f"{op}: expected v[{i}] without gradient, got requires_grad=True. v is a buffer: pass v.detach()."
            )
    if not torch.compiler.is_compiling():
        _check_writable(op, v)


def _check_writable(op: str, v: Sequence[Tensor]) -> None:
    """Raises for what torch would refuse to write to, in words of its own and after others were written."""
    outside = not torch.is_inference_mode_enabled()
    for i, x in enumerate(v):
        if x.is_neg() or not x.is_contiguous() or (outside and x.is_inference()) or x._is_zerotensor():
            _refuse_unwritable(op, f"v[{i}]", x)
    if len(v) == 1 or torch._C._functorch.peek_interpreter_stack() is not None:
        return
    # Of a subclass, as a fake one, the address may not be asked for.
    places = [x.data_ptr() if type(x) in PLAIN else id(x) for x in v]
    if len(set(places)) < len(places):
        for i, (x, place) in enumerate(zip(v, places, strict=True)):
            first = places.index(place)
            if first < i and (x is v[first] or place != 0) and x.shape[0] > 0:  # 0 on meta
                raise ValueError(
                    f"{op}: expected vectors of their own for every weight, got the same memory as v[{first}] and "
                    f"v[{i}]. Keep a clone() for each."
                )


def _refuse_unwritable(op: str, name: str, x: Tensor) -> None:
    if x.is_neg():
        raise TypeError(f"{op}: expected {name} without the negative bit, got one with it. Keep v.resolve_neg().")
    if x._is_zerotensor():
        raise TypeError(f"{op}: expected {name} to have memory, got a ZeroTensor. Keep v.clone().")
    if x.stride(0) == 0:
        raise ValueError(
            f"{op}: expected {name} to have memory for every element, got an expanded tensor. Keep v.contiguous()."
        )
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{op}: expected {name} to be a tensor that can be written outside of torch.inference_mode(), got one "
            "made inside. Keep v.clone()."
        )


def is_real(x: object) -> bool:
    """Whether it is a number, numpy's among them. Written so that the compiler can trace it."""
    return (isinstance(x, (int, float)) or isinstance(x, numbers.Real)) and not isinstance(x, bool)


def check_exponent(op: str, exponent: float) -> float:
    if not is_real(exponent):
        raise TypeError(f"{op}: expected exponent to be a number, got {type(exponent).__name__}. 2.0 is the paper's.")
    if not 1 <= exponent < math.inf:  # compared and not asked of math, which the compiler cannot trace
        raise ValueError(f"{op}: expected exponent to be finite and at least 1, got {exponent}. 2.0 is the paper's.")
    return float(exponent)


def check_target(op: str, target: float) -> float:
    if not is_real(target):
        raise TypeError(f"{op}: expected target to be a number, got {type(target).__name__}. 1.0 is the paper's.")
    if not 0 <= target < math.inf:
        raise ValueError(f"{op}: expected target to be finite and at least 0, got {target}. 1.0 is the paper's.")
    return float(target)


def check_tol(op: str, tol: float) -> float:
    if not is_real(tol):
        raise TypeError(f"{op}: expected tol to be a number, got {type(tol).__name__}. 1e-6 is the default.")
    if not 0 < tol < 1:
        raise ValueError(f"{op}: expected tol between 0 and 1, got {tol}. 1e-6 is the default.")
    return float(tol)


def check_positive_int(op: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not (isinstance(value, int) or isinstance(value, numbers.Integral)):
        raise TypeError(
            f"{op}: expected {name} to be an int, got {type(value).__name__}. Pass a whole number of at least 1."
        )
    if value < 1:
        raise ValueError(f"{op}: expected {name} to be at least 1, got {value}. Pass a whole number of at least 1.")
    if value > LARGEST_INT:
        raise ValueError(f"{op}: expected {name} to be at most {LARGEST_INT}, got {value}. Pass a smaller number.")
    return int(value)


def check_gradient(op: str, name: str, w: Tensor, gradient: Tensor, *, written: bool = True) -> None:
    """A dense floating-point gradient of its weight's shape and device; no two elements in one place, if written.

    Of sharded weights and gradients the local tensors; a DTensor by itself has no memory to write to.
    """
    if is_dtensor(gradient):
        raise TypeError(
            f"{op}: expected the gradient of {name} to be a plain tensor, as its weight is, got a DTensor. Write "
            "p.grad = p.grad.full_tensor() before this call."
        )
    if gradient.layout != torch.strided:
        raise TypeError(
            f"{op}: expected the gradient of {name} to be dense, got a {str(gradient.layout).removeprefix('torch.')} "
            "one. "
            "Exclude the parameter, or use an embedding without sparse=True."
        )
    if gradient.is_neg():  # as z.conj().imag is: its memory holds the numbers with the other sign
        raise TypeError(
            f"{op}: expected the gradient of {name} without the negative bit, got one with it. Write p.grad = "
            "p.grad.resolve_neg()."
        )
    # Of a weight that has none itself an op is dispatched, and under a mode, as of fake tensors, everything is.
    kept_elsewhere = not has_memory(gradient) and has_memory(w) and torch._C._len_torch_dispatch_stack() == 0
    if written and (kept_elsewhere or gradient._is_zerotensor()):
        kind = "ZeroTensor" if gradient._is_zerotensor() else type(gradient).__name__
        raise TypeError(
            f"{op}: expected the gradient of {name} to hold its elements in memory of its own, got a {kind}. Write "
            "p.grad = torch.zeros_like(p).copy_(p.grad)."
        )
    if gradient.dtype not in WEIGHT_DTYPES or (gradient.dtype == torch.float64) != (w.dtype == torch.float64):
        raise TypeError(
            f"{op}: expected the gradient of {name} to be "
            f"{'float64' if w.dtype == torch.float64 else 'float32, bfloat16 or float16'}, "
            f"got {gradient.dtype}. Convert it."
        )
    if gradient.shape != w.shape or gradient.device != w.device:
        raise ValueError(
            f"{op}: expected the gradient of {name} of shape {tuple(w.shape)} on {w.device}, got "
            f"{tuple(gradient.shape)} on "
            f"{gradient.device}. Set it to None and run backward again."
        )
    shared = any(stride == 0 and size > 1 for stride, size in zip(gradient.stride(), gradient.shape, strict=True))
    if shared and written:
        raise ValueError(
            f"{op}: expected the gradient of {name} to have memory for every element, got an expanded tensor with "
            "strides "
            f"{gradient.stride()}. Make it contiguous."
        )
