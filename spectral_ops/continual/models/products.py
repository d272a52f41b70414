"""Large products of S pairs of matrices, by the library that is the fastest at their size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# MKL, which torch.bmm calls, gives AVX-512 to Intel's processors alone; oneDNN gives it to all, but takes the pairs one
# by one and 15 us for each. On an EPYC with two threads it is ahead from 4 to 8 million multiply-adds of a pair on:
# docs/performance.md, "The trainer".
_LARGE = 1 << 23


def rows_for_onednn(w: Tensor) -> float:
    """From how many samples of each on `by_onednn` is faster than torch.bmm for matrices w, (S, m, k); inf: never."""
    if w.dtype is not torch.float32 or w.device.type != "cpu" or not _has_onednn():
        return math.inf
    return _LARGE / (w.shape[1] * w.shape[2])


def by_onednn(a: Tensor, b: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a @ b, and a row added to each; float32 on a CPU, not to be differentiated.

    Args:
        a: (S, n, k).
        b: (S, k, m).
        bias: (S, 1, m).
        out: (S, n, m) to write to.
    """
    s, n, _ = a.shape
    out = a.new_empty(s, n, b.shape[2]) if out is None else out
    w = b.mT
    for i in range(s):
        own = None if bias is None else bias[i, 0]
        out[i] = torch.ops.mkldnn._linear_pointwise(a[i], w[i], own, "none", [], "")
    return out


def _has_onednn() -> bool:
    """Whether torch has the operator, which is TorchInductor's and not public, and AVX-512 to gain something by."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and hasattr(torch.ops.mkldnn, "_linear_pointwise")
