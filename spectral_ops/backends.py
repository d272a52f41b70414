"""Which implementation of an op runs: what is built and usable here, and who decides.

`reference` is plain torch and runs anywhere; `native` is the compiled module of csrc/; `triton` are the kernels of
kernels/. `auto` takes the best that serves the tensor's device; an explicit choice, by `use_backend` or by the
environment variable SPECTRAL_OPS_BACKEND, is followed or raises. Called by op implementations, never traced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType, TracebackType
from typing import Literal

import torch  # before the compiled module: OpenMP is then the one that torch has loaded, with its pool of threads

Backend = Literal["auto", "reference", "native", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "native", "triton")

# Ops of which there are Triton kernels.
IN_TRITON = frozenset({"accumulate_grad_", "adamw_step", "power_iteration", "spectral_norm", "spectral_penalty"})
# Of conv operators, whose kernels are csrc's on every device: of these there is one on CUDA too.
CONV = "conv_"
NATIVE_ON_CUDA = frozenset({"conv_accumulate_grad_", "conv_power_iteration", "conv_spectral_penalty"})

BUILD_REMEDY = "Install a C++17 compiler, then spectral_ops again (SPECTRAL_OPS_NATIVE=1 shows why it is not built)"

CUDA_REMEDY = (
    "Install the CUDA toolkit (nvcc), then spectral_ops again (SPECTRAL_OPS_CUDA=1 shows why it is not built)"
)


@functools.cache
def _import_native() -> ModuleType | ImportError:
    try:
        return importlib.import_module("spectral_ops._native")
    except ImportError as error:  # not built, or built and not loadable: the text tells which
        return error


def native() -> ModuleType:
    """The compiled module. Raises RuntimeError, from the ImportError, where it is not built or cannot be loaded."""
    module = _import_native()
    if isinstance(module, ImportError):
        message = f"native: expected spectral_ops._native to be importable, got {module!r}. {BUILD_REMEDY}."
        raise RuntimeError(message) from module
    return module


def has_native() -> bool:
    """Whether the compiled module can be used. Cheap: asked at every step."""
    return not isinstance(_import_native(), ImportError)


@functools.cache
def has_native_cuda() -> bool:
    """Whether the compiled module holds CUDA kernels."""
    return has_native() and bool(native().built_with()["cuda"])


def op_name(op: str, on_operators: bool) -> str:
    """An op's name to choose a backend by: on conv operators other kernels run than on matrices."""
    return CONV + op if on_operators else op


def getenv(name: str) -> str | None:
    """os.environ.get, which spends two exceptions on a variable that is not set: 25 us after other code has run."""
    module = _import_native()
    return os.environ.get(name) if isinstance(module, ImportError) else module.getenv(name)


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unusable(backend: str) -> str | None:
    """Why `backend` is of no use on this machine; None where it is usable on some device."""
    if backend == "native":
        module = _import_native()
        return f"{module!r}. {BUILD_REMEDY}" if isinstance(module, ImportError) else None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed. pip install triton (Linux)"
        if not IN_TRITON:
            return "no op has a Triton kernel yet. Use 'auto' or 'reference'"
        if not torch.cuda.is_available() and not _interpreted():
            return "no CUDA device. TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly"
    return None


def available() -> dict[str, str | None]:
    """Every backend, with None where it is usable on this machine and otherwise the reason why it is not.

    >>> available()["reference"] is None
    True
    """
    return {backend: _unusable(backend) for backend in BACKENDS if backend != "auto"}


def _refusal(backend: str, device: torch.device, op: str, dtype: torch.dtype | None = None) -> str | None:
    """Why `backend` does not run `op` on `device`, then the remedy; None where it does."""
    if backend == "reference":
        return None
    reason = _unusable(backend)
    if reason is not None:
        return f"{backend!r}, not usable here: {reason}"
    if backend == "native":
        if op in NATIVE_ON_CUDA and device.type == "cuda" and not has_native_cuda():
            return f"'native', which is built without CUDA. {CUDA_REMEDY}"
        on_cuda = op in NATIVE_ON_CUDA and device.type == "cuda"
        serves, has_kernel = "cuda" if on_cuda else "cpu", True
        if on_cuda and dtype == torch.float64:
            return "'native', which has no float64 kernel on CUDA. Use 'auto' or 'reference'"
    else:
        serves, has_kernel = "cpu" if _interpreted() else "cuda", op in IN_TRITON
    if backend == "triton" and dtype == torch.float64:
        return "'triton', which has no float64 kernel. Use 'auto' or 'reference'"
    if device.type != serves:
        return f"{backend!r}, which serves {serves}. Use 'auto' or 'reference'"
    return None if has_kernel else f"{backend!r}, which has no kernel for it. Use 'auto' or 'reference'"


def _check(backend: str, source: str) -> None:
    if backend not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise ValueError(f"{source}: expected backend to be one of {known}, got {backend!r}. Name one of these.")


# Process-wide, not per thread or context: autograd runs backward on threads of its own, which see no context variable
# of the caller.
_chosen: Backend | None = None


