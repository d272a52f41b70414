"""The penalty as a loss term in an eager step: straight to the compiled kernels, and the state advanced by them.

Equivalent to the registered op and a commit of what it returns, with its bits, but without the dispatcher: lists of
tensors go through it one by one, in Python, twice (MLP of six parameters, forward and backward: 393 us, against 195 for
this, EPYC 9004, 2026-11). The compiler traces the registered op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import pack
from spectral_ops.ops.state import State


class WarmStep(NamedTuple):
    """One differentiable step on flat buffers, which become those of the next step where advance is set."""

    backend: str  # native or triton
    table: LayerTable
    v: Tensor
    exponents: Tensor
    sigma: Tensor
    rows: int  # of all matrices
    exponent: float
    advance: bool


class Kept(NamedTuple):
    """What backward needs: a later step overwrites the state."""

    sigma: Tensor
    u: Tensor
    v: Tensor


def eager_penalty(step: WarmStep, weights: Sequence[Tensor]) -> Tensor:
    """R, differentiable."""
    if torch.is_grad_enabled():
        return cast(Tensor, _EagerPenalty.apply(step, *weights))
    return take(step, weights)[0]


def take(step: WarmStep, weights: Sequence[Tensor]) -> tuple[Tensor, Kept]:
    """R and the step's vectors, not differentiable."""
    v = step.v
    kept = Kept(torch.empty_like(step.sigma), v.new_empty(step.rows), torch.empty_like(v))
    exponents = step.exponents if step.advance else torch.empty_like(step.exponents)
    launcher = step.table.launcher(step.backend, v.device)
    if launcher is not None:
        state = State(v, kept.v, step.exponents, exponents, kept.sigma, kept.u)
        commit = step.sigma if step.advance else None
        return launcher.step(weights, (), state, step.exponent, sigma_state=commit), kept
    work, value = step.table.native.at(weights), v.new_empty(())
    work.table.step(
        work.weights,
        (),
        v.data_ptr(),
        kept.v.data_ptr(),
        step.exponents.data_ptr(),
        exponents.data_ptr(),
        kept.sigma.data_ptr(),
        kept.u.data_ptr(),
        value.data_ptr(),
        step.exponent,
        1.0,
        1.0,
        1,
        torch.get_num_threads(),
    )
    if step.advance:
        step.sigma.copy_(kept.sigma)
        v.copy_(kept.v)
    return value, kept


class _EagerPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: WarmStep, *weights: Tensor) -> Tensor:
        value, kept = take(step, weights)
        ctx.step = step
        ctx.save_for_backward(*weights, *kept)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        step, saved = ctx.step, ctx.saved_tensors
        weights, kept, table = saved[:-3], Kept(*saved[-3:]), step.table
        if torch.is_grad_enabled():  # create_graph: the registered op refuses the second differentiation
            numbers = pack(table.layouts), table.targets, table.scales, step.exponent
            return (None, *torch.ops.spectral_ops.spectral_penalty_backward(upstream, weights, *kept, *numbers))
        # preserve_format gives an expanded weight a dense gradient, as autograd's own accumulation does.
        out = [torch.empty_like(w) for w in weights]
        launcher = table.launcher(step.backend, upstream.device)
        if launcher is not None:
            launcher.backward(weights, out, *kept, step.exponent, upstream)
        else:
            work = table.native.at(weights, out)
            work.table.backward(
                work.weights,
                work.gradients,
                *(x.data_ptr() for x in kept),
                step.exponent,
                upstream.item(),
                False,
                torch.get_num_threads(),
            )
        return (None, *out)
