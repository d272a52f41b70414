"""Argument checks shared by the public ops. Every message: what was expected, what came, the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spectral_ops.ops.dtensor import is_dtensor
from spectral_ops.ops.layout import vector_dtype
from spectral_ops.ops.snapshot import has_memory

LARGEST_INT = 2**31 - 1  # csrc and kernels count in int32
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_weight(op: str, name: str, w: Tensor) -> None:
    """A dense real floating-point tensor of a dtype the ops read."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(w).__name__}. Pass the weight itself.")
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


def check_matrices(op: str, weights: Sequence[Tensor]) -> None:
    """A non-empty list of matrices (out, ...), on one device, all float64 or none."""
    if isinstance(weights, Tensor) or not isinstance(weights, (list, tuple)):
        raise TypeError(
            f"{op}: expected weights to be a list of tensors, got {type(weights).__name__}. Pass [w] for one matrix."
        )
    if len(weights) == 0:
        raise ValueError(f"{op}: expected weights to hold at least one matrix, got an empty list. Leave the call out.")
    for i, w in enumerate(weights):
        check_weight(op, f"weights[{i}]", w)
        if w.ndim < 2:
            raise ValueError(
                f"{op}: expected weights[{i}] to have at least 2 dimensions (out, in, ...), got shape "
                f"{tuple(w.shape)}. "
                "Reshape it to a matrix."
            )
        if w.device != weights[0].device:
            raise ValueError(
                f"{op}: expected all weights on one device, got {weights[0].device} and {w.device} (weights[{i}]). "
                "Call once per device."
            )
        if vector_dtype(w.dtype) != vector_dtype(weights[0].dtype):
            raise TypeError(
                f"{op}: expected all weights or none to be float64, got {weights[0].dtype} and {w.dtype} "
                f"(weights[{i}]). "
                "Call once for the float64 weights and once for the others."
            )


def check_no_tangent(op: str, weights: Sequence[Tensor], name: str | None = None) -> None:
    """No weight under forward-mode differentiation: torch would take the derivative of a registered op for zero.

    name: that of a single weight.
    """
    if forward_ad._current_level < 0:  # outside of any, as nearly always
        return
    for i, w in enumerate(weights):
        if forward_ad.unpack_dual(w).tangent is not None:
            raise NotImplementedError(
                f"{op}: expected {name or f'weights[{i}]'} without a tangent, got one of forward-mode differentiation. "
                "Differentiate by torch.autograd.grad."
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


def _is_real(x: object) -> bool:
    """Whether it is a number, numpy's among them. Written so that the compiler can trace it."""
    return (isinstance(x, (int, float)) or isinstance(x, numbers.Real)) and not isinstance(x, bool)


def check_exponent(op: str, exponent: float) -> float:
    if not _is_real(exponent):
        raise TypeError(f"{op}: expected exponent to be a number, got {type(exponent).__name__}. 2.0 is the paper's.")
    if not 1 <= exponent < math.inf:  # compared and not asked of math, which the compiler cannot trace
        raise ValueError(f"{op}: expected exponent to be finite and at least 1, got {exponent}. 2.0 is the paper's.")
    return float(exponent)


def check_target(op: str, target: float) -> float:
    if not _is_real(target):
        raise TypeError(f"{op}: expected target to be a number, got {type(target).__name__}. 1.0 is the paper's.")
    if not 0 <= target < math.inf:
        raise ValueError(f"{op}: expected target to be finite and at least 0, got {target}. 1.0 is the paper's.")
    return float(target)


def check_tol(op: str, tol: float) -> float:
    if not _is_real(tol):
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
    if kept_elsewhere or gradient._is_zerotensor():
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
