"""How alike the gradients of single samples are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from spectral_ops.continual.measures.network import Network
from spectral_ops.continual.measures.norms import norm
from spectral_ops.continual.models import Model

SAMPLE_GRADIENTS = 1 << 22  # numbers of gradients of single samples held at once: more are slower on a CPU

Loss = Callable[[Any, Tensor], Tensor]


def gradient_diversity(network: Network, x: Tensor, y: Tensor, loss: Loss) -> float | None:
    """sum ||g_i||^2 / ||sum g_i||^2 over the gradients g_i of the samples x (N, ...); see `probe` for where it is None.

    Of models that are `Model.by_rows` from what their layers read and gave; else each sample's gradient is made.
    """
    trained = {name: p for name, p in network.substitutes.items() if p.requires_grad}
    if not trained or any(_mixes_samples(module) for module in network.model.modules()):
        return None
    if loss is F.cross_entropy:
        known = network.call(lambda: _squares_by_layer(network.model, trained, x, y))
        if known is not None:
            return known[0] / known[1] if known[1] > 0 else None

    def loss_of_one(trained: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return network.call(lambda: loss(network.model(x[None]), y[None]), {**network.substitutes, **trained})

    gradients_of = vmap(grad(loss_of_one), in_dims=(None, 0, 0), randomness="different")
    chunk = max(1, SAMPLE_GRADIENTS // sum(p.numel() for p in trained.values()))
    squares, totals = 0.0, {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained.items()}
    for some_x, some_y in zip(x.split(chunk), y.split(chunk), strict=True):
        try:
            gradients = gradients_of(trained, some_x, some_y)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # ValueError: layers that refuse a batch of one
            return None  # the batch as a whole went through, so it is the mapping that cannot be done
        for name, g in gradients.items():
            squares += norm(g) ** 2
            totals[name] += g.sum(0)
    of_sum = sum(norm(total) ** 2 for total in totals.values())
    return squares / of_sum if of_sum > 0 else None


def _mixes_samples(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _squares_by_layer(model: nn.Module, trained: Collection[str], x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """sum ||g_i||^2 and ||sum g_i||^2 over the gradients g_i of the cross-entropy of every sample alone.

    A Linear's weight has the gradient d_i x_i' from a sample, whose norm is ||d_i|| ||x_i||: what the layer read and
    the gradient of what it gave are enough (Goodfellow 2015, arXiv 1510.01799). Of MLP 784-256-256-10 and 256 samples
    that is 5 MB in place of 275.

    Args:
        trained: names of the parameters that count.
        x, y: the samples (N, ...) and their classes.

    Returns:
        Both in float64; None for a model that is not `Model.by_rows`, or parameters (a parametrization's) or classes
        of another kind.
    """
    if not (_by_rows(model) and y.ndim == 1 and not y.is_floating_point()):
        return None
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm)}
    if not set(trained) <= {f"{name}.{key}" for name, layer in layers.items() for key in ("weight", "bias")}:
        return None
    calls: list[tuple[str, Tensor, Tensor]] = []  # the layer's name, its rows and what it gave

    def record(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:  # else it and all before it are frozen
            calls.append((name, args[0], output))

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(record, name)).remove)
        loss = F.cross_entropy(model(x), y, reduction="sum")
    if len({name for name, _, _ in calls}) < len(calls) or any(rows.ndim != 2 for _, rows, _ in calls):
        return None
    ds = torch.autograd.grad(loss, [output for _, _, output in calls]) if calls else ()
    of_samples, of_sum = x.new_zeros((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
    for (name, rows, _), d in zip(calls, ds, strict=True):
        layer, rows, d = layers[name], rows.detach().double(), d.double()
        if f"{name}.weight" in trained:
            if isinstance(layer, nn.Linear):
                of_samples += (rows.square().sum(1) * d.square().sum(1)).sum()
                of_sum += (d.T @ rows).square().sum()
            else:
                g = d * F.layer_norm(rows, layer.normalized_shape, eps=layer.eps)
                of_samples += g.square().sum()
                of_sum += g.sum(0).square().sum()
        if f"{name}.bias" in trained:
            of_samples += d.square().sum()
            of_sum += d.sum(0).square().sum()
    return of_samples.item(), of_sum.item()


def _by_rows(model: nn.Module) -> bool:
    """`Model.by_rows`; not of a subclass with a forward of its own that does not say so, too."""
    if not isinstance(model, Model):
        return False
    owner = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    return bool(vars(owner).get("by_rows", False))
