"""Networks of one kind side by side: their parameters in one tensor each, a forward pass of all in one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from spectral_ops.continual.models import Model, StackedModel


class Stack:
    """S networks whose parameters lie in one tensor for each name, one network's below the other's.

    A parameter (m, ...) becomes (S * m, ...), so that whatever acts on single entries or on rows acts on the stack as
    it is, and a weight of S matrices is what a packed layer has. The networks are used as before: their parameters are
    views of the stack.

    Args:
        networks: of one class and of the same shapes, on one device; their parameters are given another storage.

    Raises:
        ValueError: a network with BatchNorm.
    """

    def __init__(self, networks: Sequence[Model]):
        for name, module in networks[0].named_modules():
            if isinstance(module, _BatchNorm):
                raise ValueError(
                    f"run_together: expected a model without batch statistics, got BatchNorm in {name!r}. Choose "
                    "another norm, e.g. --model-options norm=group, or compare with workers."
                )
        self.networks = list(networks)
        self.model = copy.deepcopy(networks[0])
        """Carries the stacked parameters under a network's names, for methods and optimizer; it is not called."""
        self._leaves: dict[str, Tensor] = {}  # the same memory as (S, m, ...), what the loss is differentiated in
        trained: list[tuple[str, nn.Parameter]] = []
        for name, first in networks[0].named_parameters():
            alike = [network.get_parameter(name) for network in networks]
            stacked = nn.Parameter(torch.cat([p.detach() for p in alike]), first.requires_grad)
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, stacked)
            for p, part in zip(alike, stacked.detach().chunk(len(networks)), strict=True):
                p.data = part
            self._leaves[name] = self.split(stacked.detach()).requires_grad_(first.requires_grad)
            if first.requires_grad:
                trained.append((name, stacked))
        self._trained = [(p, self._leaves[name]) for name, p in trained]
        gradients = {name: torch.empty_like(p) for name, p in trained}
        self._chain_rule = self.model.stacked(
            {name: leaf.detach() for name, leaf in self._leaves.items()},
            {name: self.split(gradient) for name, gradient in gradients.items()},
        )
        self._minus_one = next(iter(self._leaves.values())).new_full((), -1.0)
        self._gradients = [] if self._chain_rule is None else [(p, gradients[name]) for name, p in trained]

        def scores(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.model, parameters, (x,))

        self._scores = vmap(scores, randomness="different")

    def __len__(self) -> int:
        return len(self.networks)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """A batch of every network: its scores, (S, B, classes), and the gradients of the loss, the sum over networks
        of each one's mean cross-entropy, in place of those that the stacked parameters had.

        Args:
            x: (S, B, ...).
            y: (S, B), classes.
        """
        return self._by_autograd(x, y) if self._chain_rule is None else self._by_hand(self._chain_rule, x, y)

    def _by_autograd(self, x: Tensor, y: Tensor) -> Tensor:
        with _Batched():
            scores = self._scores(self._leaves, x)
        for p, _ in self._trained:
            p.grad = None  # first: the new ones then take this memory, which is in the cache
        loss = F.cross_entropy(scores.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        gradients = torch.autograd.grad(loss, [leaf for _, leaf in self._trained], allow_unused=True)
        for (p, _), gradient in zip(self._trained, gradients, strict=True):
            p.grad = None if gradient is None else gradient.contiguous().flatten(0, 1)
        return scores.detach()

    def _by_hand(self, stacked: StackedModel, x: Tensor, y: Tensor) -> Tensor:
        scores = stacked.forward(x)
        d = scores.softmax(2)  # less one at each sample's class: the gradient of its cross-entropy
        labels = y.unsqueeze(2)
        d.scatter_add_(2, labels, self._minus_one.expand_as(labels)).div_(y.shape[1])
        stacked.backward(d)
        for p, gradient in self._gradients:
            p.grad = gradient
        return scores

    def split(self, stacked: Tensor) -> Tensor:
        """(S * m, ...) as (S, m, ...)."""
        return stacked.unflatten(0, (len(self), -1))


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