class use_backend:
    """Chooses the backend of all ops from now on; as a context manager, until the block ends. Process-wide.

    Args:
        backend: "auto", "native", "triton" or "reference" (plain torch). `auto` also overrides SPECTRAL_OPS_BACKEND.

    Raises:
        ValueError: an unknown name. A backend that cannot serve an op raises RuntimeError when that op is called.

    Example:
        >>> from spectral_ops import spectral_norm
        >>> with use_backend("reference"):
        ...     spectral_norm(torch.diag(torch.tensor([2.0, 1.0]))).item()
        2.0
    """

    def __init__(self, backend: Backend) -> None:
        global _chosen
        _check(backend, "use_backend")
        self._previous = _chosen
        _chosen = backend

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._previous


def _wanted() -> tuple[str, str]:
    """The backend asked for, and by what."""
    if _chosen is not None:
        return _chosen, "use_backend"
    backend = os.environ.get("SPECTRAL_OPS_BACKEND") or "auto"
    _check(backend, "SPECTRAL_OPS_BACKEND")
    return backend, "default" if backend == "auto" else "SPECTRAL_OPS_BACKEND"


def explain(device: torch.device, op: str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """(backend, why) for `op` on tensors of `device`: what `choose` returns, with the reason; never warns.

    Raises:
        RuntimeError: an explicit choice that is not built, or does not serve this device or op.
        ValueError: SPECTRAL_OPS_BACKEND holds an unknown name.
    """
    backend, source = _wanted()
    if backend != "auto":
        refusal = _refusal(backend, device, op, dtype)
        if refusal is not None:
            raise RuntimeError(f"{op}: expected backend to be usable and to serve {device}, got {refusal}.")
        return backend, source
    best = {"cpu": "native", "cuda": "native" if op.startswith(CONV) else "triton"}.get(device.type)
    if best is None:
        return "reference", f"auto: nothing faster is built for {device.type}"
    refusal = _refusal(best, device, op, dtype)
    return (best, "auto") if refusal is None else ("reference", f"auto: not {refusal}")


@functools.cache  # a device that is there stays there
def _triton_on_cuda() -> bool:
    return not _interpreted() and _unusable("triton") is None


@functools.cache  # once in a process, whatever the warning filters say
def _warn_not_built() -> None:
    warnings.warn(
        "spectral_ops: the compiled CPU kernels are not built; running on plain torch, more slowly. "
        f"{BUILD_REMEDY}; SPECTRAL_OPS_BACKEND=reference silences this. `spectral-ops doctor` tells more.",
        RuntimeWarning,
        stacklevel=3,
    )


@functools.cache
def _warn_no_triton() -> None:
    warnings.warn(
        "spectral_ops: triton is not installed; CUDA tensors run on plain torch, in many launches instead of "
        "one. pip install triton (Linux); SPECTRAL_OPS_BACKEND=reference silences this.",
        RuntimeWarning,
        stacklevel=3,
    )


@functools.cache
def _warn_no_cuda() -> None:
    warnings.warn(
        "spectral_ops: the CUDA sources are not built; conv operators on CUDA run on plain torch, layer by layer. "
        f"{CUDA_REMEDY}; SPECTRAL_OPS_BACKEND=reference silences this.",
        RuntimeWarning,
        stacklevel=3,
    )


def choose(device: torch.device, op: str, dtype: torch.dtype | None = None) -> str:
    """The backend that runs `op` on tensors of `device`: 'reference', 'native' or 'triton'.

    Under `auto`, cpu takes native and cuda takes triton where there is such a kernel; everything else, reference. That
    the compiled module, or triton, is missing is warned of once.

    Args:
        device: where the op's tensors are.
        op: the name of the public function, for the tables of kernels and for errors.
        dtype: of the op's vectors; None for any that is not float64, of which there are no Triton kernels.

    Raises:
        RuntimeError: an explicit choice that is not built, or does not serve this device, op or dtype.
        ValueError: SPECTRAL_OPS_BACKEND holds an unknown name.

    Example:
        >>> choose(torch.device("meta"), "power_iteration")
        'reference'
    """
    # Every step comes through here, nearly always with nothing chosen: not by the whole of explain(), which takes
    # 1.9 us on a CPU, and 25 where other code had run before (EPYC 9004, 2026-11).
    if _chosen is None and getenv("SPECTRAL_OPS_BACKEND") in (None, "", "auto"):
        kind = device.type  # a string made anew
        if kind == "cpu" and has_native():
            return "native"
        if kind == "cuda" and dtype != torch.float64:
            if op in IN_TRITON and _triton_on_cuda():
                return "triton"
            if op in NATIVE_ON_CUDA and has_native_cuda():
                return "native"
    backend, _ = explain(device, op, dtype)
    if backend == "reference" and _wanted()[0] == "auto":
        if device.type == "cpu" and isinstance(_import_native(), ImportError):
            _warn_not_built()
        elif device.type == "cuda" and op in NATIVE_ON_CUDA and not has_native_cuda():
            _warn_no_cuda()
        elif device.type == "cuda" and op in IN_TRITON and importlib.util.find_spec("triton") is None:
            _warn_no_triton()
    return backend
