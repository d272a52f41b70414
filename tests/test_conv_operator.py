"""What a conv layer's settings say, and that they are refused where torch's own layers refuse them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_samples import ConvSample, accepted, combinations

from spectral_ops import conv_norm_bound, conv_spectral_norm
from spectral_ops.ops.conv_operator import ConvOperator, conv_operator

SHAPE = (6, 4, 3, 3)
SIZE = (8, 7)
SIZE_ALONE = "It is the spatial size alone, without channels, such as (8, 8)"


def build(shape: Any = SHAPE, size: Any = SIZE, **settings: Any) -> ConvOperator:
    return conv_operator("layer 'a.b'", shape, size, **settings)


# ---- what comes out ----


def test_numbers_stand_for_every_dimension() -> None:
    found = build(stride=2, padding=1, dilation=3)
    assert found == ConvOperator(SIZE, (2, 2), (3, 3), (1, 1), (1, 1), (0, 0))
    assert found == build(stride=(2, 2), padding=[1, 1], dilation=(3, 3), groups=1, padding_mode="zeros")
    assert build(size=9).input_size == (9, 9)
    assert build((6, 4, 3), torch.Size([9]), padding_mode="circular") == ConvOperator(
        (9,), (1,), (1,), (0,), (0,), (0,), circular=True
    )
    up = build(stride=2, output_padding=1, transposed=True)
    assert up.transposed and not up.circular and up.output_padding == (1, 1)


def test_padding_by_name_is_torchs() -> None:
    """'same' pads an even kernel more at the high end; see also the dense matrices in test_linear_map.py."""
    same = build((6, 4, 4, 3), dilation=(1, 2), padding="same")
    assert (same.before, same.after) == ((1, 2), (2, 2))
    assert same.output_size((4, 3)) == SIZE
    valid = build(padding="valid", stride=2)
    assert valid.before == valid.after == (0, 0)


def test_output_size_says_where_there_is_none() -> None:
    operator = build()
    assert operator.output_size((9, 10)) == (0, -2)


def test_pack_is_whole_numbers_in_a_fixed_order() -> None:
    operator = ConvOperator((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), circular=True)
    assert operator.pack() == "1 0 1 2 3 4 5 6 7 8 9 10 11 12"
    assert ConvOperator((1,), (2,), (3,), (4,), (5,), (6,), transposed=True).pack() == "0 1 1 2 3 4 5 6"


def test_weights_without_channels_have_operators() -> None:
    for shape in ((0, 4, 3, 3), (6, 0, 3, 3)):
        assert build(shape) == build()


# ---- errors ----

RAISES: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"shape": (6, 4)},
        ValueError,
        "expected (out, in, *kernel) with 1 to 3 kernel sizes, got a weight of shape (6, 4). "
        "Pass the weight of a conv layer.",
    ),
    (
        {"shape": (6, 4, 1, 1, 1, 1)},
        ValueError,
        "expected (out, in, *kernel) with 1 to 3 kernel sizes, got a weight of shape (6, 4, 1, 1, 1, 1). "
        "Pass the weight of a conv layer.",
    ),
    (
        {"shape": (6, 4, 3, 0)},
        ValueError,
        "expected kernel sizes >= 1, got (3, 0). Pass the weight of a conv layer.",
    ),
    *(
        (
            {"padding_mode": mode},
            NotImplementedError,
            f"expected padding_mode 'zeros' or 'circular', got '{mode}', which repeats inputs at the border and has no "
            "operator form here. Read the weight as a matrix: spectral_norm(weight).",
        )
        for mode in ("reflect", "replicate")
    ),
    (
        {"padding_mode": "mirror"},
        ValueError,
        "expected padding_mode 'zeros' or 'circular', got 'mirror'. Name one of these.",
    ),
    (
        {"padding_mode": "circular", "transposed": True},
        ValueError,
        "expected zero padding of a transposed convolution, got 'circular'. Use 'zeros'.",
    ),
    *(
        (
            {name: value},
            TypeError,
            f"expected {name if name != 'size' else 'input_size'} to be whole numbers, got {value!r}. "
            "Give one per spatial dimension.",
        )
        for name, value in [
            ("size", 8.0),
            ("size", None),
            ("size", (8, 7.0)),
            ("stride", True),
            ("dilation", (1, False)),
            ("padding", 0.5),
            ("output_padding", "1"),
        ]
    ),
    *(
        (
            {name: value},
            ValueError,
            f"expected {name if name != 'size' else 'input_size'} to hold 2 numbers >= {least}, got {got}. "
            f"{SIZE_ALONE if name == 'size' else 'Give one per spatial dimension, or one number for all'}.",
        )
        for name, value, least, got in [
            ("size", (8,), 1, "(8,)"),
            ("size", (8, 7, 6), 1, "(8, 7, 6)"),
            ("size", (0, 7), 1, "(0, 7)"),
            ("stride", 0, 1, "(0, 0)"),
            ("dilation", (1, 0), 1, "(1, 0)"),
            ("padding", [-1, 0], 0, "(-1, 0)"),
            ("output_padding", (0, -1), 0, "(0, -1)"),
        ]
    ),
    (
        {"padding": "full"},
        ValueError,
        "expected padding to be numbers, 'same' or 'valid', got 'full'. Name one of these.",
    ),
    (
        {"padding": "same", "transposed": True},
        ValueError,
        "expected padding to be numbers, 'same' or 'valid', got 'same'. Transposed convolutions take numbers.",
    ),
    (
        {"padding": "same", "stride": (1, 2)},
        ValueError,
        "expected stride 1 with padding='same', got (1, 2). Give the padding in numbers.",
    ),
    *(
        (
            {"groups": groups},
            ValueError,
            f"expected groups >= 1 that divide 6, got {groups!r}. "
            "Dimension 0 of the weight (6, 4, 3, 3) is cut into that many groups.",
        )
        for groups in (0, -1, 4, 2.0, True)
    ),
    (
        {"output_padding": (0, 1), "stride": 2},
        ValueError,
        "expected output_padding of transposed layers only, got (0, 1). Leave it out.",
    ),
    (
        {"output_padding": (1, 2), "stride": 2, "transposed": True},
        ValueError,
        "expected output_padding below stride or dilation, got (1, 2). Lower it.",
    ),
    (
        {"padding_mode": "circular", "padding": (8, 8)},
        ValueError,
        "expected circular padding of at most the input (8, 7), got (8, 8). Circular padding wraps around once.",
    ),
    (
        # 'same' pads 7 before and 8 after: the second is what is refused.
        {"shape": (6, 4, 1, 16), "padding_mode": "circular", "padding": "same"},
        ValueError,
        "expected circular padding of at most the input (8, 7), got (0, 8). Circular padding wraps around once.",
    ),
    (
        {"shape": (6, 4, 5, 3), "dilation": (2, 1)},
        ValueError,
        "expected a kernel of at most the padded input, got one reaching over (9, 3) on an input of (8, 7), (8, 7) "
        "with its padding. Give the input_size that the layer is used with.",
    ),
    (
        {"shape": (6, 4, 5, 3), "size": (2, 2), "padding": 1},
        ValueError,
        "expected a kernel of at most the padded input, got one reaching over (5, 3) on an input of (2, 2), (4, 4) "
        "with its padding. Give the input_size that the layer is used with.",
    ),
    (
        # Without channels too: the rows would be fewer than none.
        {"shape": (6, 0, 5, 3), "size": (2, 2)},
        ValueError,
        "expected a kernel of at most the padded input, got one reaching over (5, 3) on an input of (2, 2), (2, 2) "
        "with its padding. Give the input_size that the layer is used with.",
    ),
    (
        {"size": (1, 2), "padding": (2, 0), "transposed": True},
        ValueError,
        "expected an output, got size (-1, 4) from an input of (1, 2). Give the input_size that the layer is used "
        "with.",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), RAISES, ids=lambda x: str(x)[:60] if x else None)
def test_errors(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        build(**arguments)
    assert type(caught.value) is error
    assert str(caught.value) == f"layer 'a.b': {text}"


# ---- agreement with torch ----


def agreements(candidates: list[ConvSample]) -> dict[bool, int]:
    """How many torch runs, and how many not; where it runs one the output's size is torch's."""
    found = {True: 0, False: 0}
    for sample in candidates:
        runs = accepted(sample)
        found[runs] += 1
        if runs:
            assert sample.operator.output_size(sample.kernel) == sample.output_size(), sample
            continue
        assert refused(sample), sample
    return found


def refused(sample: ConvSample) -> bool:
    try:
        return sample.operator is None
    except (TypeError, ValueError):
        return True


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_refuses_what_torch_refuses(dims: int, transposed: bool) -> None:
    found = agreements([x for x in combinations(dims, transposed) if x.groups == 1])
    assert found[True] >= 10, found
    assert found[False] >= (1 if dims < 3 or transposed else 0), found


def test_refuses_what_torch_refuses_at_the_edges() -> None:
    """Inputs of one to four elements, and settings around what they allow; circular, transposed and plain."""
    candidates = []
    for size, kernel, stride, dilation, padding in itertools.product(
        (1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2), (0, 1, 2, 3, 5, "same", "valid")
    ):
        settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": padding}
        plain = ConvSample((size,), (kernel,), 1, 1, **settings)
        candidates += [plain, ConvSample((size,), (kernel,), 1, 1, padding_mode="circular", **settings)]
        candidates += [
            ConvSample((size,), (kernel,), 1, 1, transposed=True, output_padding=extra, **settings)
            for extra in (0, 1, 2)
        ]
    found = agreements(candidates)
    assert found[True] >= 400 and found[False] >= 400, found


@pytest.mark.parametrize("op", [conv_spectral_norm, conv_norm_bound])
def test_an_input_size_with_channels(op: Callable[..., Any]) -> None:
    message = "expected input_size to hold 2 numbers >= 1, got (3, 8, 8). " + SIZE_ALONE
    with pytest.raises(ValueError, match=re.escape(f"{op.__name__}: {message}.")):
        op(torch.zeros(SHAPE), (3, 8, 8))
    with pytest.raises(ValueError, match=re.escape("without channels, such as (8,).")):
        op(torch.zeros(6, 4, 3), (4, 8))
