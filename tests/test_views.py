"""How kernels walk a parameter: the view's places are those of as_matrices, whatever the strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_ops.ops.layout import Kind, Layout, as_matrices, sizes
from spectral_ops.ops.views import view_of

WHOLE = torch.arange(20_000, dtype=torch.float32)


def strided(size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return WHOLE.as_strided(size, stride)


CASES = {
    "linear": (strided((5, 7), (7, 1)), Layout(), True),
    "padded rows": (strided((5, 7), (16, 1)), Layout(), True),
    "transposed": (strided((7, 5), (5, 1)).t(), Layout(), False),
    "every third column": (strided((5, 7), (40, 3)), Layout(), False),
    "expanded columns": (strided((5, 7), (1, 0)), Layout(), False),
    "one column": (strided((5, 1), (3, 17)), Layout(), True),
    "conv": (strided((4, 3, 2, 2), (12, 4, 2, 1)), Layout(), True),
    "channels_last": (strided((4, 3, 2, 2), (12, 1, 6, 3)), Layout(), True),
    "grouped conv": (strided((4, 3, 2, 2), (12, 4, 2, 1)), Layout(Kind.MATRIX, 2, 0, 0), True),
    "transposed conv": (strided((4, 3, 2, 2), (12, 4, 2, 1)), Layout(Kind.MATRIX, 1, 0, 1), False),
    "Conv1D packed along dim 1": (strided((5, 12), (12, 1)), Layout(Kind.MATRIX, 3, 1, 1), False),
    "stack": (strided((3, 4, 5), (20, 5, 1)), Layout(Kind.MATRIX, 3, 0, 1), True),
    "no columns": (strided((4, 0), (1, 1)), Layout(), True),
    "no rows": (strided((0, 4), (4, 1)), Layout(), True),
    "bias": (strided((9,), (1,)), Layout(Kind.BIAS), True),
    "three biases": (strided((9,), (2,)), Layout(Kind.BIAS, 3), False),
    "scale of two dimensions, transposed": (strided((3, 4), (1, 3)), Layout(Kind.SCALE), True),
    "scalar shift": (strided((1,), (1,)), Layout(Kind.SHIFT), True),
}


@pytest.mark.parametrize(("w", "layout", "dense"), CASES.values(), ids=CASES.keys())
def test_the_view_finds_every_element(w: Tensor, layout: Layout, dense: bool) -> None:
    parts, m, n = sizes(w.shape, layout)
    truth = as_matrices(w, layout).reshape(parts, m, n)
    view = view_of(w, layout)
    assert view.dense == dense
    base = WHOLE[w.storage_offset() :]
    found = torch.full((parts, m, n), -1.0)
    for part in range(parts):
        for row in range(m):
            start = part * view.part_stride + row * view.row_stride
            for place in range(n):
                column, at = place, place * view.column_stride
                if view.places is not None:
                    at = int(view.places[place])
                if view.order is not None:  # dense, in an order of its own
                    column = int(view.order[place])
                found[part, row, column] = base[start + at]
    assert torch.equal(found, truth)


def test_places_beyond_int32_are_refused() -> None:
    w = torch.empty(1, device="meta").as_strided((1, 3, 2, 2), (1, 2**30, 7, 3))
    with pytest.raises(ValueError, match="within 2\\^31 places"):
        view_of(w, Layout())
