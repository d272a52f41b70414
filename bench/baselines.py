"""What the library is compared with, every baseline under one name.

`usual_*` is the code one finds in repositories and papers, with v kept warm between calls; the others are torch's own.
None is slowed down on purpose: tables are made beforehand, vectors are not drawn anew, nothing syncs with the host.
`VARIANTS` lists the ways to run the usual code, `NORMS` torch's ways to a converged norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import spectral_norm as parametrize_spectral_norm

# torch.svd_lowrank and torch.lobpcg take a number of iterations: the benchmark gives them, matrix by matrix, the first
# of these at which they reach its tolerance. Knowing the truth it spares them the cost of finding out.
LOWRANK_ITERATIONS = (2, 4, 8, 16, 32, 64, 128)
LOWRANK_COLUMNS = 8  # q = 6, torch's default, needs more iterations; from 8 to 16 the time hardly changes
LOBPCG_ITERATIONS = (8, 16, 32, 64, 128)


# ---- the penalty ----


def usual_power_iteration(weights: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One step for every matrix: sigma = u'Wv (L,), and the next v. Three reads of each matrix.

    The next v is returned rather than written into v. Written in place, torch.compile (2.13) may compute u and v anew
    in the backward, from the v that is already the next one, and silently give the gradient of another step.
    """
    sigmas, vs = [], []
    for w, x in zip(weights, v, strict=True):
        w = w.flatten(1)
        with torch.no_grad():
            u = normalize(torch.mv(w, x), dim=0)
            v_new = normalize(torch.mv(w.t(), u), dim=0)
        sigmas.append(torch.dot(u, torch.mv(w, v_new)))
        vs.append(v_new)
    return torch.stack(sigmas), vs


def by_shape(weights: Sequence[Tensor]) -> list[list[int]]:
    """The places of the weights of one shape as a matrix, for every such shape."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, w in enumerate(weights):
        places.setdefault(tuple(w.flatten(1).shape), []).append(i)
    return list(places.values())


def stacked_power_iteration(weights: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same step with matrices of one shape as one batch: a handful of launches per shape.

    The stack is made anew at every call, as the weights have changed since: one more read, and a write.
    """
    sigmas, vs = [*weights], [*v]  # every place is filled below
    for places in by_shape(weights):
        w = torch.stack([weights[i].flatten(1) for i in places])  # (b, m, n)
        x = torch.stack([v[i] for i in places]).unsqueeze(2)  # (b, n, 1)
        with torch.no_grad():
            u = normalize(torch.bmm(w, x), dim=1)
            v_new = normalize(torch.bmm(w.mT, u), dim=1)
        sigma = torch.einsum("bmi,bmi->b", u, torch.bmm(w, v_new))
        for i, s, y in zip(places, sigma.unbind(), v_new.squeeze(2).unbind(), strict=True):
            sigmas[i], vs[i] = s, y
    return torch.stack(sigmas), vs


def usual_penalty(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    exponent: float = 2.0,
    target: float = 1.0,
    power_iteration: Callable[..., tuple[Tensor, list[Tensor]]] = usual_power_iteration,
) -> tuple[Tensor, list[Tensor]]:
    """R = sum (sigma^k - t^k)^2 + sum ||b||^(2k), differentiable in weights and biases; and the next v."""
    sigma, v_new = power_iteration(weights, v)
    value = ((sigma**exponent - target**exponent) ** 2).sum()
    for b in biases:
        value = value + b.square().sum() ** exponent
    return value, v_new


def stacked_penalty(
    weights: Sequence[Tensor], biases: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    return usual_penalty(weights, biases, v, power_iteration=stacked_power_iteration)


def compiled(function: Callable[..., Any], mode: str | None = None, backend: str = "inductor") -> Callable[..., Any]:
    """The same under torch.compile, every shape fixed; compiles at the first call.

    fullgraph: beyond Dynamo's limit of recompilations it raises, where otherwise it would go on uncompiled, unnoticed.
    """
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend, mode=mode)


@dataclass(frozen=True)
class Variant:
    """A way to run the usual code: stacked by shape, compiled in a mode of torch.compile, in a CUDA graph."""

    stacked: bool = False
    mode: str | None = None
    graph: bool = False

    def code(self, plain: Callable[..., Any], stacked: Callable[..., Any]) -> Callable[..., Any]:
        """One of the two functions, compiled where the variant says so."""
        function = stacked if self.stacked else plain
        return function if self.mode is None else _compiled_once(function, self.mode)


# Cached, so that a mode is compiled once for a case, in a graph and out of it; bench.case empties it between cases.
_compiled_once = functools.cache(compiled)


def forget_compiled() -> None:
    """Drops compiled code, so that one case's shapes do not count toward the next one's limit of recompilations."""
    _compiled_once.cache_clear()
    torch.compiler.reset()


