"""Kernels compiled ahead of time, without a GPU, and what came of it: registers, spills, shared memory, PTX.

Compilers run in processes of their own, so that TRITON_INTERPRET of the tests' process does not reach them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Variant = tuple[int, int, int, int, bool]  # kernels/table.py: (mode, A, pieces, P, aligned)
ReadVariant = tuple[int, int, int, int, bool, int]  # ... and copies of z

# The names of Work's and launch_penalty's arguments, where they are pointers.
POINTERS = {
    "rows": "*i64",
    "tiles": "*i32",
    "counters": "*i32",
    "space": "*fp32",
    "sums": "*fp64",
    "v": "*fp32",
    "v_out": "*fp32",
    "exponents": "*i32",
    "exponents_out": "*i32",
    "sigma": "*fp32",
    "u": "*fp32",
    "sigma_state": "*fp32",
    "value": "*fp32",
    "strength": "*fp32",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
    "upstream": "*fp32",
    "exponent_at": "*fp64",
    "groups": "*i64",
}
# 0-d tensors of the caller's, perhaps one element of a larger one: nothing is known of their address.
ANYWHERE = {"value", "strength", "grad_scale", "found_inf", "upstream", "exponent_at"}


@dataclass(frozen=True)
class Build:
    """One compilation of the penalty kernel, or of its backward: what launch_penalty would hand to Triton."""

    reads: tuple[ReadVariant, ...]
    gradients: tuple[Variant, ...]
    warps: int
    weight: str = "bfloat16"
    gradient: str = "bfloat16"
    sm: int = 90
    repeated: bool = False
    square: bool = True
    fixed_order: bool = True
    scaled: bool = False  # with grad_scale and found_inf
    u: bool = False
    debug: bool = False
    backward: bool = False  # _penalty_backward_kernel
    accumulate: bool = False  # it adds to gradients
    stages: int | None = None  # None: as launched
    registers: int = 168  # that a thread gets at most


@dataclass(frozen=True)
class AdamWBuild:
    """One compilation of the optimizer step: what launch_adamw would hand to Triton."""

    reads: tuple[ReadVariant, ...]
    warps: int
    weight: str = "float32"
    gradient: str = "float32"
    sm: int = 90
    square: bool = True
    amsgrad: bool = False
    masters: bool = False
    maximize: bool = False
    decoupled: bool = False
    by_chance: bool = False
    fixed_order: bool = True
    scaled: bool = False  # with grad_scale and found_inf
    debug: bool = False


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int  # bytes a thread: more than 0 is a spill
    local: int
    shared: int  # bytes
    ptx: str
    spills: int  # instructions that load from local memory


def compile_build(build: Build) -> Compiled:
    """In this process, which must not have TRITON_INTERPRET set."""
    import triton.language as tl

    from spectral_ops.kernels import penalty, penalty_backward

    kernel = penalty_backward._penalty_backward_kernel if build.backward else penalty._penalty_kernel
    constants: dict[str, Any] = {
        "W_DTYPE": getattr(tl, build.weight),
        "G_DTYPE": getattr(tl, build.gradient),
        "READ_VARIANTS": build.reads,
        "READ_COUNT": len(build.reads),
        "GRADIENT_VARIANTS": build.gradients,
        "GRADIENT_COUNT": len(build.gradients),
        "REPEATED": build.repeated,
        "SQUARE": build.square,
        "OVERWRITE": not build.accumulate,
        "FIXED_ORDER": build.fixed_order,
        "STAGES": penalty.STAGES if build.stages is None else build.stages,
        "DEBUG": build.debug,
    }
    if not build.u and not build.backward:
        constants |= {"u": None, "sigma_state": None}
    if not build.scaled:
        constants |= {"grad_scale": None, "found_inf": None}
    return _compile_kernel(kernel, constants, build.sm, build.warps, build.registers)


def compile_adamw(build: AdamWBuild) -> Compiled:
    """In this process, which must not have TRITON_INTERPRET set."""
    import triton.language as tl

    from spectral_ops.kernels import adamw

    names = ("square", "amsgrad", "masters", "maximize", "decoupled", "by_chance", "fixed_order", "debug")
    constants: dict[str, Any] = {name.upper(): getattr(build, name) for name in names}
    constants |= {
        "W_DTYPE": getattr(tl, build.weight),
        "G_DTYPE": getattr(tl, build.gradient),
        "READ_VARIANTS": build.reads,
        "READ_COUNT": len(build.reads),
    }
    if not build.scaled:
        constants |= {"grad_scale": None, "found_inf": None}
    return _compile_kernel(adamw._adamw_kernel, constants, build.sm, build.warps, 128)


def _compile_kernel(kernel: Any, constants: dict[str, Any], sm: int, warps: int, most_registers: int) -> Compiled:
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") and name not in ANYWHERE
    }
    return _compile(ASTSource(kernel, signature, constexprs=constants, attrs=attrs), sm, warps, most_registers)


def compile_lanczos(name: str, sm: int) -> Compiled:
    """One of kernels/spectral_norm.py, by its name; in this process."""
    from triton.compiler import ASTSource

    from spectral_ops.kernels import spectral_norm

    kernel = getattr(spectral_norm, name)
    numbers = {"k": "i32", "max_iter": "i32", "matrices": "i32", "total": "i32", "tol": "fp32"}
    pointers = {"projected": "*fp64", "bracket": "*fp64", "status": "*i32"}
    signature = {n: numbers.get(n) or pointers.get(n) or POINTERS.get(n, "*fp32") for n in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in numbers}
    return _compile(ASTSource(kernel, signature, constexprs={}, attrs=attrs), sm, spectral_norm.WARPS, None)


def _compile(source: Any, sm: int, warps: int, most_registers: int | None) -> Compiled:
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": warps, "maxnreg": most_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spills = len(re.findall(r"\bLDL\b", sass))
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    return Compiled(usage["REG"], usage["STACK"], usage["LOCAL"], shared, ptx, spills)


def triton_version() -> str:
    import triton

    return triton.__version__


class Compilers:
    """Processes that compile; results come in any order and are asked for by their build."""

    def __init__(self, processes: int = 2):
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=_really_compile)
        self._futures: dict[Build | AdamWBuild, Future[Compiled]] = {}

    def begin(self, builds: Sequence[Build | AdamWBuild]) -> None:
        for build in builds:
            if build not in self._futures:
                how: Any = compile_build if isinstance(build, Build) else compile_adamw
                self._futures[build] = self._pool.submit(how, build)

    def result(self, build: Build | AdamWBuild) -> Compiled:
        self.begin([build])
        return self._futures[build].result()

    def lanczos(self, name: str, sm: int) -> Compiled:
        return self._pool.submit(compile_lanczos, name, sm).result()

    def version(self) -> str:
        return self._pool.submit(triton_version).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _really_compile() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.nice(5)
