"""All that is measured of a network at one moment, in one call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_ops.continual.measures.activations import OF_UNITS, of_activations
from spectral_ops.continual.measures.checks import check_batch, check_model, scores_of, value_of
from spectral_ops.continual.measures.diversity import Loss, gradient_diversity
from spectral_ops.continual.measures.network import Network, usable, without_trace
from spectral_ops.continual.measures.norms import norm
from spectral_ops.continual.measures.weights import of_matrices, weights_of
from spectral_ops.continual.units import Units

DORMANT = 0.025  # of the layer's mean activation: the threshold of Sokar et al. 2023, section 3
DUPLICATE = 0.999  # cosine from which on two units are one


def probe(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    units: Sequence[Units] | None = None,
    loss: Loss = F.cross_entropy,
    dormant: float = DORMANT,
    duplicate: float = DUPLICATE,
) -> dict[str, Any]:
    """What the network is like on a batch, as numbers, and None where there is none or it is not finite.

    Nothing is changed: parameters, .grad, buffers such as BatchNorm's statistics, what the modules hold, the random
    states of torch, NumPy and Python. The model runs in the mode it is in, whether or not the caller has gradients
    switched on, and the forward hooks that it has are run.

    The cost: a forward and a backward pass of the batch, a second of each sample alone for gradient_diversity (of a
    model that is `by_rows`, one of the batch); for a weight (m, n) a Gram matrix in float64 and its eigenvalues,
    O(m n min(m, n)), of float64 weights an SVD; the same for every layer's activations.

    Args:
        model: called as model(x).
        batch: x and the targets y, of the same length.
        units: the layers of units to look at; None: model.units() where the model has that, else none.
        loss: loss(model(x), y), one number, the mean over the batch; it takes a batch of one too.
        dormant: a unit is dormant if its mean |activation| is at most this share of its layer's mean.
        duplicate: a unit is a duplicate if its activations have a larger cosine with those of an earlier unit.

    Returns, of the batch:
        loss, accuracy: accuracy is None where y does not hold the number of a class for each score.
        gradient_diversity: sum ||g_i||^2 / ||sum g_i||^2 over the gradients g_i of the samples, from 1 / (batch size)
            for samples that agree; None where samples cannot be told apart, as under BatchNorm in training, or where
            torch.func.vmap cannot map the model.
    Of every weight that `SpectralRegularizer` reads as one matrix or several (attention's queries, keys and values; a
    conv weight is (out, rest) for each group), by the parameter's name, a parametrized one as it is used:
        sigma: the largest singular value, of several matrices the largest of all.
        effective_rank: exp of the entropy of the singular values divided by their sum; the mean over the matrices.
        stable_rank: ||W||_F^2 / sigma^2; the mean over the matrices.
        weight_norm: ||W||_F of all of them together.
        gradient_norm: of the loss; None where the weight is frozen.
    Of every layer of units, by its name; units are compared over samples, positions and copies:
        dormant, duplicate: the share of such units. What is never active is dormant, but no duplicate.
        feature_rank: the effective rank of the activations, samples and positions by features, not centred.

    Singular values are exact up to rounding: those of a float32 weight, from the Gram matrix in float64, to 2e-8 of the
    largest, less than the weight's own rounding.

    Raises:
        TypeError: a model that is no module, a batch that is no pair of tensors.
        ValueError: an empty batch, or x and y of two lengths; an x that the model cannot take, a y that the loss cannot
            (for cross_entropy a class without a score), with what torch says as its cause; a loss that is not one
            number; units that no forward pass calls, or whose activation has another number of features.

    Source: Roy & Vetterli 2007 (effective rank); Sokar et al. 2023, arXiv 2302.12902 (dormant units); Yin et al. 2018,
    arXiv 1706.05699 (gradient diversity).

    Example:
        >>> measures = probe(nn.Linear(3, 2), (torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)))
        >>> list(measures["sigma"]), measures["dormant"]
        (['weight'], {})
    """
    check_model(model)
    batch = check_batch(batch)
    with without_trace(model):
        x, y = map(usable, batch)
        if units is None:
            units = model.units() if callable(getattr(model, "units", None)) else []  # type: ignore[operator]
        parameters = {name: usable(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        network = Network(model, parameters)
        of_batch, of_units, gradients = network.call(partial(_run, network, x, y, units, loss, dormant, duplicate))
        weights = network.call(partial(weights_of, model))
        diversity = gradient_diversity(network, x, y, loss)
    measures = {
        **of_batch,
        **{name: {} for name in ("sigma", "effective_rank", "stable_rank", "weight_norm", "gradient_norm")},
        **{name: {key: values[name] for key, values in of_units.items()} for name in OF_UNITS},
        "gradient_diversity": diversity,
    }
    for name, weight in weights.items():
        norms = [gradients[source] for source in weight.parameters if source in gradients]
        of_weight = {**of_matrices(weight.matrices), "gradient_norm": math.hypot(*norms) if norms else None}
        for key, value in of_weight.items():
            measures[key][name] = value
    return _finite(measures)


def _run(
    network: Network, x: Tensor, y: Tensor, units: Sequence[Units], loss: Loss, dormant: float, duplicate: float
) -> tuple[dict[str, float | None], dict[str, dict[str, float]], dict[str, float]]:
    """Loss and accuracy; what is said of every layer of units; the gradient's norm of every parameter trained."""
    of_units: dict[str, dict[str, float]] = {}

    def record(layer: Units, module: nn.Module, args: Any, output: Tensor) -> None:
        of_units[layer.name] = of_activations(layer, output.detach(), dormant, duplicate)

    with contextlib.ExitStack() as hooks:
        for layer in units:
            hooks.callback(layer.activation.register_forward_hook(partial(record, layer)).remove)
        scores = scores_of(network.model, x)
    if missing := [layer.name for layer in units if layer.name not in of_units]:
        raise ValueError(
            f"probe: expected a forward pass to call the activation of units {missing[0]!r}, got none. Name units "
            "whose activation is a module of the model."
        )
    value = value_of(loss, scores, y)
    trained = {name: p for name, p in network.substitutes.items() if p.requires_grad}
    gradients = torch.autograd.grad(value.sum(), list(trained.values()), allow_unused=True) if trained else ()
    norms = {name: 0.0 if g is None else norm(g) for name, g in zip(trained, gradients, strict=True)}
    return {"loss": value.item(), "accuracy": _accuracy(scores, y)}, of_units, norms


def _accuracy(scores: Any, y: Tensor) -> float | None:
    if not isinstance(scores, Tensor) or scores.ndim < 2 or y.is_floating_point():
        return None
    chosen = scores.argmax(1)
    return (chosen == y).double().mean().item() if chosen.shape == y.shape else None


def _finite(value: Any) -> Any:
    """None for the numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value if value is None or math.isfinite(value) else None
