"""Converged sigma_1 by the Triton kernels, interpreted: what tests/test_spectral_norm.py cannot see from outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import F32, error, gaussian, svd, with_values
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from spectral_ops import SpectralRegularizer, backends, spectral_norm, use_backend  # noqa: E402
from spectral_ops.kernels import spectral_norm as kernels  # noqa: E402
from spectral_ops.ops import spectral_norm as op  # noqa: E402
from spectral_ops.ops import triton_norm  # noqa: E402

TOL = 1e-6
EPS = torch.finfo(F32).eps


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    if backends.available()["triton"] is not None or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter; on a device see tests/test_cuda.py")
    with use_backend("triton"):
        yield


class Seen:
    """What happened in the last call: launches, the state at its end, how many tiles each read had."""

    def __init__(self) -> None:
        self.krylov: Any = None
        self.lanczos = 0
        self.tiles: list[int] = []
        self.capacities: list[int] = []

    @property
    def steps(self) -> list[int]:
        return self.krylov.status.tolist()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()
    allocate, lanczos, read = triton_norm._allocate, kernels.launch_lanczos, triton_norm.Run.read

    def allocate_and_keep(*args: Any) -> Any:
        found.lanczos, found.tiles, found.capacities = 0, [], []
        found.krylov = allocate(*args)
        return found.krylov

    def count(work: Any, krylov: Any, *args: Any) -> None:
        found.lanczos += 1
        found.krylov = krylov
        found.capacities.append(len(krylov.basis))
        lanczos(work, krylov, *args)

    def read_and_count(run: Any, *args: Any, all_matrices: bool = False) -> None:
        found.tiles.append(len((run.work if all_matrices else run._active).tiles))
        read(run, *args, all_matrices=all_matrices)

    monkeypatch.setattr(triton_norm, "_allocate", allocate_and_keep)
    monkeypatch.setattr(kernels, "launch_lanczos", count)
    monkeypatch.setattr(triton_norm.Run, "read", read_and_count)
    return found


def oracle_steps(w: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """It solves one eigenproblem a step."""
    count = 0
    eigh = torch.linalg.eigh

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return eigh(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", counted)
        op.spectral_norm_ref(w, **options)
    return count


def close_values() -> Tensor:
    """The two largest 1e-4 apart."""
    values = torch.cat(
        [torch.tensor([1.0, 1 - 1e-4]), 0.5 * torch.rand(20, generator=torch.Generator().manual_seed(3))]
    )
    return with_values("close", 40, 30, values.tolist()).float()


MATRICES: dict[str, Callable[[], Tensor]] = {
    "square": lambda: gaussian("square", 40, 40).float(),
    "wide": lambda: gaussian("wide", 9, 60).float(),  # stops where the space is invariant, after 9 or 10
    "several_panels": lambda: gaussian("several_panels", 10, 1100).float(),  # more than PANEL_COLUMNS and VECTOR
    "tall": lambda: gaussian("tall", 60, 9).float(),  # at k + 1 = n
    "one_column": lambda: gaussian("one_column", 12, 1).float(),
    "rank_one": lambda: with_values("rank_one", 12, 9, [2.5]).float(),
    "repeated": lambda: with_values("repeated", 20, 16, [2, 2, 2, 1.5, 1, 0.5]).float(),
    "identity": lambda: torch.eye(12),
    "decaying": lambda: with_values("decaying", 40, 30, [3 / (i + 1) ** 0.5 for i in range(30)]).float(),
    "close": close_values,
    "tiny": lambda: 1e-18 * gaussian("tiny", 20, 30).float(),
    "huge": lambda: 1e18 * gaussian("huge", 20, 30).float(),
}


FAST = ("square", "tiny", "huge")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in MATRICES])
def test_as_many_steps_as_the_oracle(name: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    w = MATRICES[name]()
    sigma, bound, u, v = spectral_norm(w, return_bound=True, return_vectors=True)
    truth = svd(w)
    # Measured: 4 EPS; close, 2e-9 above rounding.
    assert error(sigma, truth.sigma) <= (TOL / 10 + 8 * EPS) * truth.sigma
    assert truth.sigma <= sigma.item() + bound.item()
    assert error(v.double().norm(), 1.0) <= 2 * EPS and error(u.double().norm(), 1.0) <= 2 * EPS
    expected = op.spectral_norm_ref(w)
    assert bound.item() <= 2 * expected[1].item() + 8 * EPS * truth.sigma
    # Every second step is looked at; rounding may move the end by one more.
    assert abs(seen.steps[0] - oracle_steps(w, monkeypatch)) <= 2
    if name in ("tall", "one_column"):
        assert seen.steps == [w.shape[1]]


@pytest.mark.slow
def test_matrices_that_are_done_are_read_no_more(seen: Seen) -> None:
    """Hard ones among easy ones, of two dtypes; each ends as if it were alone."""
    names = ["square", "rank_one", "close", "decaying"]
    weights = [MATRICES[name]() for name in names]
    weights += [torch.zeros(3, 4), weights[3].bfloat16(), torch.full((2, 2), math.nan), torch.zeros(0, 3)]
    together = spectral_norm(weights)
    steps, tiles = seen.steps, seen.tiles
    truth = torch.tensor([svd(w).sigma if i not in (4, 6, 7) else 0.0 for i, w in enumerate(weights)])
    truth[6] = math.nan
    torch.testing.assert_close(together, truth, rtol=TOL, atol=0, equal_nan=True)
    assert steps[4] == steps[6] == steps[7] == 1 and steps[1] == 2 < steps[3] < steps[0]
    # Until the first look all tiles of both dtypes, then those of four matrices, then those of one, then all again.
    check = triton_norm.CHECK
    assert check < steps[5] <= 2 * check < max(steps) <= 3 * check
    assert tiles[: 2 * check] == tiles[:2] * check
    assert tiles[2 * check : 4 * check] == tiles[2 * check : 2 * check + 2] * check
    assert tiles[2 * check] < tiles[0] and tiles[2 * check + 1] == tiles[1]
    assert tiles[4 * check : 5 * check] == tiles[4 * check : 4 * check + 1] * check
    assert tiles[4 * check] < tiles[2 * check] and tiles[5 * check :] == tiles[:2]
    for i in (0, 2, 3, 5):
        assert error(spectral_norm(weights[i]), together[i].double()) <= 4 * EPS * together[i].item()
        assert seen.steps == [steps[i]]


@pytest.mark.slow
def test_looks_once_every_check_steps(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor.cpu() is the only way in which this file waits for the device."""
    looks = 0
    cpu = Tensor.cpu

    def counted(x: Tensor) -> Tensor:
        nonlocal looks
        looks += 1
        return cpu(x)

    monkeypatch.setattr(Tensor, "cpu", counted)
    spectral_norm([MATRICES["square"](), MATRICES["wide"]()])
    assert seen.lanczos % triton_norm.CHECK == 0 and looks == seen.lanczos // triton_norm.CHECK > 1
    assert seen.lanczos - max(seen.steps) < triton_norm.CHECK


