"""Who runs an op: every branch of the choice, every message."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from spectral_ops import backends
from spectral_ops.backends import available, choose, explain, native, use_backend

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
OP = "power_iteration"


@pytest.fixture(autouse=True)
def _default_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SPECTRAL_OPS_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_chosen", None)
    caches = (backends._warn_not_built, backends._warn_no_triton, backends._triton_on_cuda)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: Any = ModuleType("spectral_ops._native")
    module.getenv = os.environ.get
    monkeypatch.setattr(backends, "_import_native", lambda: module)
    return module


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> ImportError:
    error = ModuleNotFoundError("No module named 'spectral_ops._native'")
    monkeypatch.setattr(backends, "_import_native", lambda: error)
    return error


@pytest.fixture
def triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton were installed and one op had a kernel."""
    monkeypatch.setattr(backends, "IN_TRITON", frozenset({OP}))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("device", "op", "expected"),
    [
        (CPU, OP, "native"),
        (CPU, "conv_spectral_norm", "native"),
        (CUDA, "conv_spectral_norm", "reference"),  # not in NATIVE_ON_CUDA
        (CUDA, OP, "reference"),  # not in IN_TRITON
        (META, OP, "reference"),  # a device nothing is built for
    ],
)
def test_auto_with_the_compiled_module(built: ModuleType, device: torch.device, op: str, expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(device, op) == expected
    assert native() is built


def test_auto_without_it_warns_once_and_says_what_to_do(not_built: ImportError) -> None:
    with pytest.warns(RuntimeWarning, match=r"not built; running on plain torch.*Install a C\+\+17 compiler") as caught:
        assert [choose(CPU, OP), choose(CPU, "spectral_norm"), choose(CPU, OP)] == ["reference"] * 3
    assert len(caught) == 1


def test_cuda_without_triton_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    device = torch.device("cuda")
    with pytest.warns(RuntimeWarning, match=r"triton is not installed.*pip install triton") as caught:
        assert backends.choose(device, "accumulate_grad_") == "reference"
        assert backends.choose(device, "spectral_penalty") == "reference"
    assert len(caught) == 1
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        backends.choose(device, "accumulate_grad_")


@pytest.mark.parametrize("quiet", ["meta", "environment", "use_backend"])
def test_no_warning_where_nothing_is_lost_or_reference_was_asked_for(
    not_built: ImportError, quiet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if quiet == "meta":
            assert choose(META, OP) == "reference"
        elif quiet == "environment":
            monkeypatch.setenv("SPECTRAL_OPS_BACKEND", "reference")
            assert choose(CPU, OP) == "reference"
        else:
            with use_backend("reference"):
                assert choose(CPU, OP) == "reference"


def test_native_raises_from_the_recorded_import_error(not_built: ImportError) -> None:
    message = r"native: expected spectral_ops\._native to be importable, got ModuleNotFoundError.*Install a C\+\+17"
    with pytest.raises(RuntimeError, match=message) as raised:
        native()
    assert raised.value.__cause__ is not_built


def test_explicit_native_without_it_raises(not_built: ImportError) -> None:
    message = (
        rf"{OP}: expected backend to be usable and to serve cpu, got 'native', not usable here: ModuleNotFound.*Install"
    )
    with use_backend("native"), pytest.raises(RuntimeError, match=message):
        choose(CPU, OP)


@pytest.mark.parametrize("device", [CUDA, META, torch.device("cuda", 1)])
def test_explicit_native_elsewhere_raises(built: ModuleType, device: torch.device) -> None:
    message = rf"{OP}: expected .* serve {device}, got 'native', which serves cpu\. Use 'auto' or 'reference'\."
    with use_backend("native"), pytest.raises(RuntimeError, match=message):
        choose(device, OP)


def test_explicit_native_for_an_op_without_a_cuda_kernel_raises(built: ModuleType) -> None:
    message = r"conv_spectral_norm: .* got 'native', which serves cpu\. Use 'auto' or 'reference'\."
    with use_backend("native"), pytest.raises(RuntimeError, match=message):
        choose(CUDA, "conv_spectral_norm")


def test_conv_operators_without_the_cuda_sources(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch with one warning under auto, an error for an explicit choice; both say how to get the kernels."""
    op = "conv_accumulate_grad_"
    monkeypatch.setattr(backends, "has_native_cuda", lambda: False)
    backends._warn_no_cuda.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"CUDA sources are not built.* Install the CUDA toolkit \(nvcc\)") as seen:
        assert [choose(CUDA, op), choose(CUDA, op)] == ["reference", "reference"]
    assert len(seen) == 1
    with use_backend("native"), pytest.raises(RuntimeError, match="built without CUDA. Install the CUDA toolkit"):
        choose(CUDA, op)


def test_conv_operators_with_the_cuda_sources(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    op = "conv_accumulate_grad_"
    monkeypatch.setattr(backends, "has_native_cuda", lambda: True)
    assert choose(CUDA, op, torch.float32) == "native"
    assert choose(CUDA, op, torch.float64) == "reference"
    with use_backend("native"), pytest.raises(RuntimeError, match="no float64 kernel on CUDA"):
        choose(CUDA, op, torch.float64)


@pytest.mark.parametrize(
    ("device", "op", "backend"),
    [(CPU, OP, "native"), (CUDA, "conv_accumulate_grad_", "native"), (CUDA, "accumulate_grad_", "triton")],
)
def test_a_step_does_not_wait_for_explanations(
    built: ModuleType, device: torch.device, op: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "has_native_cuda", lambda: True)
    monkeypatch.setattr(backends, "_triton_on_cuda", lambda: True)
    monkeypatch.setattr(backends, "explain", None)
    assert choose(device, op, torch.float32) == backend


@pytest.mark.parametrize("device", [CPU, CUDA, META])
def test_explicit_reference_serves_every_device(built: ModuleType, device: torch.device) -> None:
    with use_backend("reference"):
        assert explain(device, OP) == ("reference", "use_backend")


def test_triton_without_a_kernel_raises() -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"got 'triton', not usable here: .*(kernel|install)"):
        choose(CUDA, OP)


@pytest.mark.usefixtures("triton_kernel")
class TestTritonKernels:
    """The branches that open with the first Triton kernel."""

    def test_auto_on_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert choose(CUDA, OP) == "triton"
        assert choose(CUDA, "spectral_norm") == "reference"
        assert available()["triton"] is None
        with use_backend("triton"), pytest.raises(RuntimeError, match="got 'triton', which serves cuda"):
            choose(CPU, OP)
        with use_backend("triton"), pytest.raises(RuntimeError, match="got 'triton', which has no kernel for it"):
            choose(CUDA, "spectral_norm")

    def test_interpreter_serves_cpu_when_asked_for(self, built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        reason = available()["triton"]
        assert reason is not None and reason.startswith("no CUDA device. TRITON_INTERPRET=1")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with use_backend("triton"):
            assert choose(CPU, OP) == "triton"
        assert choose(CPU, OP) == "native"  # auto does not take the interpreter

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
        assert available()["triton"] == "triton is not installed. pip install triton (Linux)"


def test_environment_chooses_and_use_backend_overrides_it(built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_OPS_BACKEND", "reference")
    assert explain(CPU, OP) == ("reference", "SPECTRAL_OPS_BACKEND")
    with use_backend("native"):
        assert explain(CPU, OP) == ("native", "use_backend")
    with use_backend("auto"):
        assert explain(CPU, OP) == ("native", "auto")
    monkeypatch.setenv("SPECTRAL_OPS_BACKEND", "")
    assert explain(CPU, OP) == ("native", "auto")


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    known = "expected backend to be one of auto, reference, native, triton, got 'cuda'. Name one of these."
    with pytest.raises(ValueError, match=f"use_backend: {known}"):
        use_backend("cuda")  # type: ignore[arg-type]
    monkeypatch.setenv("SPECTRAL_OPS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=f"SPECTRAL_OPS_BACKEND: {known}"):
        choose(CPU, OP)


def test_use_backend_nests_restores_after_an_error_and_sets_for_good(built: ModuleType) -> None:
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("native"):
            assert choose(CPU, OP) == "native"
            raise KeyError
        assert choose(CPU, OP) == "reference"
    assert choose(CPU, OP) == "native"
    use_backend("reference")
    assert choose(CPU, OP) == "reference"


def test_the_choice_reaches_threads_that_autograd_starts(built: ModuleType) -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose(CPU, OP)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_available_lists_every_backend_and_a_reason_for_each_unusable_one(not_built: ImportError) -> None:
    found = available()
    assert list(found) == ["reference", "native", "triton"]
    assert found["reference"] is None
    assert found["native"] is not None and "No module named" in found["native"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_the_compiled_module_shares_torchs_openmp() -> None:
    if available()["native"] is not None:
        pytest.skip(f"native not usable: {available()['native']}")
    code = (
        "from spectral_ops.backends import native; native();"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1].rsplit('/', 1)[-1]})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(loaded) == 1 and "torch" in loaded[0], loaded
