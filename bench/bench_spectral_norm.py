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
from bench.baselines import LOBPCG_ITERATIONS, LOWRANK_ITERATIONS, NORMS, fewest_iterations, lobpcg, svd_lowrank
from bench.case import FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, measure
from bench.problem import IN_CACHE, STREAMS, Problem
from spectral_ops import spectral_norm

OP = "spectral_norm"
OURS = "spectral_norm"
NAMES = (OURS, *NORMS, FLOOR)
TOLERANCE = 1e-5
# spectral_norm's tol is an estimate: where the two largest singular values lie within 1e-4 of each other it can stop at
# the second. As with the baselines' iterations, the first of these that reaches the tolerance is taken, and noted.
TOLS = (1e-5, 1e-6, 1e-7)

SPECTRA = {
    "init": "as torch initialises Linear, the largest singular values within a per cent of each other: the hardest",
    "decaying": "singular values 3 / sqrt(i), a few standing out as in trained layers",
}


def case(spectrum: str, settings: Settings, model: str = "vit-s") -> Case:
    problem = Problem(model, settings)
    if spectrum == "decaying":
        models.set_decaying_spectrum(problem.model)
    weights = problem.weights
    true = truth.largest_singular_values(weights)

    def errors(found: Tensor) -> Tensor:
        return (found.double() - true).abs() / true

    def contender(norm: Callable[[], Tensor], note: str = "", approximate: bool = False) -> Contender:
        run = torch.no_grad()(norm)
        # max() over a tensor lets NaN win.
        return Contender(run, lambda: errors(run()).max().item(), TOLERANCE, note, approximate)

    with torch.no_grad():
        tol = next((t for t in TOLS if errors(spectral_norm(weights, tol=t)).max() <= TOLERANCE), TOLS[-1])
    contenders = {OURS: contender(lambda: spectral_norm(weights, tol=tol), f"tol={tol:g}, of {TOLS}")}
    for name, norm in NORMS.items():
        candidates = {svd_lowrank: LOWRANK_ITERATIONS, lobpcg: LOBPCG_ITERATIONS}.get(norm)
        if candidates is None:
            contenders[name] = contender(partial(norm, weights))
            continue
        # Random starts differ from call to call: what is chosen has a margin of ten, and may yet miss.
        with torch.no_grad():
            niter = fewest_iterations(
                norm, candidates, weights, lambda i, s: abs(s.item() / true[i].item() - 1) <= TOLERANCE / 10
            )
        note = f"{min(niter)} to {max(niter)} iterations, for each matrix the fewest of {candidates} that suffice"
        contenders[name] = contender(partial(norm, weights, niter), note, approximate=True)
    return Case(
        f"{OP}/{model}-{spectrum}",
        f"sigma_1 to {TOLERANCE:g}, {model}, {spectrum} spectrum",
        settings.device,
        read=weights,
        update=[],
        contenders=contenders,
        notes=[f"Spectrum {spectrum}: {SPECTRA[spectrum]}.", STREAMS if problem.streams else IN_CACHE],
        cold=problem.streams,
    )


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    for spectrum in SPECTRA:
        yield partial(case, spectrum, settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectral_norm(time_alone: TimeAlone, case_of: CaseOf, spectrum: str, name: str) -> None:
    time_alone(case_of(case, spectrum), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    rows = measure(case_of(case, "init"), settings)["rows"]
    assert {row["name"] for row in rows} == set(NAMES)
