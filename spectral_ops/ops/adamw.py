"""AdamW with the penalty folded in: the pass over the weights also reads sigma, u and v of the new ones.

A mutating op without autograd. Bytes: every weight and moment read and written once, every gradient read once: what the
optimizer step moves without a penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.adamw_lists import by_address
from spectral_ops.ops.adamw_ref import adamw_step_ref, value_ref
from spectral_ops.ops.adamw_state import Hyper, Options, Spectrum, Tensors, check_tensors
from spectral_ops.ops.layer_table import LayerTable


def adamw_step(
    tensors: Tensors,
    spectrum: Spectrum,
    table: LayerTable,
    group_of: Sequence[int],
    hyper: Sequence[Hyper],
    options: Options,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """strength * R (0-d) of the weights after the step; weights, moments, steps and spectrum become the next ones.

    Where found_inf is not 0 nothing is changed. No sync with the host on CUDA.

    Args:
        tensors: weights, gradients and state by parameter, on one device, all float64 or none.
        spectrum: of the weights as they are: what the last step left, or a priming read.
        table: of these parameters, in this order.
        group_of: of every parameter, its place in hyper.
        hyper: numbers of every parameter group.
        grad_scale: what gradients are divided by.
        backend: what `choose_backend` returned; None: it is asked here.

    Raises:
        TypeError, ValueError: a gradient or a state that does not fit its parameter, before anything is changed.
    """
    if backend is None:
        backend = choose_backend(spectrum.v, by_address(tensors))
    if backend == "native":
        # On the CPU, where reading a scalar waits for nothing.
        if found_inf is not None and found_inf.item() != 0:
            return value_ref(tensors.weights, spectrum.sigma, table, group_of, hyper, options)
        scale = 1.0 if grad_scale is None else float(grad_scale)
        return table.native_adamw.step(tensors, spectrum, group_of, hyper, options, scale)
    if backend == "triton":
        return table.triton_adamw.step_adamw(tensors, spectrum, group_of, hyper, options, grad_scale, found_inf)
    check_tensors(table.names, tensors)
    return adamw_step_ref(tensors, spectrum, table, group_of, hyper, options, grad_scale, found_inf)


def choose_backend(v: Tensor, addressed: bool) -> str:
    """What runs a step: the reference, whatever is asked for, where kernels cannot be handed addresses.

    That is where a tensor lies elsewhere or nowhere, as a fake one, and under a dispatch mode, which must see every op.

    Args:
        v: the spectrum's.
        addressed: `by_address` of the tensors.
    """
    backend = backends.choose(v.device, "adamw_step", v.dtype)
    return backend if addressed and torch._C._len_torch_dispatch_stack() == 0 else "reference"


def adamw_step_again(
    backend: str,
    addresses: bytes,
    weights: list[Tensor],
    spectrum: Spectrum,
    table: LayerTable,
    group_of: Sequence[int],
    hyper: Sequence[Hyper],
    options: Options,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """`adamw_step` on tensors that look as those of the last one, by the same backend: nothing is looked at again.

    Args:
        backend: that took the last step: native or triton.
        addresses: int64, a row for each of weights, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps,
            by parameter; 0 where there is none.
    """
    if backend == "triton":
        step = table.triton_adamw.step_again
        return step(addresses, weights, spectrum, hyper, options, grad_scale, found_inf)
    if found_inf is not None and found_inf.item() != 0:
        return value_ref(weights, spectrum.sigma, table, group_of, hyper, options)
    scale = 1.0 if grad_scale is None else float(grad_scale)
    return table.native_adamw.step_again(addresses, weights, spectrum, group_of, hyper, options, scale)
