"""What a network is like at one moment: its loss, weights, units and gradients, looked at without leaving a trace."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from spectral_ops.continual.sample_gradients import squares_by_layer
from spectral_ops.continual.units import Units
from spectral_ops.conv_sizes import unchanged
from spectral_ops.ops.layout import as_matrices, vector_dtype
from spectral_ops.recognition import recognise
from spectral_ops.rules import Found, Owner, collect

DORMANT = 0.025  # of the layer's mean activation: the threshold of Sokar et al. 2023, section 3
DUPLICATE = 0.999  # cosine from which on two units are one
ROWS = 1 << 14  # of activations that are in float64 at once
SAMPLE_GRADIENTS = 1 << 22  # numbers of gradients of single samples held at once: more are slower on a CPU
NORMS = 1e-12, 1e15  # in between, squares that float32 loses or cannot hold do not count in a norm

Loss = Callable[[Any, Tensor], Tensor]


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
        TypeError: a batch that is no pair of tensors.
        ValueError: an empty batch, or x and y of two lengths; a loss that is not one number; units that no forward pass
            calls, or whose activation has another number of features.

    Source: Roy & Vetterli 2007 (effective rank); Sokar et al. 2023, arXiv 2302.12902 (dormant units); Yin et al. 2018,
    arXiv 1706.05699 (gradient diversity).

    Example:
        >>> measures = probe(nn.Linear(3, 2), (torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)))
        >>> list(measures["sigma"]), measures["dormant"]
        (['weight'], {})
    """
    batch = _checked(batch)
    with _without_trace(model):
        x, y = map(_usable, batch)
        if units is None:
            units = model.units() if callable(getattr(model, "units", None)) else []  # type: ignore[operator]
        parameters = {name: _usable(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        network = _Network(model, parameters)
        of_batch, of_units, gradients = network.call(partial(_run, network, x, y, units, loss, dormant, duplicate))
        weights = network.call(partial(_weights, model))
        diversity = network.gradient_diversity(x, y, loss)
    measures = {
        **of_batch,
        **{name: {} for name in ("sigma", "effective_rank", "stable_rank", "weight_norm", "gradient_norm")},
        **{name: {key: values[name] for key, values in of_units.items()} for name in _OF_UNITS},
        "gradient_diversity": diversity,
    }
    for name, weight in weights.items():
        norms = [gradients[source] for source in weight.parameters if source in gradients]
        of_weight = {**_of_matrices(weight.matrices), "gradient_norm": math.hypot(*norms) if norms else None}
        for key, value in of_weight.items():
            measures[key][name] = value
    return _finite(measures)


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of singular values (..., k) divided by their sum, (...); nan where all are 0.

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def singular_values(w: Tensor) -> Tensor:
    """All min(m, n) of matrices (..., m, n), float64 (..., min(m, n)), descending; nan where w is not finite.

    Of float64 by the SVD, of anything else by the eigenvalues of the smaller Gram matrix in float64: several times
    faster, and off by less than the rounding of the elements of w.
    """
    if not w.isfinite().all():
        return w.new_full((*w.shape[:-2], min(w.shape[-2:])), math.nan, dtype=torch.float64)  # LAPACK would raise
    if w.dtype == torch.float64:
        return torch.linalg.svdvals(w)
    w = w.double()
    return _roots(w.mT @ w if w.shape[-2] > w.shape[-1] else w @ w.mT)


def _roots(gram: Tensor) -> Tensor:
    """The singular values of what gram (..., k, k) is the Gram matrix of."""
    values = torch.linalg.eigvalsh(gram).flip(-1)
    # What is below the rounding of the largest eigenvalue is noise: its square root would count as rank.
    noise = gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., :1]
    return torch.where(values > noise, values, 0).sqrt()


# ---- the model ----


class _Network(nn.Module):
    """A model as functions of its parameters: whatever runs in here finds copies of the buffers in their place."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.model, self.substitutes = model, parameters

    def call(self, function: Callable[[], Any], parameters: Mapping[str, Tensor] | None = None) -> Any:
        """function(), which may use the model."""
        held = {**(self.substitutes if parameters is None else parameters)}
        held |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self, {f"model.{name}": tensor for name, tensor in held.items()}, (function,))

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()

    def gradient_diversity(self, x: Tensor, y: Tensor, loss: Loss) -> float | None:
        trained = {name: p for name, p in self.substitutes.items() if p.requires_grad}
        if not trained or any(_mixes_samples(module) for module in self.model.modules()):
            return None
        if loss is F.cross_entropy:
            known = self.call(lambda: squares_by_layer(self.model, trained, x, y))
            if known is not None:
                return known[0] / known[1] if known[1] > 0 else None

        def loss_of_one(trained: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.call(lambda: loss(self.model(x[None]), y[None]), {**self.substitutes, **trained})

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
                squares += _norm(g) ** 2
                totals[name] += g.sum(0)
        of_sum = sum(_norm(total) ** 2 for total in totals.values())
        return squares / of_sum if of_sum > 0 else None


def _norm(x: Tensor) -> float:
    """In float32 row by row where that holds it: a copy of all in float64 takes ten times the time."""
    rows = torch.linalg.vector_norm(x, dim=-1, dtype=vector_dtype(x.dtype))  # short sums: rounding stays at 1e-6
    norm = torch.linalg.vector_norm(rows, dtype=torch.float64).item()
    return norm if NORMS[0] < norm < NORMS[1] else torch.linalg.vector_norm(x.double()).item()


def _mixes_samples(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


@contextlib.contextmanager
def _without_trace(model: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(unchanged(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap's, of attention
        yield


def _usable(tensor: Tensor) -> Tensor:
    """Without a graph, and in one: tensors made under inference_mode cannot be."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


# ---- on the batch ----


def _run(
    network: _Network, x: Tensor, y: Tensor, units: Sequence[Units], loss: Loss, dormant: float, duplicate: float
) -> tuple[dict[str, float | None], dict[str, dict[str, float]], dict[str, float]]:
    """Loss and accuracy; what is said of every layer of units; the gradient's norm of every parameter trained."""
    of_units: dict[str, dict[str, float]] = {}

    def record(layer: Units, module: nn.Module, args: Any, output: Tensor) -> None:
        of_units[layer.name] = _of_activations(layer, output.detach(), dormant, duplicate)

    with contextlib.ExitStack() as hooks:
        for layer in units:
            hooks.callback(layer.activation.register_forward_hook(partial(record, layer)).remove)
        scores = network.model(x)
    if missing := [layer.name for layer in units if layer.name not in of_units]:
        raise ValueError(
            f"probe: expected a forward pass to call the activation of units {missing[0]!r}, got none. Name units "
            "whose activation is a module of the model."
        )
    value = loss(scores, y)
    if value.numel() != 1:
        raise ValueError(
            f"probe: expected loss to give one number, got shape {tuple(value.shape)}. Take the mean over the batch."
        )
    trained = {name: p for name, p in network.substitutes.items() if p.requires_grad}
    gradients = torch.autograd.grad(value.sum(), list(trained.values()), allow_unused=True) if trained else ()
    norms = {name: 0.0 if g is None else _norm(g) for name, g in zip(trained, gradients, strict=True)}
    return {"loss": value.item(), "accuracy": _accuracy(scores, y)}, of_units, norms


def _accuracy(scores: Any, y: Tensor) -> float | None:
    if not isinstance(scores, Tensor) or scores.ndim < 2 or y.is_floating_point():
        return None
    chosen = scores.argmax(1)
    return (chosen == y).double().mean().item() if chosen.shape == y.shape else None


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
        raise TypeError(
            f"probe: expected batch to be two tensors, inputs and targets, got {type(batch).__name__}. Write (x, y)."
        )
    x, y = batch
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        raise ValueError(
            f"probe: expected inputs and targets of one length >= 1, got shapes {tuple(x.shape)} and {tuple(y.shape)}. "
            "Give every sample its target."
        )
    return x, y


# ---- weights ----


class _Weight(NamedTuple):
    """A weight as its layer uses it, (parts, m, n), and the names of the parameters it is made of."""

    matrices: Tensor
    parameters: list[str]


def _weights(model: nn.Module) -> dict[str, _Weight]:
    """Every weight that is recognised as matrices, by name, and what a parametrization makes in place of one."""
    found = [(f, [f.name]) for f in (collect(model) if next(model.parameters(), None) is not None else [])]
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        prefix = f"{name}." if name else ""
        for attribute in module.parametrizations:
            value, full = getattr(module, attribute), prefix + attribute
            path = f"{prefix}parametrizations.{attribute}."
            sources = [source for source, _ in model.named_parameters() if source.startswith(path)]
            found.append((Found(full, value, [Owner(module, attribute, full)]), sources))
    out = {}
    for f, sources in found:
        layout = recognise(f)[0]
        if layout is not None and layout.is_matrix and f.parameter.is_floating_point() and f.parameter.numel():
            out[f.name] = _Weight(as_matrices(f.parameter.detach(), layout).flatten(2), sources)
    return out


def _of_matrices(w: Tensor) -> dict[str, float]:
    values = singular_values(w)  # (parts, min(m, n))
    squares = values.square()
    return {
        "sigma": values[:, 0].max().item(),
        "effective_rank": effective_rank(values).mean().item(),
        "stable_rank": (squares.sum(1) / squares[:, 0]).mean().item(),
        "weight_norm": squares.sum().sqrt().item(),
    }


# ---- units ----

_OF_UNITS = ("dormant", "duplicate", "feature_rank")


def _of_activations(layer: Units, output: Tensor, dormant: float, duplicate: float) -> dict[str, float]:
    """Of the activations of one layer, whose features lie along layer.dim."""
    features = layer.copies * layer.count
    if output.shape[layer.dim] != features:
        raise ValueError(
            f"probe: expected the activation of units {layer.name!r} to have {features} features, got shape "
            f"{tuple(output.shape)} with {output.shape[layer.dim]} along dimension {layer.dim}. Correct dim or copies."
        )
    rows = output.movedim(layer.dim, -1).reshape(-1, features)  # (samples * positions, copies * U)
    if not rows.isfinite().all():
        return dict.fromkeys(_OF_UNITS, math.nan)
    blocks = rows.split(ROWS)
    activity = torch.linalg.vector_norm(rows, 1, 0, dtype=torch.float64).view(layer.copies, -1).sum(0)
    gram = _gram(blocks)
    values = _roots(gram if len(rows) >= features else _gram([rows.T]))
    return {
        "dormant": (activity <= dormant * activity.mean()).double().mean().item(),
        "duplicate": _duplicates(gram, layer.copies, duplicate),
        "feature_rank": effective_rank(values).item(),
    }


def _gram(blocks: Sequence[Tensor]) -> Tensor:
    """A^T A in float64, for the blocks of rows that make A."""
    n = blocks[0].shape[1]
    gram = blocks[0].new_zeros(n, n, dtype=torch.float64)
    for block in blocks:
        gram.addmm_(block.double().T, block.double())
    return gram


def _duplicates(gram: Tensor, copies: int, threshold: float) -> float:
    """The share of units with a cosine above the threshold to an earlier one; `gram` is of the features."""
    features = gram.unflatten(0, (copies, -1)).unflatten(2, (copies, -1))  # (copies, U, copies, U)
    products = features.diagonal(dim1=0, dim2=2).sum(-1)  # (U, U): a unit's copies are one vector
    norms = products.diagonal().sqrt()
    # Not a division: a unit that is never active has no direction, and 0 > 0 is false.
    alike = products > threshold * norms[:, None] * norms
    return alike.tril(-1).any(1).double().mean().item()


def _finite(value: Any) -> Any:
    """None for the numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value if value is None or math.isfinite(value) else None
