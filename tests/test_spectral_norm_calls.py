"""Calls of spectral_norm: what is warned of and where, long sums, what a large max_iter costs."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from helpers import BF16, F32, NAMES, error, gaussian, generator, same_bits, svd
from torch import Tensor, nn

from spectral_ops import conv_spectral_norm, spectral_norm

TOL = 1e-6
# Triton has no kernel for conv operators and none for float64; long matrices take minutes in the interpreter.
on_a_cpu = pytest.mark.parametrize("backend", ["reference", "native"], indirect=True)


class Divided(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / spectral_norm(w, max_iter=3)


@on_a_cpu
def test_the_warning_names_the_line_that_called(backend: str) -> None:
    """So that Python, which shows a warning once for a line, shows it for every call."""
    w = gaussian("hard", 60, 50).float().requires_grad_()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        first = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        spectral_norm(w, max_iter=3)
        spectral_norm(w.detach(), max_iter=3)
        conv_spectral_norm(w.view(60, 10, 5), 20, max_iter=3)
        nn.utils.parametrize.register_parametrization(nn.Linear(50, 60), "weight", Divided())
    lines = [(x.filename, x.lineno) for x in caught if issubclass(x.category, RuntimeWarning)]
    divided = Divided.forward.__code__.co_firstlineno + 1
    assert lines == [*((__file__, first + i) for i in range(3)), (__file__, divided)]


@on_a_cpu
@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
@pytest.mark.parametrize("n", [1, 4])
def test_many_rows(backend: str, n: int, dtype: torch.dtype) -> None:
    """Of one sign: the error of a float32 sum grows with its length. The oracle was 2e-5 low in float32."""
    w = torch.rand(200_000, n, generator=generator("many")).to(dtype)
    truth = svd(w).sigma
    sigma, bound = spectral_norm(w, return_bound=True)
    assert error(sigma, truth) <= TOL * truth  # measured 6e-8
    assert truth - sigma.item() <= bound.item() <= 1e-5 * truth


def test_more_reads_allowed_than_a_square_of_them_has_memory(backend: str) -> None:
    w = gaussian("reads", 5, 4).float()
    assert same_bits(spectral_norm(w, max_iter=10**6), spectral_norm(w))


@on_a_cpu
def test_a_second_derivative_of_the_norm_itself_is_refused(backend: str) -> None:
    """Its gradient u v' is no constant, which is what it would be if the graph forgot the weight."""
    for call in (spectral_norm, lambda w: conv_spectral_norm(w[:, :, None], 5)):
        with pytest.raises(RuntimeError, match="^spectral_norm: expected one differentiation, got a second one"):
            torch.autograd.functional.hessian(call, gaussian("second", 6, 4))
