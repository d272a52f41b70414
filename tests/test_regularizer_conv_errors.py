"""conv="operator" in discovery: layers of several sizes, shared or special ones, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_networks import Running
from layer_samples import entry_of, treatment
from regularizer_truth import refuses
from torch import Tensor, nn

from spectral_ops import Rule, SpectralRegularizer
from spectral_ops.conv_sizes import REMEDY
from spectral_ops.layers import discover
from spectral_ops.ops.layout import Kind, Layout
from spectral_ops.rules import expected


def operators(model: nn.Module, input_size: Any, **arguments: Any) -> dict[str, str]:
    return treatment(model, conv="operator", input_size=input_size, **arguments)


def remedy(name: str) -> str:
    return f"{REMEDY}, name {name!r} in exclude, or set rules={{{name!r}: 'matrix'}}"


# ---- the arguments ----


@pytest.mark.parametrize("make", [discover, lambda model, **kw: SpectralRegularizer(model, strength=1.0, **kw)])
def test_arguments_that_do_not_go_together(make: Callable[..., Any]) -> None:
    model = nn.Conv2d(2, 2, 3)
    with refuses(ValueError, expected("conv to be 'reshape' or 'operator'", "'dense'", "Name one of these")):
        make(model, conv="dense", input_size=(2, 4, 4))
    message = expected("no input_size with conv='reshape'", "(2, 4, 4)", "Add conv='operator', or leave input_size out")
    with refuses(ValueError, message):
        make(model, input_size=(2, 4, 4))
    give = "Give the shape of an input without its batch dimension, as input_size=(3, 224, 224)"
    with refuses(ValueError, expected("an input_size with conv='operator'", "none", give)):
        make(model, conv="operator")
    got = "list, which tells nothing of the layers"
    with refuses(TypeError, expected("a module with conv='operator'", got, "Pass the model itself")):
        make(list(model.named_parameters()), conv="operator", input_size=(2, 4, 4))
    with pytest.raises(ValueError, match=r"expected a forward on meta tensors of shape \(2, 3, 4, 4\) to run"):
        make(model, conv="operator", input_size=(3, 4, 4))


# ---- which layers ----


def test_rules_and_switches_win() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    weights = [f"{i}.weight" for i in range(3)]
    assert list(operators(model, (2, 9, 9), biases=False).values())[::2] == ["operator", "2 operators", "operator"]
    rules = {"0.weight": "matrix", "1.weight": Rule(split=(4, 0)), "2.weight": "skip"}
    found = operators(model, (2, 9, 9), rules=rules)
    assert [found[name] for name in weights] == ["matrix", "4 matrices", "left out"]
    # Nothing is run where no layer needs its size.
    assert operators(model, (7,), rules=rules) == found
    assert operators(model, (7,), weights=False)["0.weight"] == "left out"
    assert operators(model, (7,), include="*.bias")["0.weight"] == "left out"
    assert operators(nn.Linear(2, 2), (7,)) == {"weight": "matrix", "bias": "bias"}


def test_transposed_without_overlap_is_read_along_dimension_0() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.ConvTranspose2d(6, 6, 3, 2, groups=2))
    exact, overlapping = (entry_of(model, f"{i}.weight", conv="operator", input_size=(4, 5, 5)).layout for i in (0, 1))
    assert exact == Layout(Kind.MATRIX, 2, 0, 0)
    assert overlapping is not None and overlapping[:4] == (Kind.MATRIX, 2, 0, 1) and overlapping.operator is not None


def test_an_output_size_is_the_layers_output_padding() -> None:
    model = Running(lambda m, x: m.up(x, output_size=[10, 9]), up=nn.ConvTranspose2d(1, 1, 3, stride=2))
    layout = entry_of(model, "up.weight", conv="operator", input_size=(1, 4, 4)).layout
    assert layout is not None and layout.operator is not None and layout.operator.output_padding == (1, 0)


def test_a_class_that_pads_otherwise_is_refused() -> None:
    class Same(nn.Conv2d):  # as TensorFlow pads
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    model = nn.Sequential(Same(1, 1, 3, stride=2))
    fix = "Its class computes something else: set rules={'0.weight': 'matrix'}, or name it in exclude"
    with refuses(ValueError, expected("layer '0' to take 8x8 to 3x3, as its arguments say", "4x4", fix)):
        operators(model, (1, 8, 8))
    assert operators(model, (1, 8, 8), rules={"0.weight": "matrix"})["0.weight"] == "matrix"


def test_reflect_and_replicate_padding_are_refused_where_they_pad() -> None:
    fix = "Read it as a matrix by rules={'0.weight': 'matrix'}, or name it in exclude"
    for mode in ("reflect", "replicate"):
        condition, got = "padding_mode 'zeros' or 'circular' of layer '0'", f"{mode!r}, which has no operator form here"
        for padding in (1, "same"):
            with refuses(NotImplementedError, expected(condition, got, fix)):
                operators(nn.Sequential(nn.Conv2d(1, 1, 3, padding=padding, padding_mode=mode)), (1, 8, 8))
        for kernel, padding in ((3, 0), (3, "valid"), (1, "same")):
            model = nn.Conv2d(1, 1, kernel, padding=padding, padding_mode=mode)
            assert operators(model, (1, 8, 8))["weight"] == ("operator" if kernel == 3 else "matrix")


# ---- layers of no size, or of several ----


def test_a_layer_that_is_not_reached() -> None:
    model = Running(lambda m, x: m.a(x), a=nn.Conv2d(1, 1, 3), b=nn.Conv2d(1, 1, 3))
    got = "an unknown one: no forward or pattern reaches it"
    for size in ((1, 8, 8), {"a": 8}):
        with refuses(ValueError, expected("the input size of layer 'b'", got, remedy("b.weight"))):
            operators(model, size)
        assert operators(model, size, exclude="b.*")["b.weight"] == "left out"
        assert operators(model, size, rules={"b.weight": "matrix"})["b.weight"] == "matrix"
    assert operators(model, {"a": 8, "b": 6})["b.weight"] == "operator"


def test_a_layer_of_several_sizes() -> None:
    model = Running(lambda m, x: m.conv(m.conv(x)[..., ::2]), conv=nn.Conv2d(1, 1, 3, padding=1))
    condition = "one convolution with the weight 'conv.weight', of one input size"
    got = "8x8 in layer 'conv', 8x4 in layer 'conv'"
    with refuses(ValueError, expected(condition, got, remedy("conv.weight"))):
        operators(model, (1, 8, 8))
    assert operators(model, {"conv": (8, 4)})["conv.weight"] == "operator"
    assert operators(model, (1, 8, 8), exclude="conv.weight")["conv.weight"] == "left out"


def test_sizes_do_not_matter_without_overlap() -> None:
    model = Running(lambda m, x: m.conv(m.conv(x)[..., ::2]), conv=nn.Conv2d(1, 1, 1))  # as a head for many scales
    assert operators(model, (1, 8, 8))["conv.weight"] == "matrix"


def tied(stride: int = 1) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, stride, padding=1))
    model[1].weight = model[0].weight
    return model


def test_tied_weights() -> None:
    reason = "nn.Conv2d weight, shared with 1.weight, operator on 8x8"
    assert entry_of(tied(), "0.weight", conv="operator", input_size=(2, 8, 8)).reason == reason
    condition = "one convolution with the weight '0.weight', of one input size"
    fix = "Name '0.weight' in exclude, or set rules={'0.weight': 'matrix'}"
    with refuses(ValueError, expected(condition, "stride 1x1 in layer '0', stride 2x2 in layer '1'", fix)):
        operators(tied(stride=2), (2, 8, 8))

    groups = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2))  # the same shape, and other maps
    groups[1].weight = groups[0].weight
    with refuses(ValueError, expected(condition, "groups 1 in layer '0', groups 2 in layer '1'", fix)):
        operators(groups, (2, 8, 8))

    both = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3, stride=2))
    both[1].weight = both[0].weight
    first, second = "8x8 and a convolution and stride 1x1", "6x6 and a transposed convolution and stride 2x2"
    got = f"{first} in layer '0', {second} in layer '1'"
    with refuses(ValueError, expected(condition, got, remedy("0.weight"))):
        operators(both, (2, 8, 8))


def test_a_shared_layer_under_two_names() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    model.append(model[0])
    assert operators(model, (2, 8, 8)) == {"0.weight": "operator", "0.bias": "bias"}


# ---- what no convolution has ----


def test_a_size_that_the_layer_cannot_have() -> None:
    start = "SpectralRegularizer, layer '0': expected"
    model = nn.Sequential(nn.Conv2d(2, 2, 5))
    with pytest.raises(ValueError, match=f"^{start} a kernel of at most the padded input, got .* Give the input_size"):
        operators(model, {"0": 4})
    for wrong in ((8,), (8, 8, 8), (8, 0)):
        with pytest.raises(ValueError, match=f"^{start} input_size to hold 2 numbers >= 1, got "):
            operators(model, {"0": wrong})
    with pytest.raises(ValueError, match="^SpectralRegularizer, the model itself: expected a kernel"):
        operators(nn.Conv2d(2, 2, 5), {"weight": 4})


def test_a_weight_stored_in_another_shape() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    model[0].weight = nn.Parameter(torch.zeros(2, 18))
    with pytest.raises(ValueError, match="^SpectralRegularizer, layer '0': expected .out, in, .kernel. with"):
        operators(model, {"0": 4})


def test_lazy_layers_are_refused_as_in_reshape_mode() -> None:
    model = nn.LazyConv2d(2, 3)
    message = expected(
        "parameter 'weight' to be initialised", "a lazy one without a shape", "Run one forward pass first"
    )
    with refuses(ValueError, message):
        operators(model, (2, 8, 8))
    model(torch.ones(1, 2, 8, 8))
    assert operators(model, (2, 8, 8)) == {"weight": "operator", "bias": "bias"}
