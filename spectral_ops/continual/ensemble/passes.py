"""The two ways to the scores and gradients of a stack: by autograd, or by a chain rule that the model has written out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from spectral_ops.continual.models import StackedModel


class WrittenPass:
    """Gradients come to lie where the chain rule was told."""

    def __init__(self, rule: StackedModel):
        self._rule = rule
        self._minus_one: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self._rule.forward(x)
        # Less one at each sample's class: the gradient of its cross-entropy. Samples last: 5 times as fast at 256 of 10
        # classes, on a CPU.
        d = scores.mT.softmax(1).mT
        labels = y.unsqueeze(2)
        if self._minus_one is None:
            self._minus_one = scores.new_full((), -1.0)
        d.scatter_add_(2, labels, self._minus_one.expand_as(labels)).div_(y.shape[1])
        self._rule.backward(d)
        return scores


class AutogradPass:
    """Every step's gradients are new tensors.

    Args:
        model: whose parameters are the stacked ones, (S * m, ...).
        parameters: the same memory by name, (S, m, ...).
    """

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]):
        self._leaves, self._trained = {}, []
        for name, p in model.named_parameters():
            self._leaves[name] = leaf = parameters[name].detach().requires_grad_(p.requires_grad)
            if p.requires_grad:
                self._trained.append((p, leaf))

        def scores(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, parameters, (x,))

        self._scores = vmap(scores, randomness="different")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        with _Batched():
            scores = self._scores(self._leaves, x)
        for p, _ in self._trained:
            p.grad = None  # first: the new ones then take this memory, which is in the cache
        loss = F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        gradients = torch.autograd.grad(loss, [leaf for _, leaf in self._trained], allow_unused=True)
        for (p, _), gradient in zip(self._trained, gradients, strict=True):
            p.grad = None if gradient is None else gradient.contiguous().flatten(0, 1)
        return scores.detach()


class _Batched(TorchFunctionMode):
    """Layers in the form that vmap makes the fastest batched products of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs:
            return _attention(*args)
        return func(*args, **kwargs)


def _linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    # W x' and not x W': the gradient of W comes out with W's strides. As vmap has F.linear it is transposed, and its
    # copy makes the backward pass 3 times as long (10 MLPs 784-256-256-10, batch 16, one thread).
    y = w @ x.flatten(0, -2).mT  # (m, rows)
    y = y if b is None else y + b[:, None]
    return y.mT.unflatten(0, x.shape[:-1])


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # vmap has no rule for the fused kernels: it would call them network by network.
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
