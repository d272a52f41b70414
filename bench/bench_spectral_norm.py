"""spectral_norm: sigma_1 of every matrix, converged to a relative error of 1e-5, against torch's ways to get it.

The floor is one read of every weight; an iteration needs as many as its spectrum asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import models, truth
from bench.baselines import ITERATIVE, NORMS, fewest_iterations
from bench.case import DTYPES, FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, measure
from bench.problem import IN_CACHE, STREAMS, Problem, backend_note
from spectral_ops import spectral_norm

OP = "spectral_norm"
OURS = "spectral_norm"
NAMES = (OURS, *NORMS, FLOOR)
MODEL = "vit-s"
# An SVD of every matrix of a ViT takes a GPU seconds to minutes: all contenders get the matrices of one block.
CUDA_MODELS = ("vit-s", "vit-b", "vit-g")
CUDA_BLOCKS = 1
TOLERANCE = 1e-5
# spectral_norm's tol is an estimate: where the two largest singular values lie within 1e-4 of each other it can stop at
# the second. As with the baselines' iterations, the first of these that reaches the tolerance is taken, and noted.
TOLS = (1e-5, 1e-6, 1e-7)

SPECTRA = {
    "init": "as torch initialises Linear, the largest singular values within a per cent of each other: the hardest",
    "decaying": "singular values 3 / sqrt(i), a few standing out as in trained layers",
}


def case(model: str, dtype: str, settings: Settings, spectrum: str) -> Case:
    blocks = CUDA_BLOCKS if settings.on_cuda and not settings.full and model in models.VITS else None
    problem = Problem(model, settings, dtype, blocks)
    if spectrum == "decaying":
        models.set_decaying_spectrum(problem.model)
    weights = problem.weights
    true = truth.largest_singular_values(weights)
    notes = [f"Spectrum {spectrum}: {SPECTRA[spectrum]}.", STREAMS if problem.streams else IN_CACHE]
    if blocks is not None:
        depth = models.VITS[model].depth
        notes.insert(0, f"For all contenders the {len(weights)} matrices of {blocks} block of {depth}, nothing scaled.")
    if problem.in_bfloat16:
        notes.append("torch has no SVD of bfloat16: the baselines convert to float32 within the call.")

    def baseline(norm: Callable[..., Tensor], *arguments: object) -> Tensor:
        return norm([w.float() for w in weights], *arguments)

    def errors(found: Tensor) -> Tensor:
        return (found.double() - true).abs() / true

    def contender(norm: Callable[[], Tensor], note: str = "", approximate: bool = False) -> Contender:
        run = torch.no_grad()(norm)
        # max() over a tensor lets NaN win.
        return Contender(run, lambda: errors(run()).max().item(), TOLERANCE, note, approximate)

    with torch.no_grad():
        tol = next((t for t in TOLS if errors(spectral_norm(weights, tol=t)).max() <= TOLERANCE), TOLS[-1])
    note = f"tol={tol:g}, of {TOLS}, {backend_note(settings.device.kind, OP)}"
    contenders = {OURS: contender(lambda: spectral_norm(weights, tol=tol), note)}
    left_out = {}
    for name, norm in NORMS.items():
        reason = settings.left_out(name, model, dtype)
        if reason:
            left_out[name] = reason
            continue
        if name not in ITERATIVE:
            # gesvda is made for speed and promises less.
            contenders[name] = contender(partial(baseline, norm), approximate=name.endswith("gesvda"))
        else:
            niter = enough_iterations(name, weights, true)
            candidates = ITERATIVE[name][1]
            note = f"{min(niter)} to {max(niter)} iterations, for each matrix the fewest of {candidates} that suffice"
            contenders[name] = contender(partial(baseline, norm, niter), note, approximate=True)
        contenders[name].optional = True
    return Case(
        f"{OP}/{model}-{spectrum}/{dtype}",
        f"sigma_1 to {TOLERANCE:g}, {model}{', one block' * (blocks == 1)}, {spectrum} spectrum, {dtype}",
        settings.device,
        read=weights,
        update=[],
        contenders=contenders,
        notes=notes,
        left_out=left_out,
        cold=problem.streams,
    )


@torch.no_grad()
def enough_iterations(name: str, weights: list[Tensor], true: Tensor) -> list[int]:
    """Random starts differ from call to call: what is chosen has a margin of ten, and may yet miss."""
    norm, candidates = ITERATIVE[name]
    found = [w.float() for w in weights]
    return fewest_iterations(
        norm, candidates, found, lambda i, s: abs(s.item() / true[i].item() - 1) <= TOLERANCE / 10
    )


def init(model: str, dtype: str, settings: Settings) -> Case:
    return case(model, dtype, settings, "init")


def decaying(model: str, dtype: str, settings: Settings) -> Case:
    return case(model, dtype, settings, "decaying")


BUILDERS = {"init": init, "decaying": decaying}


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    for model, dtype in settings.grid((MODEL,), CUDA_MODELS):
        if dtype != DTYPES[0] and settings.dtypes is None:
            continue  # the baselines would measure the same float32 code
        for spectrum, build in BUILDERS.items():
            yield f"{model}-{spectrum}/{dtype}", partial(build, model, dtype, settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectral_norm(time_alone: TimeAlone, case_of: CaseOf, spectrum: str, dtype: str, name: str) -> None:
    time_alone(case_of(BUILDERS[spectrum], MODEL, dtype), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    measured = measure(case_of(init, MODEL), settings)
    assert {row["name"] for row in measured["rows"]} | set(measured["left_out"]) == set(NAMES)
