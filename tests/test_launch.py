"""Launches past Triton are those that Triton would make: same compilation, same arguments. A driver that runs nothing.

Everything runs in a process where Triton compiles; what it returns was compared there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from fake_driver import FakeDriver, Launch, counted_launches_by_triton, install, process  # noqa: E402

from spectral_ops.kernels import penalty, penalty_backward, spectral_norm  # noqa: E402
from spectral_ops.kernels.launch import launch  # noqa: E402


@pytest.fixture(scope="module")
def compiling() -> Iterator[ProcessPoolExecutor]:
    with process() as made:
        yield made


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["anywhere"])
def _sample_kernel(x, anywhere, scale, count, number, VARIANTS: tl.constexpr, TYPE: tl.constexpr):
    for i in tl.static_range(len(VARIANTS)):
        value = number * VARIANTS[i][0] + count
        if anywhere is not None:
            value += tl.load(anywhere).to(tl.float32)
        if scale is not None:
            value *= tl.load(scale)
        tl.store(x + i, value.to(TYPE))


STORE = torch.zeros(64, dtype=torch.float64)
TENSORS = {
    "float32": STORE.view(torch.float32)[:4],
    "float32 at 4": STORE.view(torch.float32)[1:5],
    "float32 at 8": STORE.view(torch.float32)[2:6],
    "float64": STORE[4:8],
}
AXES: list[list[Any]] = [
    list(TENSORS),
    [None, "float32", "float32 at 4", "float64"],
    [None, "float32"],
    [1, 16, 7, 2**31 - 1, 2**31],
    [1.0, 0.5],
    [((1, True),), ((1, True), (2, False))],
    [4, 8],
]


def arguments(x: str, anywhere: Any, scale: Any, count: int, number: float, variants: Any, warps: int) -> Any:
    tensors = [None if name is None else TENSORS[name] for name in (x, anywhere, scale)]
    return (*tensors, count, number), {"VARIANTS": variants, "TYPE": tl.float32, "num_warps": warps}


def one_axis_at_a_time(axes: list[list[Any]]) -> list[tuple[Any, ...]]:
    usual = [axis[0] for axis in axes]
    return [(*usual[:i], value, *usual[i + 1 :]) for i, axis in enumerate(axes) for value in axis]


def last(driver: FakeDriver, call: Callable[[], object]) -> Launch:
    before = len(driver.launches)
    call()
    assert len(driver.launches) == before + 1
    return driver.launches[-1]


def samples_compared() -> None:
    driver = install()
    # Both orders of any two: the second must not take the first one's compilation.
    cases = [arguments(*values) for values in one_axis_at_a_time(AXES)]
    cases += [arguments(*pair) for pair in itertools.product(*(axis[:2] for axis in AXES))]
    with counted_launches_by_triton() as calls:
        for values, named in (*cases, *reversed(cases)):
            launch(_sample_kernel, 3, *values, **named)
        kinds = len(calls)
        assert kinds < len(cases)
        for programs, (values, named) in enumerate(cases, 1):
            found = last(driver, lambda v=values, n=named, p=programs: launch(_sample_kernel, p, *v, **n))
            assert len(calls) == kinds
            expected = last(driver, lambda v=values, n=named, p=programs: _sample_kernel[(p,)](*v, **n))
            assert found == expected
            calls.pop()
    assert len({case.function for case in driver.launches}) > 8  # compilations


def surroundings_compared() -> None:
    driver = install()
    values, named = arguments(*(axis[0] for axis in AXES))

    def both() -> Launch:
        found = last(driver, lambda: launch(_sample_kernel, 2, *values, **named))
        assert found == last(driver, lambda: _sample_kernel[(2,)](*values, **named))
        return found

    both()
    first = both()
    driver.stream = 200
    other_stream = both()
    assert (first.stream, other_stream.stream) == (100, 200) and first.function == other_stream.function
    driver.device = 1
    both()
    other_device = both()
    assert other_device.stream == 201 and (other_device.function // 1000, first.function // 1000) == (1, 0)
    driver.device, driver.stream = 0, 100
    assert both() == first


def settings_compared() -> None:
    from triton import knobs

    driver = install()
    values, named = arguments(*(axis[0] for axis in AXES))

    def again() -> Launch:
        return last(driver, lambda: launch(_sample_kernel, 2, *values, **named))

    first = again()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        debug = again()
        assert debug.function != first.function and again() == debug
    assert again() == first


def hooks_called() -> None:
    from triton import knobs

    driver = install()
    values, named = arguments(*(axis[0] for axis in AXES))
    seen: list[Any] = []
    launch(_sample_kernel, 2, *values, **named)
    with counted_launches_by_triton() as calls, pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.runtime.launch_enter_hook, "calls", [lambda data: seen.append(data.get()["name"])])
        patch.setattr(knobs.runtime.launch_exit_hook, "calls", [lambda data: seen.append(data.get()["stream"])])
        launch(_sample_kernel, 2, *values, **named)
        assert calls == [] and seen == ["_sample_kernel", driver.stream]
        patch.setattr(_sample_kernel, "pre_run_hooks", [lambda *args, **named: seen.append("before")])
        launch(_sample_kernel, 2, *values, **named)
        assert len(calls) == 1 and seen[2:] == ["before", "_sample_kernel", driver.stream]


@pytest.mark.parametrize("compared", [samples_compared, surroundings_compared, settings_compared, hooks_called])
def test_a_launch_is_that_of_triton(compiling: ProcessPoolExecutor, compared: Callable[[], None]) -> None:
    compiling.submit(compared).result()


# ---- the launchers of kernels/ ----


def thrice(driver: FakeDriver, counts: dict[str, list[int]]) -> Callable[..., None]:
    """In place of `launch`: by Triton, then as it is, twice; how often each kernel went to Triton, of how often."""

    def compare(kernel: Any, programs: int, *args: Any, **named: Any) -> None:
        with counted_launches_by_triton() as calls:
            expected = last(driver, lambda: kernel[(programs,)](*args, **named))
            found = [last(driver, lambda: launch(kernel, programs, *args, **named)) for _ in range(2)]
        assert found == [expected, expected]
        count = counts.setdefault(kernel.fn.__name__, [0, 0])
        count[0] += len(calls) - 1
        count[1] += 2

    return compare


def steps() -> None:
    from spectral_ops.ops import triton_table
    from spectral_ops.ops.layer_table import LayerTable
    from spectral_ops.ops.layout import Kind, Layout
    from spectral_ops.ops.state import State

    weights = [torch.randn(20, 32), torch.randn(9)]
    gradients = [torch.zeros(20, 32), torch.zeros(9)]
    table, other = (LayerTable([Layout(), Layout(Kind.BIAS)], [1.0, 1.0], [1.0, 1.0]).triton for _ in range(2))
    v, exponents, sigma = torch.ones(33), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    aligned, odd = v[:32], v[1:]

    def step(v: torch.Tensor = aligned, strength: Any = 0.1, **options: Any) -> None:
        table.step(weights, gradients, State(v, v, exponents, exponents, sigma, None), 2.0, strength, **options)

    step()
    step(strength=0.2)
    step(strength=torch.tensor(0.1))
    step(strength=torch.zeros(3, dtype=torch.float64)[1])
    step(grad_scale=2.0, found_inf=torch.zeros(()))
    step(grad_scale=torch.tensor(2.0))
    step(odd)
    gradients[1] = torch.zeros(9)  # other addresses in the rows
    step()
    other.step(weights, gradients, State(aligned, aligned, exponents, exponents, sigma, None), 2.0)
    kept = State(aligned, torch.zeros(32), exponents, exponents, torch.zeros(1), torch.zeros(20))
    for _ in range(2):
        table.step(weights, (), kept, 2.0, sigma_state=sigma)
        table.backward(weights, gradients, kept.sigma, kept.u, kept.v_out, 2.0, torch.ones(2)[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_table, "debug_settings", lambda: {"debug": True, "looks": 10, "delays": 2**31})
        patch.setattr(triton_table, "check_stopped", lambda *args: None)
        step()


def norms() -> None:
    from spectral_ops.ops import triton_norm
    from spectral_ops.ops.layer_table import LayerTable
    from spectral_ops.ops.layout import Layout

    weights = [torch.randn(20, 32), torch.randn(20, 32)]
    table = LayerTable([Layout(), Layout()], [1.0, 1.0], [1.0, 1.0]).triton
    sigma = torch.zeros(2)
    made = triton_norm.Norms(sigma, sigma.clone(), torch.zeros(40), torch.zeros(64), torch.zeros(2, dtype=torch.int32))
    krylov = triton_norm._allocate(made, 4)
    ((_, work),) = table.works(weights, 2.0)
    spectral_norm.launch_start(work, krylov)
    for k in range(3):
        spectral_norm.launch_lanczos(work, krylov, k, 1e-5, 10 ** (9 + k))
    spectral_norm.launch_ritz(work, krylov)
    spectral_norm.launch_bound(work, krylov.q, made.v, made.u, made.sigma, made.bound)


def compared(run: Callable[[], None]) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    compare = thrice(install(), counts)
    with pytest.MonkeyPatch.context() as patch:
        for module in (penalty, penalty_backward, spectral_norm):
            patch.setattr(module, "launch", compare)
        run()
    return counts


@pytest.mark.slow
def test_steps_are_launched_as_by_triton(compiling: ProcessPoolExecutor) -> None:
    counts = compiling.submit(compared, steps).result()
    # Kinds: as it is, two strengths from tensors, two grad_scales, v at an odd place, the value alone, debug.
    assert counts == {"_penalty_kernel": [8, 24], "_penalty_backward_kernel": [1, 4]}


def test_norms_are_launched_as_by_triton(compiling: ProcessPoolExecutor) -> None:
    counts = compiling.submit(compared, norms).result()
    # max_iter leaves int32.
    expected = {"_start_kernel": [1, 2], "_lanczos_kernel": [2, 6], "_ritz_kernel": [1, 2], "_bound_kernel": [1, 2]}
    assert counts == expected