@pytest.mark.slow
def test_the_basis_grows(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    w = MATRICES["square"]()
    expected = spectral_norm(w)
    monkeypatch.setattr(triton_norm, "CAPACITY", 2)
    assert spectral_norm(w).item() == expected.item()
    assert set(seen.capacities) >= {4, 8, 16} and seen.capacities == sorted(seen.capacities)
    assert seen.capacities[0] == 2 and seen.capacities[-1] <= 40


@pytest.mark.parametrize("max_iter", [1, 2, 5, 8])
def test_max_iter_is_warned_of(max_iter: int, seen: Seen) -> None:
    w = MATRICES["square"]()
    message = f"spectral_norm: 2 of 3 matrices had not converged to tol=1e-06 after {max_iter} reads"
    with pytest.warns(RuntimeWarning, match=message):
        sigma, bound = spectral_norm([w, torch.eye(5), w], max_iter=max_iter, return_bound=True)
    assert seen.steps == [-max_iter, 1, -max_iter] and seen.lanczos == max_iter
    with pytest.warns(RuntimeWarning, match="1 of 1"), use_backend("reference"):
        expected = spectral_norm(w, max_iter=max_iter)
    assert error(sigma[0], expected.double()) <= 8 * EPS * expected.item()
    assert sigma[0].item() < svd(w).sigma * (1 - 1e-4) and error(sigma[1], 1.0) <= 8 * EPS


def test_the_vectors_stay_orthogonal(seen: Seen) -> None:
    """Where little is left of z, the rounding of one projection is not: one alone leaves 2e-3 here."""
    w = with_values("far_apart", 60, 50, [1.0] + [0.03 * 0.9**i for i in range(49)]).float()
    with pytest.warns(RuntimeWarning, match="1 of 1"):
        spectral_norm(w, tol=1e-30, max_iter=14)
    basis = seen.krylov.basis[:14].double()
    assert error(basis @ basis.T, torch.eye(14)) <= 4 * EPS  # measured 0.3 EPS


@pytest.mark.parametrize("k", [1, 2, 7, 24])
def test_the_tridiagonal_problem(k: int, seen: Seen) -> None:
    """theta and s of the projected matrix, against LAPACK."""
    w = MATRICES["square"]()
    with pytest.warns(RuntimeWarning, match="1 of 1"):
        spectral_norm(w, tol=1e-12, max_iter=k)
    entries = seen.krylov.projected[:k, 0]
    alpha, beta = entries[:, kernels.ALPHA.value], entries[: k - 1, kernels.BETA.value]
    values, vectors = torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
    low, high, _ = seen.krylov.bracket[0].tolist()
    theta = values[-1].item()
    assert low <= theta * (1 + 1e-14) and theta * (1 - 1e-14) <= high <= theta * (1 + 2e-13)
    s = entries[:, kernels.COMPONENT.value]
    assert error(s / s.norm(), vectors[:, -1].abs()) <= 1e-10  # measured 2e-12
    product = w.double().T @ (w.double() @ seen.krylov.basis[:k].double().T)  # (n, k)
    assert (
        error(seen.krylov.basis[:k].double() @ product, torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
        <= 1e-4 * theta
    )


def test_a_regularizer_starts_converged(seen: Seen) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.LayerNorm(12), torch.nn.Linear(12, 5))
    reg = SpectralRegularizer(model, strength=1.0)
    assert seen.lanczos > 0
    for name, sigma in reg.sigmas().items():
        truth = svd(model.get_parameter(name)).sigma
        assert error(torch.as_tensor(sigma).flatten(), torch.tensor([truth])) <= 1e-5 * truth
