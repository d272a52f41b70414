"""Calls of the public ops that torch would refuse in words of its own, or halfway through; and numbers of any kind."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import gaussian, same_bits
from torch import Tensor

from spectral_ops import conv_norm_bound, conv_spectral_norm, power_iteration, spectral_norm, spectral_penalty
from spectral_ops.ops.checks import check_exponent, check_positive_int, check_target, check_tol

W, V = torch.ones(4, 3), torch.ones(3)


def expect(error: type[Exception], text: str) -> Any:
    """The whole message, word for word."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


# ---- numbers ----


def test_numbers_of_numpy() -> None:
    w, kernel = gaussian("numpy", 6, 4), gaussian("kernel", 4, 2, 3)
    same = [
        [spectral_norm(w, tol=f(0.125), max_iter=i(200)) for f, i in ((float, int), (np.float32, np.int64))],
        [spectral_penalty([w], [V4()], exponent=f(1.5), target=f(0.5)) for f in (float, np.float16, np.longdouble)],
        [power_iteration([w], [V4()], n_iter=i(2))[0] for i in (int, np.uint8)],
        [conv_spectral_norm(kernel, i(5), padding=i(1), stride=(i(2),), groups=i(2)) for i in (int, np.int32)],
        [conv_norm_bound(kernel, [i(5)], dilation=i(2), groups=i(2)).bound for i in (int, np.int32)],
    ]
    for first, *others in same:
        assert all(same_bits(first, x) for x in others)
    for value in (check_exponent("op", np.float32(2)), check_target("op", np.int64(1)), check_tol("op", np.half(0.5))):
        assert type(value) is float
    assert type(check_positive_int("op", "n", np.int16(3))) is int  # type: ignore[arg-type]


def V4() -> Tensor:
    return torch.ones(4, dtype=torch.float64) / 2


@pytest.mark.parametrize("value", [np.bool_(True), np.float64(1.0)])
def test_what_is_no_whole_number(value: Any) -> None:
    text = f"spectral_norm: expected max_iter to be an int, got {type(value).__name__}."
    with expect(TypeError, f"{text} Pass a whole number of at least 1."):
        spectral_norm(W, max_iter=value)
    with pytest.raises(TypeError, match="^conv_spectral_norm: expected input_size to be whole numbers"):
        conv_spectral_norm(W[:, :, None], value)


@pytest.mark.parametrize("value", [2**31, 2**70])
def test_counts_beyond_int32(backend: str, value: int) -> None:
    limit = f"to be at most 2147483647, got {value}. Pass a smaller number."
    with expect(ValueError, f"spectral_norm: expected max_iter {limit}"):
        spectral_norm(W, max_iter=value)
    with expect(ValueError, f"conv_spectral_norm: expected max_iter {limit}"):
        conv_spectral_norm(W[:, :, None], 4, max_iter=value)
    with expect(ValueError, f"power_iteration: expected n_iter {limit}"):
        power_iteration([W], [V.clone()], n_iter=value)
    assert spectral_norm(W, max_iter=2**31 - 1).isfinite()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["target", "exponent"])
def test_numbers_that_change_between_calls_of_a_compiled_step(name: str, dynamic: bool | None) -> None:
    w = gaussian("compiled", 4, 3).float()

    def step(w: Tensor, v: Tensor, number: float) -> Tensor:
        return spectral_penalty([w], [v], **{name: number})

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for number in (1.5, 2.5, 3.25):
        torch.testing.assert_close(compiled(w, V.clone(), number), step(w, V.clone(), number))
