"""A convolution as the linear map it is: from its input, of a given size, to its output."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

DIMS = (1, 2, 3)


class ConvOperator(NamedTuple):
    """What a conv layer does with its weight; every tuple has one entry per spatial dimension.

    Its weight is (out, in / groups, *kernel), a transposed one's (in, out / groups, *kernel); the groups are the parts
    of its layout, each a map of its own. Zero padding, or circular.
    """

    input_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]  # padding at the low end; of a transposed layer what it takes off its output
    after: tuple[int, ...]
    output_padding: tuple[int, ...]
    circular: bool = False
    transposed: bool = False

    def output_size(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """Of a kernel; 0 or less where there is no output."""
        out = []
        for i, k in enumerate(kernel):
            n, s, reach = self.input_size[i], self.stride[i], self.dilation[i] * (k - 1) + 1
            padding = self.before[i] + self.after[i]
            if self.transposed:
                out.append((n - 1) * s - padding + reach + self.output_padding[i])
            else:
                out.append((n + padding - reach) // s + 1)
        return tuple(out)

    def grids(self, kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(coarse, fine): a convolution takes the fine one to the coarse one, a transposed one the other way."""
        output = self.output_size(kernel)
        return (self.input_size, output) if self.transposed else (output, self.input_size)

    def is_matrix(self, kernel: Sequence[int]) -> bool:
        """Whether its largest singular value is that of its weight read as the matrix (shape[0] / groups, the rest).

        It is where windows do not overlap and one of them lies inside the fine grid: the map is then that matrix, or
        its transpose, once for every window, some with columns left out.
        """
        coarse, fine = self.grids(kernel)
        for i, k in enumerate(kernel):
            reach = self.dilation[i] * (k - 1) + 1
            if self.stride[i] < reach or (self.circular and coarse[i] * self.stride[i] > fine[i]):
                return False
            first = -(-self.before[i] // self.stride[i])  # the first window that begins inside
            if first >= coarse[i] or first * self.stride[i] - self.before[i] + reach > fine[i]:
                return False
        return True

    def pack(self) -> str:
        """As the numbers that registered ops take in their text of layouts."""
        sizes = (self.input_size, self.stride, self.dilation, self.before, self.after, self.output_padding)
        numbers = [int(self.circular), int(self.transposed), *(int(x) for size in sizes for x in size)]
        return " ".join(map(str, numbers))


def unpack_operator(text: str) -> ConvOperator:
    numbers = [int(number) for number in text.split()]
    dims = (len(numbers) - 2) // 6
    size, stride, dilation, before, after, extra = (
        tuple(numbers[2 + i * dims : 2 + (i + 1) * dims]) for i in range(6)
    )
    return ConvOperator(size, stride, dilation, before, after, extra, bool(numbers[0]), bool(numbers[1]))


def conv_operator(
    where: str,
    shape: Sequence[int],
    input_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
) -> ConvOperator:
    """The operator of a weight of this shape, checked as torch's layers check it. `where` begins every message.

    Raises:
        TypeError, ValueError: arguments that no convolution has, a kernel larger than the padded input, no output.
        NotImplementedError: a padding mode that is not linear in zeros or periodic: reflect, replicate.
    """
    dims = len(shape) - 2
    if dims not in DIMS:
        got = f"a weight of shape {tuple(shape)}"
        remedy = "Pass the weight of a conv layer"
        raise ValueError(f"{where}: expected (out, in, *kernel) with 1 to 3 kernel sizes, got {got}. {remedy}.")
    kernel = tuple(shape[2:])
    if min(kernel) < 1:
        raise ValueError(f"{where}: expected kernel sizes >= 1, got {kernel}. Pass the weight of a conv layer.")
    if padding_mode in ("reflect", "replicate"):
        raise NotImplementedError(
            f"{where}: expected padding_mode 'zeros' or 'circular', got {padding_mode!r}, which repeats inputs at the "
            "border and has no operator form here. Read the weight as a matrix: spectral_norm(weight)."
        )
    if padding_mode not in ("zeros", "circular"):
        remedy = "Name one of these"
        raise ValueError(f"{where}: expected padding_mode 'zeros' or 'circular', got {padding_mode!r}. {remedy}.")
    circular = padding_mode == "circular"
    if circular and transposed:
        raise ValueError(f"{where}: expected zero padding of a transposed convolution, got 'circular'. Use 'zeros'.")
    size = _tuple(where, "input_size", input_size, dims, 1)
    strides, dilations = _tuple(where, "stride", stride, dims, 1), _tuple(where, "dilation", dilation, dims, 1)
    extra = _tuple(where, "output_padding", output_padding, dims, 0)
    before, after = _padding(where, padding, kernel, strides, dilations, transposed)
    if not _is_whole(groups) or groups < 1 or shape[0] % groups:
        remedy = f"Dimension 0 of the weight {tuple(shape)} is cut into that many groups"
        raise ValueError(f"{where}: expected groups >= 1 that divide {shape[0]}, got {groups!r}. {remedy}.")
    if any(extra) and not transposed:
        raise ValueError(f"{where}: expected output_padding of transposed layers only, got {extra}. Leave it out.")
    if transposed and any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise ValueError(f"{where}: expected output_padding below stride or dilation, got {extra}. Lower it.")
    if circular and any(p > n for p, n in zip(before + after, size * 2, strict=True)):
        remedy = "Circular padding wraps around once"
        raise ValueError(f"{where}: expected circular padding of at most the input {size}, got {after}. {remedy}.")
    operator = ConvOperator(size, strides, dilations, before, after, extra, circular, transposed)
    _check_output(where, operator, kernel)
    return operator


def _check_output(where: str, operator: ConvOperator, kernel: tuple[int, ...]) -> None:
    reach = tuple(d * (k - 1) + 1 for d, k in zip(operator.dilation, kernel, strict=True))
    if not operator.transposed:
        padded = tuple(
            n + b + a for n, b, a in zip(operator.input_size, operator.before, operator.after, strict=True)
        )
        if any(r > n for r, n in zip(reach, padded, strict=True)):
            raise ValueError(
                f"{where}: expected a kernel of at most the padded input, got one reaching over {reach} on an input of "
                f"{operator.input_size}, {padded} with its padding. Give the input_size that the layer is used with."
            )
    if any(n < 1 for n in operator.output_size(kernel)):
        raise ValueError(
            f"{where}: expected an output, got size {operator.output_size(kernel)} from an input of "
            f"{operator.input_size}. Give the input_size that the layer is used with."
        )


def _padding(
    where: str,
    padding: int | str | Sequence[int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    transposed: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not isinstance(padding, str):
        both = _tuple(where, "padding", padding, len(kernel), 0)
        return both, both
    if padding not in ("same", "valid") or transposed:
        remedy = "Transposed convolutions take numbers" if transposed else "Name one of these"
        raise ValueError(f"{where}: expected padding to be numbers, 'same' or 'valid', got {padding!r}. {remedy}.")
    if padding == "same" and any(s != 1 for s in stride):
        raise ValueError(f"{where}: expected stride 1 with padding='same', got {stride}. Give the padding in numbers.")
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    before = tuple(t // 2 for t in total)
    return before, tuple(t - b for t, b in zip(total, before, strict=True))


def _tuple(where: str, name: str, value: object, dims: int, least: int) -> tuple[int, ...]:
    values = (value,) * dims if _is_whole(value) else value
    if not isinstance(values, (tuple, list)) or not all(_is_whole(x) for x in values):
        raise TypeError(f"{where}: expected {name} to be whole numbers, got {value!r}. Give one per spatial dimension.")
    if len(values) != dims or any(x < least for x in values):
        example = (8,) * dims
        remedy = (
            f"It is the spatial size alone, without channels, such as {example}"
            if name == "input_size"
            else "Give one per spatial dimension, or one number for all"
        )
        raise ValueError(f"{where}: expected {name} to hold {dims} numbers >= {least}, got {tuple(values)}. {remedy}.")
    return tuple(int(x) for x in values)


def _is_whole(x: object) -> bool:
    """An int, numpy's among them."""
    return isinstance(x, (int, numbers.Integral)) and not isinstance(x, bool)
