"""Which parameter is treated as what: recognition, pairs in place of a model, and the table that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layer_samples import (
    BIAS,
    NOT_RECOGNISED,
    SCALE,
    SHIFT,
    Block,
    Conv1D,
    Holder,
    Tied,
    beside_linear,
    entry_of,
    holder_named,
    parts_of,
    treatment,
)
from torch import nn

from spectral_ops.layers import discover, format_table
from spectral_ops.ops.layout import Kind, Layout
from spectral_ops.rules import Rule

# Recognition


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 2), {"weight": Layout(), "bias": BIAS}),
        (type("Projection", (nn.Linear,), {})(3, 2), {"weight": Layout(), "bias": BIAS}),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(3, 2, bias=False), {"weight": Layout()}),
        (nn.Conv1d(4, 6, 3), {"weight": Layout(Kind.MATRIX, 1, 0, 0), "bias": BIAS}),
        (nn.Conv2d(4, 6, 3, groups=2), {"weight": Layout(Kind.MATRIX, 2, 0, 0), "bias": Layout(Kind.BIAS, 2)}),
        (nn.Conv3d(4, 4, 3, groups=4), {"weight": Layout(Kind.MATRIX, 4, 0, 0), "bias": Layout(Kind.BIAS, 4)}),
        (nn.ConvTranspose1d(4, 6, 3), {"weight": Layout(Kind.MATRIX, 1, 0, 1), "bias": BIAS}),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), {"weight": Layout(Kind.MATRIX, 2, 0, 1), "bias": Layout(Kind.BIAS, 2)}),
        (nn.ConvTranspose3d(4, 6, 3, bias=False), {"weight": Layout(Kind.MATRIX, 1, 0, 1)}),
        (Conv1D(6, 4), {"weight": Layout(Kind.MATRIX, 1, 0, 1), "bias": BIAS}),
        (nn.LayerNorm((3, 4)), {"weight": SCALE, "bias": SHIFT}),
        (nn.GroupNorm(2, 4), {"weight": SCALE, "bias": SHIFT}),
        (nn.BatchNorm2d(4), {"weight": SCALE, "bias": SHIFT}),
        (nn.SyncBatchNorm(4), {"weight": SCALE, "bias": SHIFT}),
        (nn.InstanceNorm1d(4, affine=True), {"weight": SCALE, "bias": SHIFT}),
        (nn.RMSNorm(4), {"weight": SCALE}),
        (holder_named("LlamaRMSNorm", weight=(4,)), {"weight": SCALE}),
        (holder_named("OldNorm", gamma=(4,), beta=(4,)), {"gamma": SCALE, "beta": SHIFT}),
        (holder_named("ScaleNorm", scale=(4,), bias=(4,)), {"scale": SCALE, "bias": SHIFT}),
        (holder_named("LayerNormalization", gamma=(4,)), {"gamma": SCALE}),
        (holder_named("Normalize", scale=(4,)), {"scale": SCALE}),
        (holder_named("NormalNorm", scale=(4,)), {"scale": SCALE}),
        (holder_named("Gemma3nRMSNorm", weight=(4,)), {"weight": SCALE}),
        (holder_named("Qwen3NextRMSNormGated", weight=(4,)), {"weight": SCALE}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_known_module_is_recognised(module: nn.Module, expected: dict[str, Layout]) -> None:
    assert {entry.name: entry.layout for entry in discover(module)} == expected


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(5, 3), "embedding"),
        (nn.EmbeddingBag(5, 3), "embedding"),
        (nn.Bilinear(3, 4, 2), NOT_RECOGNISED),
        (nn.PReLU(4), NOT_RECOGNISED),
        (nn.ParameterList([torch.randn(3, 3)]), NOT_RECOGNISED),
        (Holder(class_token=(1, 1, 4), position=(1, 4, 3)), NOT_RECOGNISED),
        (Holder(weight=(4, 3), bias=(4,)), NOT_RECOGNISED),
        (Holder(layer_scale_parameter=(4,)), NOT_RECOGNISED),
        (holder_named("Conv1D", weight=(4, 3)), NOT_RECOGNISED),  # the name alone, without nf
        (holder_named("PreLayerNormLMHead", bias=(4,)), NOT_RECOGNISED),  # a shift comes with a scale
        (holder_named("LayerNormLinear", weight=(4, 3), bias=(4,)), NOT_RECOGNISED),  # a fused layer
        (holder_named("DiagNormal", scale=(4,), bias=(4,)), NOT_RECOGNISED),  # a distribution
        (holder_named("NormalInverseGamma", scale=(4,)), NOT_RECOGNISED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_not_recognised_is_left_out(module: nn.Module, reason: str) -> None:
    entries = [entry for entry in discover(beside_linear(module)) if entry.name.startswith("0.")]
    assert entries
    assert [(entry.treated_as, entry.reason) for entry in entries] == [("left out", reason)] * len(entries)


def test_a_norm_of_torch_may_have_children() -> None:
    for base in (nn.BatchNorm2d, nn.LayerNorm):
        module = type("WithActivation", (base,), {})(4)
        module.activation = nn.PReLU(4)
        assert treatment(module) == {"weight": "scale", "bias": "shift", "activation.weight": "left out"}


def test_a_block_named_after_its_norm_is_not_a_norm() -> None:
    block = holder_named("NormFirstBlock", gamma=(4,))  # its LayerScale
    block.add_module("norm", nn.LayerNorm(4))
    assert treatment(block) == {"gamma": "left out", "norm.weight": "scale", "norm.bias": "shift"}


@pytest.mark.parametrize(
    "module",
    [
        holder_named("GemmaRMSNorm", weight=(4,)),
        holder_named("Gemma9RMSNorm", weight=(4,)),  # a later member of the family
        holder_named("Qwen3NextRMSNorm", weight=(4,)),
        type("DerivedNorm", (type("T5GemmaRMSNorm", (Holder,), {}),), {})(weight=(4,)),
        type("NemotronLayerNorm1P", (nn.LayerNorm,), {})(4),
        type("WithFlag", (nn.LayerNorm,), {"zero_centered_gamma": True})(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_the_scale_of_a_zero_centred_norm_is_left_out(module: nn.Module) -> None:
    entries = {entry.name: entry for entry in discover(beside_linear(module))}
    assert entries["0.weight"].layout is None
    assert "multiplies by (1 + weight)" in entries["0.weight"].reason
    if "0.bias" in entries:
        assert entries["0.bias"].layout == SHIFT


def test_attention_with_packed_projections() -> None:
    assert treatment(nn.MultiheadAttention(4, 2, add_bias_kv=True)) == {
        "in_proj_weight": "3 matrices",
        "in_proj_bias": "3 biases",
        "bias_k": "left out",
        "bias_v": "left out",
        "out_proj.weight": "matrix",
        "out_proj.bias": "bias",
    }


def test_attention_with_separate_projections() -> None:
    assert treatment(nn.MultiheadAttention(4, 2, kdim=3, vdim=5, bias=False)) == {
        "q_proj_weight": "matrix",
        "k_proj_weight": "matrix",
        "v_proj_weight": "matrix",
        "out_proj.weight": "matrix",
    }


@pytest.mark.parametrize(
    ("module", "matrices", "biases"),
    [
        (nn.RNN(3, 4), "matrix", "bias"),
        (nn.LSTM(3, 4), "4 matrices", "4 biases"),
        (nn.GRU(3, 4, num_layers=2, bidirectional=True), "3 matrices", "3 biases"),
        (nn.RNNCell(3, 4), "matrix", "bias"),
        (nn.LSTMCell(3, 4), "4 matrices", "4 biases"),
        (nn.GRUCell(3, 4), "3 matrices", "3 biases"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_recurrent_weights_are_one_matrix_per_gate(module: nn.Module, matrices: str, biases: str) -> None:
    assert treatment(module) == {
        name: matrices if name.startswith("weight") else biases for name, _ in module.named_parameters()
    }


def test_the_projection_of_an_lstm_is_one_matrix() -> None:
    lstm = nn.LSTM(3, 4, proj_size=2, bidirectional=True, bias=False)
    sides = [treatment(lstm)[f"weight_{which}_l0_reverse"] for which in ("ih", "hh", "hr")]
    assert sides == ["4 matrices", "4 matrices", "matrix"]


def test_the_layouts_cut_and_turn_as_the_layers_do() -> None:
    transposed = nn.ConvTranspose2d(4, 6, 3, groups=2)
    parts = parts_of(entry_of(transposed, "weight"))  # (groups, out/groups, in/groups, 3, 3)
    torch.testing.assert_close(parts[1], transposed.weight[2:].transpose(0, 1))
    conv1d = Conv1D(6, 4)
    torch.testing.assert_close(parts_of(entry_of(conv1d, "weight"))[0], conv1d.weight.T)
    cut = parts_of(entry_of(conv1d, "weight", rules={"weight": Rule(split=(3, 1))}))
    torch.testing.assert_close(cut[2], conv1d.weight[:, 4:].T)
    stack = Holder(experts=(5, 3, 2))
    torch.testing.assert_close(
        parts_of(entry_of(stack, "experts", rules={"experts": "matrices"}))[3, :, 0], stack.experts[3]
    )


@pytest.mark.parametrize("suffix", ["original", "original0", "original1"])
def test_parametrized_weights_are_left_out(suffix: str) -> None:
    linear = nn.Linear(3, 4)
    norm = nn.utils.parametrizations.spectral_norm if suffix == "original" else nn.utils.parametrizations.weight_norm
    entries = {entry.name: entry for entry in discover(norm(linear))}
    assert entries["bias"].treated_as == "bias"
    assert entries[f"parametrizations.weight.{suffix}"].treated_as == "left out"
    assert "parametrized" in entries[f"parametrizations.weight.{suffix}"].reason


def test_weights_under_another_attribute_or_shape_are_left_out() -> None:
    linear = nn.Linear(3, 4)
    linear.weight_g = nn.Parameter(torch.ones(4, 1))  # as torch.nn.utils.weight_norm leaves it
    linear.weight_l = nn.Parameter(torch.ones(4, 1))
    linear.weight = nn.Parameter(torch.ones(12))  # flattened, as sharding libraries do
    reasons = {entry.name: entry.reason for entry in discover(linear)}
    assert reasons == dict.fromkeys(("weight", "weight_g", "weight_l"), NOT_RECOGNISED) | {"bias": "nn.Linear bias"}


@pytest.mark.parametrize("with_embedding", [False, True])
def test_a_shared_parameter_is_one_entry(with_embedding: bool) -> None:
    entries = discover(Tied(with_embedding))
    assert [entry.name for entry in entries] == ["head.weight", "other.bias"]
    if with_embedding:
        assert entries[0].treated_as == "left out"
        assert entries[0].reason == "embedding, tied with other.weight, table.weight"
    else:
        assert entries[0].treated_as == "matrix"
        assert entries[0].reason == "nn.Linear weight, shared with other.weight"


def test_a_bare_parameter_that_is_also_a_bias_is_a_bias() -> None:
    model = Holder(bias=(2,))
    model.decoder = nn.Linear(3, 2)
    model.decoder.bias = model.bias
    assert entry_of(model, "bias").treated_as == "bias"
    assert entry_of(model, "bias").reason == "nn.Linear bias, shared with decoder.bias"


def test_a_module_used_twice_is_one_entry() -> None:
    layer = nn.Linear(2, 2)
    assert list(treatment(nn.Sequential(layer, nn.ReLU(), layer, layer, layer))) == ["0.weight", "0.bias"]
    reason = entry_of(nn.Sequential(layer, layer, layer, layer), "0.weight").reason
    assert reason == "nn.Linear weight, shared with 1.weight, 2.weight and 1 more"


def test_order_and_shapes_are_those_of_named_parameters() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), Tied(True), nn.Conv2d(1, 2, 3))
    assert [(e.name, e.shape) for e in discover(model)] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert all(e.parameter is p for e, (_, p) in zip(discover(model), model.named_parameters(), strict=True))


def test_meta_and_frozen_parameters_are_read_by_shape() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2).requires_grad_(False)
    assert treatment(model) == {"weight": "matrix", "bias": "bias"}


def test_the_parameter_is_looked_up_at_each_use() -> None:
    model = nn.Linear(3, 2)
    weight = entry_of(model, "weight")
    model.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, assign=True)
    assert weight.parameter is model.weight
    nn.utils.parametrizations.weight_norm(model)
    message = "expected parameter 'weight' on its module, got none. It was removed or parametrized since; build"
    with pytest.raises(RuntimeError, match=message):
        _ = weight.parameter


# Without modules


def test_pairs_are_read_by_shape_and_name() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(4))
    entries = {entry.name: entry for entry in discover(model.named_parameters())}
    assert {name: entry.treated_as for name, entry in entries.items()} == {
        "0.weight": "matrix",
        "0.bias": "bias",
        "1.weight": "left out",
        "1.bias": "bias",
    }
    assert entries["0.weight"].reason == "no module given: read as one matrix"
    assert entries["1.weight"].reason == "no module given: name it in rules"
    assert entries["0.weight"].module is None and entries["0.weight"].parameter is model[0].weight


def test_pairs_may_be_a_one_shot_generator_of_any_kind() -> None:
    def pairs() -> Iterator[tuple[str, nn.Parameter]]:
        yield "bias", nn.Parameter(torch.ones(3))
        yield "temperature", nn.Parameter(torch.ones(()))

    assert treatment(pairs()) == {"bias": "bias", "temperature": "left out"}


def test_a_parameter_under_two_names_in_pairs_is_one_entry() -> None:
    shared = nn.Parameter(torch.ones(2, 2))
    entries = discover([("a.weight", shared), ("b.weight", shared)])
    assert [(e.name, e.reason) for e in entries] == [
        ("a.weight", "no module given: read as one matrix, shared with b.weight")
    ]


def test_rules_and_callables_work_on_pairs() -> None:
    seen = []

    def packed(module: nn.Module | None, name: str) -> bool:
        seen.append(module)
        return name == "qkv.weight"

    model = Block()
    assert treatment(model.named_parameters(), rules={packed: Rule(split=(3, 0)), "norm.weight": "scale"}) == {
        "qkv.weight": "3 matrices",
        "qkv.bias": "3 biases",
        "proj.weight": "matrix",
        "proj.bias": "bias",
        "norm.weight": "scale",
        "norm.bias": "bias",
    }
    assert set(seen) == {None}


# The table


def table_of(model: Any, *arguments: Any, **discovered: Any) -> list[str]:
    return format_table(discover(model, **discovered), *arguments).splitlines()


def test_the_table() -> None:
    sigmas = {"qkv.weight": [1.0, 12.34567, 3.0], "proj.weight": torch.tensor([2.5])}
    assert table_of(
        Block(),
        sigmas,
        {"proj.weight": "frozen"},
        rules={"qkv.weight": Rule(split=(3, 0))},
        exclude="norm.bias",
        target={"proj.weight": 0.5},
    ) == [
        "parameter    treated as  shape  target  sigma     reason",
        "qkv.weight   3 matrices  12x4   1       1..12.35  rule 'qkv.weight'",
        "qkv.bias     3 biases    12     -       -         nn.Linear bias; cut as its weight, by rule",
        "proj.weight  matrix      4x4    0.5     2.5       nn.Linear weight; frozen",
        "proj.bias    bias        4      -       -         nn.Linear bias",
        "norm.weight  scale       4      1       -         nn.LayerNorm weight",
        "norm.bias    left out    4      -       -         excluded",
        "",
        "5 of 6 parameters: 4 matrices, 4 biases, 1 scale",
    ]


def test_the_table_shows_strengths_where_they_differ() -> None:
    assert "strength" not in table_of(Block(), strength={"*": 2.0})[0]
    lines = table_of(Block(), strength={"norm.*": 0.5, "*": 2.0}, exclude="proj.weight")
    assert lines[0].split() == ["parameter", "treated", "as", "shape", "target", "strength", "sigma", "reason"]
    column = lines[0].index("strength")
    assert [line[column:].split()[0] for line in lines[1:7]] == ["2", "2", "-", "2", "0.5", "0.5"]


def test_sigmas_that_are_not_finite_show() -> None:
    sigmas = {"weight_ih_l0": [1.0, float("nan"), 0.5, 2.0], "weight_hh_l0": [1.0, float("inf"), 2.0, 3.0]}
    lines = table_of(nn.LSTM(2, 2, bias=False), sigmas)
    assert "  nan  " in lines[1] and "1..inf" in lines[2]


def test_the_table_of_a_scalar_and_of_one_matrix() -> None:
    lines = table_of([("temperature", nn.Parameter(torch.ones(()))), ("w", nn.Parameter(torch.ones(3, 4)))])
    assert lines[1].split()[:4] == ["temperature", "left", "out", "scalar"]
    assert lines[-1] == "1 of 2 parameters: 1 matrix"


def test_an_entry_is_readable() -> None:
    assert repr(entry_of(nn.Linear(3, 2), "weight")) == (
        f"Entry(name='weight', attribute='weight', layout={Layout()}, shape=(2, 3), "
        "reason='nn.Linear weight', target=1.0, strength=1.0)"
    )
