"""strength * dR/dtheta added straight into gradients, together with the warm step: what a training loop calls.

A mutating op without autograd. Bytes: every weight read once, every gradient read and written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.layer_table import LayerTable, layer_table
from spectral_ops.ops.layout import Layout, as_matrices
from spectral_ops.ops.registry import define, without_autocast
from spectral_ops.ops.snapshot import Addresses
from spectral_ops.ops.spectral_penalty import gradients_ref, penalty_ref
from spectral_ops.ops.state import State

NO_ADDRESS = bytes(8)


def accumulate_grad(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    v: Tensor,
    exponents: Tensor,
    sigma: Tensor,
    table: LayerTable,
    exponent: float,
    strength: float | Tensor,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    addresses: Addresses | None = None,
) -> Tensor:
    """strength * R (0-d); gradients += strength * grad_scale * dR/dW; v, exponents and sigma become the next ones.

    Where found_inf is not 0 nothing is changed, as the optimizer will skip its step. No sync with the host on CUDA.
    addresses: of the weights, where the caller has just compared them with the ones that the table was made for.
    """
    backend = backends.choose(v.device, backends.op_name("accumulate_grad_", table.has_operators), v.dtype)
    launcher = table.launcher(backend, v.device)
    if launcher is not None:
        state = State(v, v, exponents, exponents, sigma, None)
        value = launcher.step(weights, gradients, state, exponent, strength, grad_scale, found_inf, addresses=addresses)
        torch.autograd.graph.increment_version(gradients)  # whether or not found_inf skips it, which only it knows
        return value
    if backend == "reference":
        table.check_gradients(weights, gradients)
        return accumulate_grad_ref(
            gradients,
            weights,
            v,
            exponents,
            sigma,
            table.layouts,
            table.targets,
            table.scales,
            exponent,
            strength,
            grad_scale,
            found_inf,
        )
    # Everything below is on the CPU, where reading a scalar waits for nothing.
    factor = float(strength)
    scaled = factor if grad_scale is None else factor * float(grad_scale)
    value = v.new_empty(())
    skipped = found_inf is not None and found_inf.item() != 0
    work = table.native.at(weights, () if skipped else gradients, addresses)
    if work.gradients and (NO_ADDRESS if isinstance(work.gradients, bytes) else 0) in work.gradients:
        # Nothing would be added. Empty ones have none either; a ZeroTensor looks as the last gradient did.
        table.check_gradients(weights, gradients)
    v_out, exponents_out, sigma_out = (
        (torch.empty_like(x) for x in (v, exponents, sigma)) if skipped else (v, exponents, sigma)
    )
    work.table.step(
        work.weights,
        work.gradients,
        v.data_ptr(),
        v_out.data_ptr(),
        exponents.data_ptr(),
        exponents_out.data_ptr(),
        sigma_out.data_ptr(),
        0,
        value.data_ptr(),
        exponent,
        factor,
        scaled,
        1,
        torch.get_num_threads(),
    )
    if not skipped:
        # Written past torch: what autograd has saved of them is out of date.
        torch.autograd.graph.increment_version(gradients)
    return value


@torch.no_grad()
@without_autocast
def accumulate_grad_ref(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    v: Tensor,
    exponents: Tensor,
    sigma: Tensor,
    layouts: Sequence[Layout],
    targets: Sequence[float],
    scales: Sequence[float],
    exponent: float,
    strength: float | Tensor,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, on any device, without a sync."""
    weights = [w.detach() for w in weights]
    value, new_sigma, u, v_new, new_exponents = penalty_ref(weights, v, exponents, layouts, targets, scales, exponent)
    factor = strength if grad_scale is None else strength * grad_scale
    found = gradients_ref(weights, new_sigma, u, v_new, layouts, targets, scales, exponent)
    for store, gradient, layout in zip(gradients, found, layouts, strict=True):
        added = factor * gradient
        if found_inf is not None:
            added = torch.where(found_inf != 0, 0.0, added)
        view = as_matrices(store, layout)
        view.copy_(view.to(v.dtype) + added)  # rounded once to the gradient's dtype
    for store, new in ((v, v_new), (exponents, new_exponents), (sigma, new_sigma)):
        store.copy_(new if found_inf is None else torch.where(found_inf != 0, store, new))
    return torch.as_tensor(strength * value, dtype=v.dtype)


# ---- the registered op ----


def _accumulate(
    gradients: list[Tensor],
    weights: list[Tensor],
    v: Tensor,
    exponents: Tensor,
    sigma: Tensor,
    layouts: str,
    targets: list[float],
    scales: list[float],
    exponent: float,
    strength: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    table = layer_table(layouts, targets, scales, weights)
    return accumulate_grad(gradients, weights, v, exponents, sigma, table, exponent, strength, grad_scale, found_inf)


def _accumulate_fake(gradients: list[Tensor], weights: list[Tensor], v: Tensor, *others: Any) -> Tensor:
    return v.new_empty(())


define(
    "accumulate_grad_(Tensor(a!)[] gradients, Tensor[] weights, Tensor(b!) v, Tensor(c!) exponents, Tensor(d!) sigma,"
    " str layouts, float[] targets, float[] scales, float exponent, Tensor strength, Tensor? grad_scale,"
    " Tensor? found_inf) -> Tensor",
    _accumulate,
    fake=_accumulate_fake,
)
