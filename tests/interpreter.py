"""Triton's interpreter for tests without a GPU: bfloat16 rounded as a device rounds it, and a sample of the tests.

The interpreter (Triton 3.6 to 3.9) truncates float32 to bfloat16 where PTX's cvt.rn rounds to nearest even; a test of
rounding would otherwise test the interpreter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

# Of the parameter sets of a test, how many run interpreted (0.3 s each, some 10): one in this many, and at least one.
# They are marked slow.
SAMPLE = 8
# Parameter sets with matrices so large, or so many, that the interpreter takes a minute.
TOO_LARGE = ("tall", "wide-", "strips-", "depthwise_many", "list_of_everything")


def round_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    original: Callable[..., Any] = interpreter._convert_float

    def convert(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(x).view(np.float32).reshape(-1)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)
        if source == tl.bfloat16 and target == tl.float32:
            wide = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).view(np.uint32).reshape(x.shape)
        return original(x, source, target, rounding)

    interpreter._convert_float = convert


def start_with_reference(patch: pytest.MonkeyPatch) -> None:
    """Regularizers begin with the reference's converged vectors: interpreted, they take 5 s for three layers."""
    from spectral_ops import use_backend, vectors

    original = vectors.converged_vectors

    def converged_vectors(*args: Any) -> Any:
        with use_backend("reference"):
            return original(*args)

    patch.setattr(vectors, "converged_vectors", converged_vectors)


def is_interpreted(item: pytest.Item) -> bool:
    """Whether a test of all backends is about to run the Triton kernels in the interpreter."""
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("backend") == "triton"


def sample(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(kept, left out): of the tests whose backend is interpreted, a part of the parameter sets of each function."""
    interpreted: dict[str, list[pytest.Item]] = {}
    for item in items:
        if is_interpreted(item):
            interpreted.setdefault(item.nodeid.split("[")[0], []).append(item)
    left_out = set()
    for group in interpreted.values():
        usable = [item for item in group if not any(name in item.nodeid for name in TOO_LARGE)]
        usable = [item for item in usable if torch.float64 not in item.callspec.params.values()]  # type: ignore[attr-defined]
        by_hash = sorted(usable, key=lambda item: zlib.crc32(item.nodeid.encode()))
        kept = by_hash[: max(1, len(by_hash) // SAMPLE)]
        left_out |= {id(item) for item in group} - {id(item) for item in kept}
    return [i for i in items if id(i) not in left_out], [i for i in items if id(i) in left_out]
