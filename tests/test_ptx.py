"""The reader of PTX, on snippets written by hand: what it must accept, and what it must refuse."""

from __future__ import annotations

import pytest
from ptx import count, functions, missing_barriers


def entry(*lines: str) -> str:
    return ".visible .entry kernel(\n\t.param .b64 p\n)\n.maxntid 128\n{\n" + "\n".join(lines) + "\n\tret;\n}\n"


def function(name: str, *lines: str) -> str:
    return f".func {name}(\n\t.param .b64 q\n)\n{{\n" + "\n".join(lines) + "\n\tret;\n}\n"


STORE = "\tst.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };"
RELEASE = "\t@%p1 atom.global.gpu.acq_rel.add.u32 %r1, [ %rd1 + 0 ], %r2;"
ACQUIRE = "\t@%p1 atom.global.acquire.gpu.add.u32 %r1, [%rd1], 0;"
LOAD = "\t@%p2 ld.global.b32 { %r5 }, [ %rd2 + 0 ];"
COPY = "\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;"
BARRIER = "\tbar.sync \t0; // all threads"
TABLE = "t:\n\t.branchtargets\n\t$L_1,\n\t$L_2;"
CALL = "\tcall.uni \n\tother, \n\t(\n\tparam0\n\t);"


@pytest.mark.parametrize(
    "ptx",
    [
        entry(STORE, BARRIER, RELEASE),
        entry(ACQUIRE, BARRIER, LOAD),
        entry(LOAD, STORE, BARRIER, RELEASE, BARRIER, COPY),
        entry("$L__BB0_1:", ACQUIRE, "\t@%p3 bra \t$L__BB0_1;", BARRIER, LOAD),
        entry("\t@%p3 bra \t$L__BB0_2;", STORE, BARRIER, "$L__BB0_2:", RELEASE),
        entry("\tbra.uni \t$L__BB0_2;", STORE, "$L__BB0_2:", RELEASE),  # never reached
        entry(CALL, RELEASE) + function("other", STORE, BARRIER),
        entry(ACQUIRE, CALL) + function("other", BARRIER, LOAD),
        entry("\tst.shared.b32 [%r1], %r2;", RELEASE),
    ],
)
def test_ordered(ptx: str) -> None:
    assert missing_barriers(ptx) == []


@pytest.mark.parametrize(
    ("ptx", "word"),
    [
        (entry(STORE, RELEASE), "store"),
        (entry("\tred.global.relaxed.gpu.add.f32 [%rd1], %f1;", RELEASE), "store"),
        (entry(STORE, "\t@%p4 bar.sync 0;", RELEASE), "store"),  # not every thread
        (entry(BARRIER, STORE, RELEASE), "store"),
        (entry(ACQUIRE, LOAD), "acquire"),
        (entry(RELEASE, COPY), "acquire"),
        (entry("$L__BB0_1:", ACQUIRE, "\t@%p3 bra \t$L__BB0_1;", LOAD), "acquire"),
        (entry("\t@%p3 bra \t$L__BB0_2;", BARRIER, "$L__BB0_2:", STORE, RELEASE), "store"),
        (entry(STORE, "\t@%p3 bra \t$L__BB0_2;", BARRIER, "$L__BB0_2:", RELEASE), "store"),  # one way round
        (entry("$L__BB0_1:", RELEASE, BARRIER, STORE, "\tbra.uni \t$L__BB0_1;"), "store"),  # the next time
        (entry(CALL, RELEASE) + function("other", BARRIER, STORE), "store"),
        (entry(STORE, CALL) + function("other", RELEASE, BARRIER), "store"),
        (entry(ACQUIRE, CALL) + function("other", LOAD), "acquire"),
        (entry(TABLE, STORE, "\tbrx.idx \t%r1, t;", "$L_1:", BARRIER, "$L_2:", RELEASE), "store"),
    ],
)
def test_not_ordered(ptx: str, word: str) -> None:
    problems = missing_barriers(ptx)
    assert len(problems) == 1
    assert f"no barrier between a{'n' if word == 'acquire' else ''} {word}" in problems[0]


def test_prototypes_comments_and_debug_sections_are_no_code() -> None:
    ptx = ".func other(\n\t.param .b64 q\n)\n;\n" + entry("\t.loc 1 2 3 // st.global.b32 [a], b;", LOAD, COPY)
    ptx += "\t.section\t.debug_abbrev\n\t{\n.b8 1\n\t}\n"
    assert [here.opcode for here in functions(ptx)["kernel"].code] == [
        "ld.global.b32",
        "cp.async.cg.shared.global",
        "ret",
    ]
    assert count(ptx, "kernel", r"cp\.async\.cg", "0x10") == 1
