"""The optimizer step's kernel compiled for sm_80, 90 and 100: it fits, keeps its elements in registers, and orders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from aot import AdamWBuild, Compilers
from ptx import count, functions, missing_barriers

from spectral_ops.kernels import table
from spectral_ops.ops.adamw_cut import USUAL, WIDE, adamw_cut
from spectral_ops.ops.cut import Matrix, Rows
from spectral_ops.ops.layout import Kind

REGISTERS_PER_SM = 65536
# CUDA programming guide, technical specifications: per multiprocessor; each program takes 1 KB beside its own.
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
# Called functions save registers of their callers at their begin, which no loop over elements sees: up to 54 loads in
# all. The loop over panels of 1024 float32 has 1 in 486 instructions (an H200: 1.03x the time of its bytes); with twice
# the elements in a panel it has 17, and took 7 % longer. Rows that are no single sweep, and amsgrad, have more.
MOST_SPILLS, MOST_SPILLS_OF_OTHERS = 60, 100

DENSE, BY_COLUMN, STRIDED = Rows(True, False, True), Rows(False, True, False), Rows(False, False, False)
MODELS: dict[str, list[tuple[int, int, Rows]]] = {
    "mlp": [(256, 784, DENSE), (256, 256, DENSE), (10, 256, DENSE)],
    "vit-b": [(2304, 768, DENSE), (768, 3072, DENSE)],
    "vit-l": [(4096, 1024, DENSE), (1024, 4096, DENSE)],
    "vit-g": [(6144, 1408, DENSE), (1408, 6144, DENSE)],
    "others": [(1000, 25000, DENSE), (768, 2304, BY_COLUMN), (300, 500, STRIDED)],
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def build(model: str, weight: str = "float32", gradient: str | None = None, **options: object) -> AdamWBuild:
    matrices = [Matrix(m, n, BYTES[weight], rows) for m, n, rows in MODELS[model]]
    others = [(Kind.BIAS, 10), (Kind.PLAIN, 10)]
    work = adamw_cut(matrices, [28] * len(matrices), others, lambda shape: 132 * shape.per_multiprocessor)
    return AdamWBuild(work.read_variants, work.shape.warps, weight, gradient or weight, **options)  # type: ignore[arg-type]


FAST = {"vit-l, fp32": build("vit-l")}
BROAD = {
    "mlp, fp32, sm_80, scaled": build("mlp", sm=80, scaled=True),
    "mlp, bf16, any exponent, debug": build("mlp", "bfloat16", square=False, debug=True),
    "vit-b, bf16, by chance": build("vit-b", "bfloat16", by_chance=True),
    "vit-b, fp32, sm_100, decoupled": build("vit-b", sm=100, decoupled=True),
    "vit-l, bf16, fp32 gradient": build("vit-l", "bfloat16", "float32"),
    "vit-l, fp16, masters, sm_80, maximize": build("vit-l", "float16", masters=True, sm=80, maximize=True),
    "vit-l, fp32, atomics, sm_80": build("vit-l", fixed_order=False, sm=80),
    "vit-g, bf16, sm_100": build("vit-g", "bfloat16", sm=100),
    "vit-g, fp32": build("vit-g"),
    "vit-b, fp32, amsgrad": build("vit-b", amsgrad=True),
    "others, bf16": build("others", "bfloat16", "float32"),
    "others, fp32, sm_80": build("others", sm=80),
}


@pytest.fixture(scope="module")
def compilers() -> Iterator[Compilers]:
    both = Compilers()
    yield both
    both.close()


def check(compilers: Compilers, build: AdamWBuild) -> None:
    made = compilers.result(build)
    crowded = build.amsgrad or any(variant[0] != table.ONE_SWEEP.value for variant in build.reads)
    most_spills = MOST_SPILLS_OF_OTHERS if crowded else MOST_SPILLS
    programs = next(shape for shape in (USUAL, WIDE) if shape.warps == build.warps).per_multiprocessor
    assert made.local == 0
    assert made.spills <= most_spills, f"{made.spills} loads from local memory"
    assert -(-made.registers // 8) * 8 * 32 * build.warps * programs <= REGISTERS_PER_SM
    assert (made.shared + 1024) * programs <= SHARED_PER_SM[build.sm]
    assert missing_barriers(made.ptx) == []
    assert any(here.is_release for body in functions(made.ptx).values() for here in body.code)
    assert any(here.is_acquire for body in functions(made.ptx).values() for here in body.code)


@pytest.mark.parametrize("name", FAST)
def test_kernel(compilers: Compilers, name: str) -> None:
    check(compilers, FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", BROAD)
def test_every_kind(compilers: Compilers, name: str) -> None:
    compilers.begin(list(BROAD.values()))
    check(compilers, BROAD[name])


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["float32", "bfloat16"])
def test_arrays_move_in_vectors(compilers: Compilers, weight: str) -> None:
    """4 elements of each array a thread: 16 bytes of float32, 8 of 16 bits, none by itself."""
    one = ((table.ONE_SWEEP.value, 1024, 1, 2, True, 1),)
    ptx = compilers.result(AdamWBuild(one, 8, weight, weight)).ptx
    of_rows = 2  # vectors of a thread in a panel of 2 x 1024
    wide = count(ptx, "_strip_tile__", r"st\.global\S*\.v4\.b32")
    assert wide >= of_rows * (3 if weight == "float32" else 2)
    if weight == "bfloat16":
        assert count(ptx, "_strip_tile__", r"st\.global\S*\.v2\.b32") == of_rows
        assert count(ptx, "_strip_tile__", r"(ld|st)\.global\S*\.[bu]16") == 0
