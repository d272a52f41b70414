"""What nvcc made of the conv operators' kernels, read from the built module: no device needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from spectral_ops import backends

pytest.importorskip("triton", reason="brings cuobjdump")
ARCHITECTURES = {"sm_80", "sm_90"}
# 128 threads with 128 registers each: 4 blocks fill a multiprocessor's 65536.
MOST_REGISTERS = 128
# Of shared memory 164 KB on sm_80, 1 KB of them of every block.
MOST_SHARED = (164 << 10) // 4 - 1024
# A spill in a loop would be hundreds of bytes. The first launch saves registers around the called product in its rare
# second reading of a part out of range.
MOST_STACK = 96


def usage() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) to what it takes."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    module = backends.native().__file__
    text = subprocess.run([tool, "-res-usage", module], capture_output=True, text=True, check=True).stdout
    out: dict[tuple[str, str], dict[str, int]] = {}
    architecture = kernel = ""
    for line in text.splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\S+):", line):
            kernel = found[1]
        elif "REG:" in line and "conv_kernel" in kernel:
            out[architecture, kernel] = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return out


def test_kernels_fit_and_do_not_spill() -> None:
    if backends.available()["native"] is not None or not backends.has_native_cuda():
        pytest.skip("the module is built without CUDA")
    found = usage()
    assert {architecture for architecture, _ in found} == ARCHITECTURES
    assert len(found) == 3 * len(ARCHITECTURES)  # the launches of a step
    for kernel, taken in found.items():
        assert taken["REG"] <= MOST_REGISTERS, kernel
        assert taken["STACK"] <= MOST_STACK and taken["LOCAL"] == 0, kernel
        assert taken["SHARED"] <= MOST_SHARED, kernel
