"""The optimizer step in plain torch, on any device, without a sync: the oracle of the compiled ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectral_ops.ops.adamw_state import Hyper, Options, Spectrum, Tensors
from spectral_ops.ops.layout import Kind, as_matrices, sizes, vector_dtype
from spectral_ops.ops.power_iteration import lowbias32, steps_ref
from spectral_ops.ops.registry import without_autocast
from spectral_ops.ops.spectral_penalty import gradient_ref, vector_penalty_ref

if TYPE_CHECKING:
    from spectral_ops.ops.layer_table import LayerTable

FACTOR = 0x9E3779B9  # 2^32 / golden ratio: neighbouring counters land far apart


@without_autocast
def adamw_step_ref(
    tensors: Tensors,
    spectrum: Spectrum,
    table: LayerTable,
    group_of: Sequence[int],
    hyper: Sequence[Hyper],
    options: Options,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """`adamw_step` in plain torch."""
    old = list(spectrum)

    def commit(store: Tensor, new: Tensor) -> None:
        store.copy_(new if found_inf is None else torch.where((found_inf != 0).to(store.device), store, new))

    frozen = Spectrum(*(x.clone() for x in old))
    for i, penalty in enumerate(penalty_gradients_ref(tensors.weights, frozen, table, group_of, hyper, options)):
        if penalty is not None or tensors.gradients[i] is not None:
            _update(i, tensors, penalty, table, hyper[group_of[i]], options, grad_scale, commit)
    weights = [w.detach() for w in tensors.weights]
    sigma, u, v, exponents = steps_ref(weights, old[0], old[2], table.layouts, 1)
    for store, new in zip(spectrum, (v, u, exponents, sigma), strict=True):
        commit(store, new)
    return value_ref(tensors.weights, spectrum.sigma, table, group_of, hyper, options)


def penalty_gradients_ref(
    weights: Sequence[Tensor],
    spectrum: Spectrum,
    table: LayerTable,
    group_of: Sequence[int],
    hyper: Sequence[Hyper],
    options: Options,
) -> Iterator[Tensor | None]:
    """strength * dR/dw of one weight after the other, of the shape its layout is read in; None of a plain one."""
    at_u = at_v = at = 0
    for i, (w, layout) in enumerate(zip(weights, table.layouts, strict=True)):
        if layout.kind == Kind.PLAIN:
            yield None
            continue
        parts, m, n = sizes(w.shape, layout) if layout.is_matrix else (0, 0, 0)
        gradient = gradient_ref(
            w.detach(),
            layout,
            spectrum.sigma[at : at + parts],
            spectrum.u[at_u : at_u + parts * m],
            spectrum.v[at_v : at_v + parts * n],
            options.exponent,
            table.targets[i],
        )
        at, at_u, at_v = at + parts, at_u + parts * m, at_v + parts * n
        yield gradient.mul_(table.scales[i]).mul_(hyper[group_of[i]].strength)  # in place: new memory is what costs


def value_ref(
    weights: Sequence[Tensor],
    sigma: Tensor,
    table: LayerTable,
    group_of: Sequence[int],
    hyper: Sequence[Hyper],
    options: Options,
) -> Tensor:
    """strength * R of weights whose sigma is known."""
    total = sigma.new_zeros(())
    at = 0
    for i, (w, layout) in enumerate(zip(weights, table.layouts, strict=True)):
        if layout.kind == Kind.PLAIN:
            continue
        if layout.is_matrix:
            parts, m, n = sizes(w.shape, layout)
            here = sigma[at : at + parts]
            at += parts
            if m == 0 or n == 0:  # counts for nothing
                continue
            term = ((here**options.exponent - table.targets[i] ** options.exponent) ** 2).sum()
        else:
            x = as_matrices(w.detach(), layout).reshape(layout.parts, -1).to(sigma.dtype)
            term = vector_penalty_ref(x, layout.kind, options.exponent, table.targets[i])
        total = total + hyper[group_of[i]].strength * table.scales[i] * term
    return total.to(sigma.dtype)


def _update(
    i: int,
    tensors: Tensors,
    penalty: Tensor | None,
    table: LayerTable,
    h: Hyper,
    options: Options,
    grad_scale: float | Tensor | None,
    commit: Any,
) -> None:
    """csrc/adamw_kernels.cpp has the formula and its order."""
    layout = table.layouts[i]
    w, gradient = as_matrices(tensors.weights[i].detach(), layout), tensors.gradients[i]
    master = tensors.masters[i] if tensors.masters else None
    step = tensors.steps[i] + 1
    # Corrections and the like in float64, where they cost nothing.
    t = step.to(w.device, torch.float64)
    dtype = vector_dtype(w.dtype)
    g = torch.zeros_like(w, dtype=dtype) if gradient is None else as_matrices(gradient, layout).to(dtype)
    if grad_scale is not None:
        g = g * (1 / grad_scale)
    if options.maximize:
        g = -g
    new = w.to(dtype) if master is None else as_matrices(master, layout)
    if penalty is not None and not options.decoupled:
        g = g + penalty
    new = new * (1 - h.lr * h.weight_decay)
    if penalty is not None and options.decoupled:
        new = new - h.lr * penalty
    exp_avg, exp_avg_sq = (as_matrices(x[i], layout) for x in (tensors.exp_avgs, tensors.exp_avg_sqs))
    m = exp_avg + (1 - h.beta1) * (g - exp_avg)
    s = h.beta2 * exp_avg_sq + (1 - h.beta2) * g * g
    top = s
    if options.amsgrad:
        highest = as_matrices(tensors.max_exp_avg_sqs[i], layout)
        top = torch.maximum(highest, s)
        commit(highest, top)
    new = new - h.lr / (1 - h.beta1**t) * m / (top.sqrt() / (1 - h.beta2**t).sqrt() + h.eps)
    commit(exp_avg, m)
    commit(exp_avg_sq, s)
    if master is not None:
        commit(as_matrices(master, layout), new)
    elif options.stochastic_rounding and w.dtype == torch.bfloat16:
        new = round_by_chance(new, w, options.seed, i, step)
    commit(w, new.to(w.dtype))
    commit(tensors.steps[i], step)


def round_by_chance(x: Tensor, w: Tensor, seed: int, number: int, step: Tensor) -> Tensor:
    """x (float32) rounded to a bfloat16 below or above, with the probability that it lies that near.

    The bits are a hash of the seed, the parameter's number in the call, the step, and where in memory, from the
    parameter's first element on, w has the element: every backend draws the same.
    """
    place = torch.zeros(w.shape, dtype=torch.int64, device=w.device)
    for dim, (size, stride) in enumerate(zip(w.shape, w.stride(), strict=True)):
        along = torch.arange(size, device=w.device) * stride
        place += along.view([-1 if d == dim else 1 for d in range(w.ndim)])
    key = lowbias32(torch.tensor((seed + number) & 0xFFFFFFFF, device=w.device))
    key = lowbias32((key + step.to(w.device, torch.int64)) & 0xFFFFFFFF)
    low = (place & 0xFFFF) * FACTOR + ((((place >> 16) & 0xFFFF) * FACTOR) & 0xFFFF) * 65536
    random = lowbias32((low + key) & 0xFFFFFFFF) >> 16
    bits = x.float().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    added = bits + random
    overflows = (added & 0x7F800000) == 0x7F800000  # what is finite stays so
    cut = torch.where(overflows, bits, added) & 0xFFFF0000
    cut = torch.where(cut >= 1 << 31, cut - (1 << 32), cut).to(torch.int32).view(torch.float32)
    return torch.where(x.isfinite(), cut, x)
