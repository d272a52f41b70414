"""Products of S pairs of matrices, by the library that is the fastest at their size."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# MKL, which torch.bmm calls, gives AVX-512 to Intel's processors alone; oneDNN gives it to all, but takes the pairs one
# by one and 15 us for each. On an EPYC with two threads it is ahead from 4 to 8 million multiply-adds of a pair on:
# docs/performance.md, "The trainer".
_LARGE = 1 << 23


def product(a: Tensor, b: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a @ b, and a row added to each; in whatever strides come out the fastest.

    Args:
        a: (S, n, k), not to be differentiated.
        b: (S, k, m), of the same dtype, likewise.
        bias: (S, 1, m).
        out: (S, n, m) to write to, without a bias.
    """
    s, n, k = a.shape
    m = b.shape[2]
    if n * k * m >= _LARGE and a.dtype is torch.float32 and a.device.type == "cpu" and _has_onednn():
        out = a.new_empty(s, n, m) if out is None else out
        w = b.mT
        for i in range(s):
            own = None if bias is None else bias[i, 0]
            out[i] = torch.ops.mkldnn._linear_pointwise(a[i], w[i], own, "none", [], "")
        return out
    if bias is None:
        return torch.bmm(a, b, out=out)
    if m < n:  # a head's few classes: MKL takes two thirds of the time for the transpose, and softmax wants it so
        return torch.baddbmm(bias.mT, b.mT, a.mT).mT
    return torch.baddbmm(bias, a, b)


@cache
def _has_onednn() -> bool:
    """Whether torch has the operator, which is TorchInductor's and not public, and AVX-512 to gain something by."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
