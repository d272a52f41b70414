"""Every kind of kernel that cut.py can ask for, compiled for sm_80, 90 and 100: it fits, loads in vectors, and orders.

No GPU is needed. Fitting: no local memory, and as many programs per multiprocessor as the launch counts on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from aot import Build, Compiled, Compilers, ReadVariant, Variant
from ptx import count, functions, missing_barriers

from spectral_ops.kernels import table
from spectral_ops.ops.cut import READING, WIDE, WRITING, Matrix, Rows, cut

REGISTERS_PER_SM = 65536
SHAPES = (READING, WRITING, WIDE)
# CUDA programming guide, technical specifications: per multiprocessor; each program takes 1 KB beside its own.
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
# A called function may save a few of its caller's registers once, at its begin: up to 4 of them are no spill of a loop.
SAVED_BYTES = 16
# Rows of 6144 columns in 4 warps take 48 registers a thread each for v, z and a row. Triton 3.6 keeps up to 40 of them
# in L1, about 25 of the 320 instructions of a panel; 8 warps without that were no faster on an H200
# (docs/performance.md).
SPILLS = {"3.6.0": 160}
SPILLING = ("resnet18", "vit-g", "widest")

DENSE, UNALIGNED = Rows(True, False, True), Rows(True, False, False)
STRIDED, BY_COLUMN = Rows(False, False, False), Rows(False, True, False)
MODELS: dict[str, list[tuple[int, int, Rows]]] = {
    "mlp": [(256, 784, DENSE), (256, 256, DENSE), (10, 256, DENSE)],
    "resnet18": [(64, 147, UNALIGNED), (64, 576, DENSE), (128, 1152, DENSE), (512, 4608, DENSE), (1000, 512, DENSE)],
    "vit-s": [(384, 384, DENSE), (1536, 384, DENSE), (384, 1536, DENSE)],
    "vit-b": [(768, 768, DENSE), (768, 3072, DENSE)],
    "vit-l": [(1024, 1024, DENSE), (4096, 1024, DENSE), (1024, 4096, DENSE)],
    "vit-g": [(1408, 1408, DENSE), (6144, 1408, DENSE), (1408, 6144, DENSE)],
    "gpt2": [(2304, 768, BY_COLUMN), (768, 768, BY_COLUMN), (3072, 768, BY_COLUMN), (768, 3072, BY_COLUMN)],
    "widest sweep": [(4096, 8192, DENSE), (8192, 4096, DENSE)],
    "wide": [(1000, 25000, DENSE)],
    "strided": [(300, 500, STRIDED)],
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def build(model: str, weight: str, gradient: str | None = None, **options: object) -> Build:
    """What cut.py asks for; `gradient` None: the value alone."""
    gradient_rows = [rows if gradient else None for _, _, rows in MODELS[model]]
    matrices = [
        Matrix(m, n, BYTES[weight], rows, g, BYTES[gradient or weight])
        for (m, n, rows), g in zip(MODELS[model], gradient_rows, strict=True)
    ]
    work = cut(matrices, 3, 1, lambda shape: 132 * shape.per_multiprocessor)
    given = (work.read_variants, work.gradient_variants, work.shape.warps, weight, gradient or weight)
    return Build(*given, registers=work.shape.registers, **options)  # type: ignore[arg-type]


FAST = {
    "mlp, fp32 with gradient": build("mlp", "float32", "float32"),
    "vit-l, bf16, fp32 gradient": build("vit-l", "bfloat16", "float32", scaled=True),
}
# Each value of each axis at least once with each mode of reading; 8 warps and 16 with each dtype.
BROAD = {
    "mlp, fp32, sm_80": build("mlp", "float32", "float32", sm=80, scaled=True),
    "mlp, fp32, sm_100, any exponent": build("mlp", "float32", "float32", sm=100, square=False),
    "mlp, bf16, debug": build("mlp", "bfloat16", "bfloat16", debug=True, u=True),
    "mlp, fp16, repeated": build("mlp", "float16", "float16", repeated=True),
    "resnet18, fp32": build("resnet18", "float32", "float32", u=True),
    "resnet18, bf16, relaxed": build("resnet18", "bfloat16", "float32", fixed_order=False),
    "resnet18, bf16 value, sm_80": build("resnet18", "bfloat16", sm=80),
    "vit-s, bf16, any exponent": build("vit-s", "bfloat16", "bfloat16", square=False, scaled=True),
    "vit-s, fp32 value, sm_100": build("vit-s", "float32", sm=100),
    "vit-b, fp32": build("vit-b", "float32", "float32"),
    "vit-l, fp32, repeated": build("vit-l", "float32", "float32", repeated=True),
    "vit-l, fp16, sm_80": build("vit-l", "float16", "float16", sm=80),
    "vit-l, bf16, sm_100": build("vit-l", "bfloat16", "bfloat16", sm=100),
    "vit-l, bf16 value, relaxed, debug": build("vit-l", "bfloat16", fixed_order=False, debug=True),
    "vit-g, bf16": build("vit-g", "bfloat16", "bfloat16"),
    "vit-g, fp32, sm_80": build("vit-g", "float32", "float32", sm=80),
    "vit-g, fp16, fp32 gradient, sm_100": build("vit-g", "float16", "float32", sm=100, repeated=True),
    "widest sweep, bf16": build("widest sweep", "bfloat16", "bfloat16"),
    "widest sweep, fp32, sm_80": build("widest sweep", "float32", "float32", sm=80),
    "gpt2, bf16": build("gpt2", "bfloat16", "float32", scaled=True),
    "gpt2, fp32, sm_80": build("gpt2", "float32", "float32", sm=80, fixed_order=False),
    "wide, bf16, any exponent": build("wide", "bfloat16", "bfloat16", square=False, debug=True),
    "wide, fp32, sm_100": build("wide", "float32", "float32", sm=100, fixed_order=False),
    "wide, fp16 value, sm_80": build("wide", "float16", sm=80, repeated=True),
    "strided, fp32": build("strided", "float32", "float32", scaled=True),
    "strided, bf16, sm_100": build("strided", "bfloat16", "float32", sm=100, u=True),
    "vit-l, backward": replace(build("vit-l", "bfloat16", "bfloat16"), backward=True),
    "vit-l, added to": replace(build("vit-l", "bfloat16", "bfloat16"), backward=True, accumulate=True),
    "gpt2, backward, sm_80": replace(build("gpt2", "float32", "float32", sm=80), backward=True),
}
# One variant at a time, where loads are counted: (read or gradient variants, warps).
ONE_SWEEP = [
    ((table.ONE_SWEEP.value, 128, 1, 32, True, 4), 4),
    ((table.ONE_SWEEP.value, 256, 3, 8, True, 4), 4),
    ((table.ONE_SWEEP.value, 1024, 5, 1, True, 1), 4),
    ((table.ONE_SWEEP.value, 4096, 2, 2, True, 1), 16),
]
CHUNKS = ((table.CHUNKED.value, 512, 1, 8, True), 4)


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    both = Compilers()
    yield both
    both.close()


def fits(made: Compiled, build: Build, saved: int = SAVED_BYTES) -> None:
    programs = next(s for s in SHAPES if (s.warps, s.registers) == (build.warps, build.registers)).per_multiprocessor
    assert made.local == 0
    assert made.stack <= saved
    registers = -(-made.registers // 8) * 8  # a warp is given them in units of 256
    assert registers * 32 * build.warps * programs <= REGISTERS_PER_SM, f"{made.registers} registers"
    assert (made.shared + 1024) * programs <= SHARED_PER_SM[build.sm], f"{made.shared} bytes of shared memory"


def check(compilers: Compilers, build: Build, name: str) -> None:
    made = compilers.result(build)
    wide = name.startswith(SPILLING)
    fits(made, build, SPILLS.get(compilers.version(), SAVED_BYTES) if wide else SAVED_BYTES)
    assert missing_barriers(made.ptx) == []
    if not build.backward:
        assert any(here.is_release for body in functions(made.ptx).values() for here in body.code)
        assert any(here.is_acquire for body in functions(made.ptx).values() for here in body.code)


def test_triton_is_the_expected_one(compilers: Compilers) -> None:
    expected = os.environ.get("SPECTRAL_OPS_EXPECT_TRITON")
    if expected is None:
        pytest.skip("SPECTRAL_OPS_EXPECT_TRITON is not set: any Triton will do")
    assert compilers.version() == expected


@pytest.mark.parametrize("name", FAST)
def test_kernel(compilers: Compilers, name: str) -> None:
    compilers.begin(list(FAST.values()))
    check(compilers, FAST[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BROAD)
def test_every_kind(compilers: Compilers, name: str) -> None:
    compilers.begin(list(BROAD.values()))
    check(compilers, BROAD[name], name)


def test_the_selection_reaches_everything() -> None:
    builds = [*FAST.values(), *BROAD.values()]
    modes = {variant[0] for x in builds for variant in x.reads}
    assert modes == {table.ONE_SWEEP.value, table.CHUNKED.value, table.STRIDED.value, table.BY_COLUMN.value}
    for mode in modes:
        of_mode = [x for x in builds if mode in {variant[0] for variant in x.reads} and not x.backward]
        assert {x.weight for x in of_mode} >= {"float32", "bfloat16"}
        assert {x.sm for x in of_mode} >= ({90, 100} if mode == table.STRIDED.value else {80, 90})
    for name in ("repeated", "square", "fixed_order", "scaled", "u", "debug"):
        assert {getattr(x, name) for x in builds} == {False, True}
    assert {(x.warps, x.registers) for x in builds} == {(s.warps, s.registers) for s in SHAPES}


def vectors(variant: Variant | ReadVariant, warps: int, size: int) -> int:
    """16-byte accesses per thread that one panel takes."""
    _, a, pieces, p, *_ = variant
    return pieces * max(1, p * a * size // (32 * warps * 16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "warps"), ONE_SWEEP)
def test_weights_are_loaded_in_vectors(compilers: Compilers, variant: ReadVariant, warps: int, dtype: str) -> None:
    """STAGES - 1 panels are on their way before the loop, and one more is asked for in it."""
    from spectral_ops.kernels.penalty import STAGES

    ptx = compilers.result(Build((variant,), (), warps, dtype, dtype)).ptx
    wide = count(ptx, "_read_tile__", r"cp\.async\.cg\.", r"0x10|\b16\b")
    assert wide == STAGES * vectors(variant, warps, BYTES[dtype])
    assert count(ptx, "_read_tile__", r"ld\.global\S*\.[bu]16") == 0


@pytest.mark.slow
def test_unaligned_rows_are_told_apart(compilers: Compilers) -> None:
    """What the test above counts is not there where rows may begin anywhere."""
    ptx = compilers.result(Build(((table.ONE_SWEEP.value, 512, 2, 1, False, 1),), (), 4)).ptx
    assert count(ptx, "_read_tile__", r"cp\.async\.cg\.") == 0
    assert count(ptx, "_read_tile__", r"ld\.global\S*\.[bu]16") > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_and_gradients_move_in_vectors(compilers: Compilers, dtype: str) -> None:
    variant, warps = CHUNKS
    build = Build(((table.CHUNKED.value, 1024, 1, 8, True, 1),), (variant,), warps, dtype, dtype)
    ptx = compilers.result(build).ptx
    both_sweeps = 2 * vectors(build.reads[0], warps, BYTES[dtype])
    assert count(ptx, "_read_tile__", r"ld\.global\S*\.v4\.b32") >= both_sweeps
    expected = vectors(variant, warps, BYTES[dtype])
    assert count(ptx, "_gradient_tile__", r"st\.global\S*\.v4\.b32") == expected
    loads = [count(ptx, "_gradient_tile__", kind) for kind in (r"cp\.async\.cg\.", r"ld\.global\S*\.v4\.b32")]
    assert sum(loads) >= expected
    for name in ("_read_tile__", "_gradient_tile__"):
        assert count(ptx, name, r"ld\.global\S*\.[bu]16") == 0


@pytest.mark.slow
def test_the_gate_sees_a_spill(compilers: Compilers) -> None:
    """A panel of 128 elements per thread."""
    build = Build(((table.ONE_SWEEP.value, 4096, 1, 4, True, 1),), (), 4, "float32", "float32")
    with pytest.raises(AssertionError):
        fits(compilers.result(build), build)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("name", ["_start_kernel", "_lanczos_kernel", "_ritz_kernel", "_bound_kernel"])
def test_kernels_of_the_converged_norm(compilers: Compilers, name: str, sm: int) -> None:
    made = compilers.lanczos(name, sm)
    assert made.local == 0 and made.stack == 0
    assert -(-made.registers // 8) * 8 * 32 * 8 * 2 <= REGISTERS_PER_SM, f"{made.registers}: not two programs"