class UsualPenalty:
    """The usual code as a training loop has it: `loss()`, then `accumulate_grad_()` = loss().backward().

    Args:
        weights, biases, v: v in the weights' dtype.
        strength: the coefficient.
        penalty: (weights, biases, v) -> (R, the next v).
        in_place: `accumulate_grad_` writes the next v where v was, for a CUDA graph, once the backward has used it.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        biases: Sequence[nn.Parameter],
        v: Sequence[Tensor],
        *,
        strength: float,
        penalty: Callable[..., tuple[Tensor, list[Tensor]]] = usual_penalty,
        in_place: bool = False,
    ):
        self.weights, self.biases, self.strength = list(weights), list(biases), strength
        self._penalty, self._in_place = penalty, in_place
        self.v = [x.clone() for x in v]

    def restart(self, v: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self.v, list(v))

    def loss(self) -> Tensor:
        value, self.v = self._penalty(self.weights, self.biases, self.v)
        return self.strength * value

    def accumulate_grad_(self) -> Tensor:
        v = self.v
        loss = self.loss()
        loss.backward()
        if self._in_place:
            torch._foreach_copy_(v, self.v)
            self.v = v
        return loss.detach()


class Normalized:
    """torch.nn.utils.parametrizations.spectral_norm on every layer: W / sigma forward, then backward into .grad.

    It solves another problem, normalisation in place of a penalty, with the same step of power iteration.

    Args:
        model: layers in an nn.ModuleList, changed in place; biases play no part.
    """

    def __init__(self, model: nn.Module):
        # Any: what a parametrization adds to a module is beyond its type.
        self.layers: list[Any] = [parametrize_spectral_norm(layer) for layer in model.children()]
        self.originals: list[Tensor] = [layer.parametrizations.weight.original for layer in self.layers]
        # The gradient that would arrive from the loss; its values do not matter to the time.
        self.upstream = [torch.ones_like(w) for w in self.originals]

    def restart(self, v: Sequence[Tensor]) -> None:
        for layer, x in zip(self.layers, v, strict=True):
            layer.parametrizations.weight[0]._v.copy_(x)

    def accumulate_grad_(self) -> list[Tensor]:
        """Forward and backward of every layer; returns the normalised weights."""
        weights = [layer.weight for layer in self.layers]
        torch.autograd.backward(weights, self.upstream)
        return [w.detach() for w in weights]


# ---- the norm, converged ----


def matrix_norm_one_by_one(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.matrix_norm(w.flatten(1), 2) for w in weights])


def svdvals_by_shape(weights: Sequence[Tensor], driver: str | None = None) -> Tensor:
    """Matrices of one shape stacked into one call; drivers are cuSOLVER's, None takes torch's own choice."""
    out = weights[0].new_empty(len(weights))
    for places in by_shape(weights):
        stack = torch.stack([weights[i].flatten(1) for i in places])
        tall = stack if stack.shape[1] >= stack.shape[2] else stack.mT  # gesvda is made for these
        out[places] = torch.linalg.svdvals(tall, driver=driver)[:, 0]
    return out


def svd_lowrank(weights: Sequence[Tensor], niter: Sequence[int]) -> Tensor:
    """Randomised subspace iteration (Halko et al. 2009), one by one, each with its number of iterations."""
    return torch.stack(
        [
            torch.svd_lowrank(w.flatten(1), q=LOWRANK_COLUMNS, niter=count)[1][0]
            for w, count in zip(weights, niter, strict=True)
        ]
    )


def lobpcg(weights: Sequence[Tensor], niter: Sequence[int]) -> Tensor:
    """The largest eigenvalue of the smaller of w w' and w'w, one by one, each with its number of iterations."""
    out = []
    for w, count in zip(weights, niter, strict=True):
        w = w.flatten(1)
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        # tol below what float32 reaches: all iterations are used.
        out.append(torch.lobpcg(gram, k=1, niter=count, tol=1e-12, largest=True)[0][0].sqrt())
    return torch.stack(out)


def fewest_iterations(
    norm: Callable[[Sequence[Tensor], Sequence[int]], Tensor],
    candidates: Sequence[int],
    weights: Sequence[Tensor],
    good: Callable[[int, Tensor], bool],
) -> list[int]:
    """For each weight the first of the candidates whose sigma is good(index, sigma), else the last."""
    out = []
    for i, w in enumerate(weights):
        for count in candidates:
            if good(i, norm([w], [count])[0]):
                break
        out.append(count)
    return out


# Every baseline by the name that tables show. What needs CUDA is left out on a CPU.
AUTOTUNE = "max-autotune-no-cudagraphs"
USUAL, COMPILED, AUTOTUNED, STACKED = "usual", "usual, compiled", "usual, max-autotune", "usual, stacked"
VARIANTS: dict[str, Variant] = {
    USUAL: Variant(),
    COMPILED: Variant(mode="default"),
    AUTOTUNED: Variant(mode=AUTOTUNE),
    STACKED: Variant(stacked=True),
    "usual, graph": Variant(graph=True),
    "usual, compiled, graph": Variant(mode="default", graph=True),
    "usual, stacked, graph": Variant(stacked=True, graph=True),
}
PARAMETRIZATION = "parametrization"
PENALTIES = (*VARIANTS, PARAMETRIZATION)
ITERATIVE: dict[str, tuple[Callable[..., Tensor], Sequence[int]]] = {
    "svd_lowrank": (svd_lowrank, LOWRANK_ITERATIONS),
    "lobpcg": (lobpcg, LOBPCG_ITERATIONS),
}
CUDA_DRIVERS = ("gesvd", "gesvdj", "gesvda")
NORMS: dict[str, Callable[..., Tensor]] = {
    "matrix_norm": matrix_norm_one_by_one,
    "svdvals": svdvals_by_shape,
    **{f"svdvals, {driver}": functools.partial(svdvals_by_shape, driver=driver) for driver in CUDA_DRIVERS},
    **{name: norm for name, (norm, _) in ITERATIVE.items()},
}


def needs_cuda(name: str) -> bool:
    """Whether the baseline of this name exists on CUDA alone."""
    return VARIANTS[name].graph if name in VARIANTS else name.removeprefix("svdvals, ") in CUDA_DRIVERS
