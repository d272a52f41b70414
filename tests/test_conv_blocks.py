"""The blocks of the CUDA kernels for conv operators (csrc/conv_block.h), emulated thread by thread on the CPU.

What a device adds is memory order and speed: tests/test_conv_cuda.py, on one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conv_samples import MIXED, OPS, SAMPLES, UNSEEN, ConvSample, Problem
from helpers import BF16, F16, F32, F64, NAMES, same_bits
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops import conv_cuda, layer_table

# float32 sums in another order than the oracle's; products of float16 and bfloat16 are exact in it. Outputs are rounded
# once to the gradient's type.
CLOSE = {F32: 2e-5, F16: 2e-3, BF16: 2e-2}
STRENGTH = 0.3


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if backends.available()["native"] is not None:
        pytest.skip(f"native not usable: {backends.available()['native']}")
    monkeypatch.setattr(layer_table, "EMULATE_CONV", True)
    layer_table._table.cache_clear()
    yield
    layer_table._table.cache_clear()


def everything(problem: Problem, backend: str) -> list[Tensor]:
    """What the ops return and change: value, sigma, u, v, exponents, gradients of both forms."""
    with backends.use_backend(backend):  # type: ignore[arg-type]
        out = list(OPS.spectral_penalty(*problem.arguments()))
        numbers = problem.layouts, problem.targets, problem.scales, 2.0
        upstream = torch.tensor(0.7, dtype=problem.v.dtype)
        out += OPS.spectral_penalty_backward(upstream, problem.weights, *out[1:4], *numbers)
        out += problem.steps(2)
        gradients = [torch.ones_like(w) for w in problem.weights]
        kept = problem.v.clone(), problem.exponents.clone()
        value, sigma = problem.accumulate(gradients, STRENGTH)
        out += [value, sigma, *gradients, problem.v.clone(), problem.exponents.clone()]
        problem.v.copy_(kept[0])
        problem.exponents.copy_(kept[1])
    return out


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert ((x.double() - y.double()).norm() <= CLOSE[dtype] * y.double().norm() + 1e-30).item()


@pytest.mark.parametrize("dtype", CLOSE, ids=NAMES.get)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_kind_of_layer(sample: ConvSample, dtype: torch.dtype) -> None:
    problem = Problem([sample], dtype)
    assert_close(everything(problem, "native"), everything(problem, "reference"), dtype)


# Rows and lanes beyond one tile of every shape, sums of several slices, one row, few lanes.
LARGE = {
    "wide": ConvSample((12, 13), (3, 3), 20, 70, padding=1),
    "tall": ConvSample((5, 6), (3, 3), 30, 140, padding=1),
    "narrow": ConvSample((4, 4), (3, 3), 60, 260, padding=1),
    "flat": ConvSample((20, 20), (3, 3), 16, 16, padding=1, groups=2),
    "joined thrice": ConvSample((4, 4), (3, 3), 530, 4, padding=1),  # 38 slices: 7 joins, then 2, then 1
    "depthwise": ConvSample((25, 27), (7, 7), 3, 3, padding=3, groups=3),
    "strided": ConvSample((23, 22), (3, 3), 40, 66, padding=1, stride=2),
    "transposed": ConvSample((9, 8), (4, 4), 40, 66, padding=1, stride=2, transposed=True),
}


@pytest.mark.parametrize("name", LARGE)
def test_many_tiles_and_slices(name: str) -> None:
    problem = Problem([LARGE[name]], F32)
    assert_close(everything(problem, "native"), everything(problem, "reference"), F32)


def test_units_of_more_terms_than_are_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_cuda, "EMULATED_MULTIPROCESSORS", 1)
    problem = Problem([ConvSample((16, 16), (3, 3), 64, 64, padding=1)], F32)  # 2 slices of 288 terms; 128 staged
    assert_close(everything(problem, "native"), everything(problem, "reference"), F32)


def test_more_multiprocessors_cut_the_work_finer() -> None:
    sample = ConvSample((32, 32), (3, 3), 64, 64, padding=1)
    table = layer_table.LayerTable([sample.layout], [1.0], [1.0]).native.table([sample.weight(F32)], ())
    few, many = table.blocks(1).workspace_bytes, table.blocks(132).workspace_bytes
    assert many > few  # sums of slices, to be joined


def test_any_order_of_blocks_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_cuda, "EMULATED_MULTIPROCESSORS", 40)
    problem = Problem([*MIXED, LARGE["strided"], LARGE["narrow"]], F32)
    first = everything(problem, "native")
    for seed in range(1, 4):
        layer_table._table.cache_clear()
        monkeypatch.setattr(conv_cuda.ConvCudaTable, "seed", seed)
        for x, y in zip(everything(problem, "native"), first, strict=True):
            assert same_bits(x, y)


def test_a_skipped_step_changes_nothing() -> None:
    problem = Problem(MIXED, F32)
    with backends.use_backend("native"):
        gradients = [torch.randn_like(w) for w in problem.weights]
        before = [x.clone() for x in (*gradients, problem.v, problem.exponents)]
        scale, found_inf = torch.tensor(2.0), torch.tensor(1.0)
        value, sigma = problem.accumulate(gradients, STRENGTH, scale, found_inf)
    assert all(same_bits(x, y) for x, y in zip((*gradients, problem.v, problem.exponents), before, strict=True))
    assert (sigma == -1).all() and value.isfinite()


def test_the_scale_multiplies_the_gradient_alone() -> None:
    problem = Problem(MIXED, F32)
    with backends.use_backend("native"):
        plain, scaled = ([torch.zeros_like(w) for w in problem.weights] for _ in range(2))
        state = problem.v.clone(), problem.exponents.clone()
        value, _ = problem.accumulate(plain, STRENGTH)
        problem.v.copy_(state[0])
        problem.exponents.copy_(state[1])
        same, _ = problem.accumulate(scaled, STRENGTH, torch.tensor(4.0), torch.tensor(0.0))
    assert torch.equal(value, same)
    for x, y in zip(plain, scaled, strict=True):
        assert torch.equal(4.0 * x, y)  # a power of two


@pytest.mark.parametrize(("mode", "transposed"), [("zeros", False), ("circular", False), ("zeros", True)])
@pytest.mark.parametrize("dims", [1, 2])
def test_every_small_geometry(dims: int, mode: str, transposed: bool) -> None:
    problem = Problem.of_windows(dims, mode, transposed)
    assert_close(everything(problem, "native"), everything(problem, "reference"), F32)


@pytest.mark.parametrize("sample", UNSEEN, ids=str)
def test_windows_that_see_nothing_but_padding(sample: ConvSample) -> None:
    problem = Problem([sample], F32)
    assert_close(everything(problem, "native"), everything(problem, "reference"), F32)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-22, 1e22, 1e30, float("nan"), float("inf")])
def test_weights_at_the_ends_of_the_range(factor: float) -> None:
    problem = Problem(MIXED, F32)
    problem.weights = [factor * w if i % 2 else w for i, w in enumerate(problem.weights)]
    found, expected = everything(problem, "native"), everything(problem, "reference")
    for i in (1, 2, 3):  # sigma, u, v: R and its gradient leave float32 with sigma^4
        x, y = found[i].double(), expected[i].double()
        assert torch.equal(x.isfinite(), y.isfinite())
        x, y = x.nan_to_num(0.0, 0.0, 0.0), y.nan_to_num(0.0, 0.0, 0.0)
        assert (x - y).abs().max() <= CLOSE[F32] * y.abs().max()


def test_float64_is_refused() -> None:
    assert backends.NATIVE_ON_CUDA
    problem = Problem(MIXED[:1], F64)
    with backends.use_backend("native"), pytest.raises(ValueError, match="got float64"):
        problem.steps()


def test_a_layer_without_channels_is_named() -> None:
    sample = ConvSample((4, 4), (3, 3), 0, 2)
    problem = Problem([sample], F32)
    with backends.use_backend("native"), pytest.raises(ValueError, match=r"expected weights\[0\] to have channels"):
        problem.steps()


def test_no_launch_comes_between_those_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads with the same layers share a workspace, which a step of several launches reads from one to the next."""
    problem = Problem(MIXED, F32)
    expected = OPS.spectral_penalty(*problem.arguments())
    found: list[list[Tensor]] = []
    inside: list[int] = []
    most = 0
    launch = conv_cuda.ConvCudaTable._launch

    def slow(*args: Any, **options: Any) -> None:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        time.sleep(0.05)
        launch(*args, **options)
        inside.pop()

    monkeypatch.setattr(conv_cuda.ConvCudaTable, "_launch", slow)
    threads = [
        threading.Thread(target=lambda: found.append(OPS.spectral_penalty(*problem.arguments()))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and len(found) == 3
    assert all(same_bits(x, y) for other in found for x, y in zip(expected, other, strict=True))
