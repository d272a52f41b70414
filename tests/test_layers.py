"""Which parameter is treated as what, and how the user changes it: recognition, rules, patterns, errors, the table."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_ops.layers import Entry, discover, format_table
from spectral_ops.ops.layout import Kind, Layout, as_matrices
from spectral_ops.rules import Rule

NOT_RECOGNISED = "not recognised; name it in rules to treat it"
SCALE, SHIFT, BIAS = Layout(Kind.SCALE), Layout(Kind.SHIFT), Layout(Kind.BIAS)


class Holder(nn.Module):
    """Parameters that belong to no layer we know."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class Conv1D(Holder):
    """As GPT-2's layer in transformers: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__(weight=(nx, nf), bias=(nf,))
        self.nf = nf


class Block(nn.Module):
    """A packed projection, a second layer and a norm."""

    def __init__(self, packed: nn.Module | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12) if packed is None else packed
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Tied(nn.Module):
    """Two linears and an embedding around one parameter, registered under the linear's name first."""

    def __init__(self, with_embedding: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False)
        self.other = nn.Linear(4, 6)
        self.other.weight = self.head.weight
        if with_embedding:
            self.table = nn.Embedding(6, 4)
            self.table.weight = self.head.weight


def holder_named(class_name: str, **shapes: tuple[int, ...]) -> nn.Module:
    return type(class_name, (Holder,), {})(**shapes)


def beside_linear(module: nn.Module) -> nn.Sequential:
    """The module with a layer that is always treated, as nothing to treat is an error."""
    return nn.Sequential(module, nn.Linear(2, 2))


def treatment(model: Any, **arguments: Any) -> dict[str, str]:
    return {entry.name: entry.treated_as for entry in discover(model, **arguments)}


def entry_of(model: Any, name: str, **arguments: Any) -> Entry:
    return next(entry for entry in discover(model, **arguments) if entry.name == name)


def parts_of(entry: Entry) -> Tensor:
    assert entry.layout is not None
    return as_matrices(entry.parameter, entry.layout)


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


# Patterns


def test_include_and_exclude() -> None:
    reasons = {e.name: e.reason for e in discover(Block(), include=["qkv.*", "norm.*"], exclude="*.bias")}
    assert reasons == {
        "qkv.weight": "nn.Linear weight",
        "qkv.bias": "excluded",
        "proj.weight": "not in include",
        "proj.bias": "excluded",
        "norm.weight": "nn.LayerNorm weight",
        "norm.bias": "excluded",
    }


def test_include_does_not_treat_what_is_not_recognised_but_a_rule_does() -> None:
    model = beside_linear(nn.Embedding(5, 3))
    assert treatment(model, include="*.weight")["0.weight"] == "left out"
    assert treatment(model, include="*.weight", rules={"0.weight": "matrix"})["0.weight"] == "matrix"


@pytest.mark.parametrize("arguments", [{"include": "proj.*"}, {"exclude": "qkv.*"}])
def test_a_rule_on_a_dropped_parameter_is_dropped(arguments: dict[str, str]) -> None:
    assert treatment(Block(), rules={"qkv.weight": Rule(split=(3, 0))}, **arguments)["qkv.weight"] == "left out"


def test_a_callable_is_given_the_owner_and_the_full_name() -> None:
    model = Block()

    def of_a_norm(module: nn.Module | None, name: str) -> bool:
        assert module is not None and getattr(module, name.rpartition(".")[2]) is model.get_parameter(name)
        return isinstance(module, nn.LayerNorm)

    assert [name for name, how in treatment(model, exclude=of_a_norm).items() if how == "left out"] == [
        "norm.weight",
        "norm.bias",
    ]


def test_patterns_are_matched_against_every_name_of_a_shared_parameter() -> None:
    model = Tied(with_embedding=False)
    assert treatment(model, exclude="other.weight")["head.weight"] == "left out"
    assert treatment(model, include=lambda module, name: module is model.other)["head.weight"] == "matrix"


def test_patterns_match_in_upper_and_lower_case_as_written() -> None:
    with pytest.raises(ValueError, match=re.escape("got 'QKV.*', which matches none")):
        discover(Block(), include="QKV.*")


def test_the_first_matching_pattern_of_a_mapping_wins() -> None:
    assert treatment(Block(), rules={"qkv.*": "skip", "*.weight": "shift"}) == {
        "qkv.weight": "left out",
        "qkv.bias": "left out",
        "proj.weight": "shift",
        "proj.bias": "bias",
        "norm.weight": "shift",
        "norm.bias": "shift",
    }
    assert entry_of(Block(), "qkv.bias", rules={"qkv.*": "skip"}).reason == "rule 'qkv.*': skip"


# Rules


@pytest.mark.parametrize(
    ("rule", "shape", "layout"),
    [
        ("matrix", (4, 6), Layout()),
        (Rule("matrix", split=(2, 1)), (4, 6), Layout(Kind.MATRIX, 2, 1, 0)),
        (Rule("matrix", split=(3, -1), row_dim=-1), (4, 6), Layout(Kind.MATRIX, 3, 1, 1)),
        ("matrix", (4, 3, 2), Layout()),
        ("matrices", (4, 3, 2), Layout(Kind.MATRIX, 4, 0, 1)),
        (Rule("matrices", row_dim=2), (4, 3, 2), Layout(Kind.MATRIX, 4, 0, 2)),
        ("matrices", (0, 3, 2), Layout(Kind.MATRIX, 1, 0, 1)),
        ("bias", (6,), BIAS),
        (Rule("bias", split=(3, 0)), (6,), Layout(Kind.BIAS, 3)),
        ("scale", (4, 1, 1), SCALE),
        ("shift", (2, 3), SHIFT),
    ],
)
def test_a_rule_gives_the_layout(rule: str | Rule, shape: tuple[int, ...], layout: Layout) -> None:
    entry = entry_of(Holder(x=shape), "x", rules={"x": rule})
    assert entry.layout == layout and entry.reason == "rule 'x'"
    assert parts_of(entry).shape[0] == layout.parts


def test_a_rule_wins_over_recognition_and_switches() -> None:
    rules = {"proj.weight": "matrix", "norm.weight": "shift"}
    assert treatment(Block(), rules=rules, weights=False, norms=False) == {
        "qkv.weight": "left out",
        "qkv.bias": "bias",
        "proj.weight": "matrix",
        "proj.bias": "bias",
        "norm.weight": "shift",
        "norm.bias": "left out",
    }


def test_a_rule_that_only_splits_keeps_the_rows_of_the_layer() -> None:
    assert entry_of(Conv1D(6, 4), "weight", rules={"weight": Rule(split=(3, 1))}).layout == Layout(Kind.MATRIX, 3, 1, 1)
    transposed = nn.ConvTranspose1d(4, 6, 3)
    assert entry_of(transposed, "weight", rules={"weight": "matrix"}).layout == Layout(Kind.MATRIX, 1, 0, 1)
    turned = entry_of(Conv1D(6, 4), "weight", rules={"weight": Rule(row_dim=0)})
    assert turned.layout == Layout(Kind.MATRIX, 1, 0, 0)


@pytest.mark.parametrize(
    ("module", "rules", "bias"),
    [
        (nn.Linear(4, 12), {"weight": Rule(split=(3, 0))}, "3 biases"),
        (nn.Linear(6, 12), {"weight": Rule(split=(3, 1))}, "bias"),  # along the inputs
        (nn.Linear(4, 12), {"weight": Rule(split=(3, 0)), "bias": Rule("bias", split=(2, 0))}, "2 biases"),
        (nn.Linear(4, 12), {"weight": Rule(split=(3, 0)), "bias": "skip"}, "left out"),
        (nn.Linear(4, 12), {"weight": "skip"}, "bias"),
        (Conv1D(12, 6), {"weight": Rule(split=(3, 1))}, "3 biases"),
        (Conv1D(12, 6), {"weight": Rule(split=(3, 0))}, "bias"),
        (nn.Conv2d(4, 12, 3, groups=4), {"weight": "matrix"}, "bias"),
        (nn.Conv2d(4, 12, 3, groups=4), {"weight": Rule(split=(6, 0))}, "6 biases"),
        (nn.ConvTranspose2d(4, 12, 3, groups=4), {"weight": Rule(split=(4, 0))}, "4 biases"),  # its own groups
        (nn.ConvTranspose2d(4, 12, 3), {"weight": Rule(split=(3, 1))}, "3 biases"),
        (nn.ConvTranspose2d(4, 12, 3), {"weight": Rule(split=(2, 0))}, "bias"),
    ],
)
def test_a_bias_is_split_as_its_weight(module: nn.Module, rules: dict[str, Rule | str], bias: str) -> None:
    assert treatment(module, rules=rules)["bias"] == bias


def test_the_biases_of_packed_layers_follow_their_own_weights() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert treatment(attention, rules={"in_proj_weight": "matrix"})["in_proj_bias"] == "bias"
    lstm = treatment(nn.LSTM(3, 4), rules={"weight_ih_l0": "matrix"})
    assert (lstm["bias_ih_l0"], lstm["bias_hh_l0"]) == ("bias", "4 biases")
    entry = entry_of(nn.Linear(4, 12), "bias", rules={"weight": Rule(split=(3, 0))})
    assert entry.reason == "nn.Linear bias; cut as its weight, by rule"


def test_a_split_bias_still_obeys_the_switch() -> None:
    entry = entry_of(nn.Linear(4, 12), "bias", rules={"weight": Rule(split=(3, 0))}, biases=False)
    assert entry.layout is None and entry.reason == "biases=False"


@pytest.mark.parametrize(
    ("switch", "left_out"),
    [
        ("weights", ["qkv.weight", "proj.weight"]),
        ("biases", ["qkv.bias", "proj.bias"]),
        ("norms", ["norm.weight", "norm.bias"]),
    ],
)
def test_switches(switch: str, left_out: list[str]) -> None:
    entries = discover(Block(), **{switch: False})  # type: ignore[arg-type]
    assert {entry.name: entry.reason for entry in entries if entry.layout is None} == dict.fromkeys(
        left_out, f"{switch}=False"
    )


# Targets and strengths


def targets(**arguments: Any) -> dict[str, float]:
    return {entry.name: entry.target for entry in discover(Block(), **arguments)}


def test_a_single_target_is_for_the_matrices() -> None:
    assert targets(target=2) == {
        "qkv.weight": 2.0,
        "qkv.bias": 0.0,
        "proj.weight": 2.0,
        "proj.bias": 0.0,
        "norm.weight": 1.0,
        "norm.bias": 0.0,
    }


def test_targets_by_pattern() -> None:
    by_pattern = targets(target={"proj.weight": 0.0, "norm.*": 1.5, "p*": 7.0})
    assert by_pattern["qkv.weight"] == 1.0
    assert by_pattern["proj.weight"] == 0.0
    assert by_pattern["norm.weight"] == 1.5
    assert by_pattern["norm.bias"] == by_pattern["proj.bias"] == 0.0


def test_a_target_pattern_of_left_out_parameters_is_allowed() -> None:
    assert targets(target={"norm.*": 1.5}, norms=False)["norm.weight"] == 0.0


def test_strengths_by_pattern() -> None:
    entries = discover(Block(), strength={"qkv.*": 0, "*": 2.5})
    assert {entry.name: entry.strength for entry in entries if entry.name.startswith("q")} == {
        "qkv.weight": 0.0,
        "qkv.bias": 0.0,
    }
    assert {entry.strength for entry in entries if not entry.name.startswith("q")} == {2.5}
    assert {entry.strength for entry in discover(Block())} == {1.0}


def test_strengths_need_not_cover_what_is_left_out() -> None:
    discover(beside_linear(nn.Embedding(3, 3)), strength={"1.*": 2.0})


# Errors


def error(message: str) -> str:
    """The whole message, which ends with a remedy."""
    return "^" + re.escape(f"SpectralRegularizer: expected {message}.") + "$"


def test_no_parameters() -> None:
    message = "a model with parameters, got none. Pass the model that is trained, once it is built"
    for empty in (nn.ReLU(), [], iter(())):
        with pytest.raises(ValueError, match=error(message)):
            discover(empty)


def test_nothing_to_treat() -> None:
    message = "at least one parameter to treat, got 2 left out (excluded). Name a parameter in rules, or leave out less"
    with pytest.raises(ValueError, match=error(message)):
        discover(nn.Linear(2, 2), exclude="*")


REMEDY = "Pass the model or model.named_parameters()"


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (3, "int"),
        (torch.ones(2, 2), "Tensor"),
        (nn.Linear(2, 2).parameters(), "an item of type Parameter"),
        (nn.Linear(2, 2).state_dict(), "an item of type str"),
        ([("weight", torch.ones(2, 2))], "Tensor under 'weight'"),
        ([(0, nn.Parameter(torch.ones(2, 2)))], "an item of type tuple"),
    ],
)
def test_neither_a_module_nor_pairs(model: Any, got: str) -> None:
    with pytest.raises(TypeError, match=error(f"model to be a module or (name, parameter) pairs, got {got}. {REMEDY}")):
        discover(model)


def test_a_name_twice_in_pairs() -> None:
    pairs = [("x", nn.Parameter(torch.ones(2, 2))), ("x", nn.Parameter(torch.ones(2, 2)))]
    message = "every name to be given once, got 'x' repeatedly. Prefix the names of each model"
    with pytest.raises(ValueError, match=error(message)):
        discover(pairs)


def test_a_lazy_parameter() -> None:
    model = nn.LazyLinear(3)
    message = "parameter 'weight' to be initialised, got a lazy one without a shape. Run one forward pass first"
    with pytest.raises(ValueError, match=error(message)):
        discover(model)
    model(torch.ones(1, 2))
    assert treatment(model) == {"weight": "matrix", "bias": "bias"}


@pytest.mark.parametrize("argument", ["include", "exclude", "rules", "target", "strength"])
def test_a_pattern_that_matches_nothing(argument: str) -> None:
    def value(pattern: Any) -> Any:
        return [pattern] if argument in ("include", "exclude") else {pattern: "bias" if argument == "rules" else 1.0}

    def never(module: nn.Module | None, name: str) -> bool:
        return False

    start = f"every pattern of {argument} to match a parameter, got"
    near = f"{start} 'pro.weigth', which matches none. The nearest names are 'proj.weight', "
    with pytest.raises(ValueError, match=re.escape(near)):
        discover(Block(), **{argument: value("pro.weigth")})
    of_module = f"{start} 'qkv', which matches none. For all parameters of the module write 'qkv.*'"
    with pytest.raises(ValueError, match=error(of_module)):
        discover(Block(), **{argument: value("qkv")})
    listing = "List the names with [name for name, _ in model.named_parameters()]"
    with pytest.raises(ValueError, match=error(f"{start} 'zzz', which matches none. {listing}")):
        discover(Block(), **{argument: value("zzz")})
    of_callable = f"{start} callable {never.__qualname__}, true for none of 6. {listing}"
    with pytest.raises(ValueError, match=error(of_callable)):
        discover(Block(), **{argument: value(never)})


@pytest.mark.parametrize("argument", ["include", "exclude", "rules"])
def test_a_pattern_of_another_type(argument: str) -> None:
    remedy = "Use a name with wildcards such as 'head.*', or a callable (module, name) -> bool"
    # A module is callable, but calling it would run its forward.
    for pattern in (3, nn.Linear(2, 2)):
        value: Any = {pattern: "bias"} if argument == "rules" else [pattern]
        message = f"every pattern of {argument} to be a string or a callable, got {type(pattern).__name__}. {remedy}"
        with pytest.raises(TypeError, match=error(message)):
            discover(Block(), **{argument: value})


def test_arguments_that_are_no_patterns_or_mappings() -> None:
    message = "include to be a pattern or a sequence of them, got dict. A mapping belongs in rules"
    with pytest.raises(TypeError, match=error(message)):
        discover(Block(), include={"*": 1})
    for argument in ("rules", "strength"):
        message = f"{argument} to be a mapping from pattern to value, got list. Write {{'*.weight': value}}"
        with pytest.raises(TypeError, match=error(message)):
            discover(Block(), **{argument: ["*"]})
    remedy = "Write rules={'*.qkv.weight': Rule(split=(3, 0))}, or the kind alone as a string"
    with pytest.raises(TypeError, match=error(f"rules['qkv.*'] to be a Rule or a string, got tuple. {remedy}")):
        discover(Block(), rules={"qkv.*": (3, 0)})


KINDS = "matrix, matrices, bias, scale, shift, skip"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"kind": "conv"}, ValueError, f"the kind of a rule to be one of {KINDS}, got 'conv'. Use one of these"),
        (
            {"split": 3},
            TypeError,
            "the split of a rule to be two integers (parts, dim), got 3. Write Rule(split=(3, 0))",
        ),
        (
            {"split": (3, True)},
            TypeError,
            "the split of a rule to be two integers (parts, dim), got (3, True). Write Rule(split=(3, 0))",
        ),
        (
            {"split": (0, 0)},
            ValueError,
            "the parts of a rule's split to be >= 1, got 0. Leave split out to keep the parameter whole",
        ),
        (
            {"row_dim": "1"},
            TypeError,
            "the row_dim of a rule to be an integer, got '1'. It is the dimension that counts the outputs",
        ),
    ],
)
def test_a_wrong_rule(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=error(message)):
        Rule(**arguments)


@pytest.mark.parametrize(
    ("rule", "shape", "message"),
    [
        (
            "matrix",
            (4,),
            "'x' to have at least 2 dimensions to be a matrix, got (4,). Use 'bias', 'scale' or 'shift', "
            "or a narrower pattern",
        ),
        (
            "matrices",
            (4, 2),
            "'x' to have 3 dimensions (S, m, n) to be S matrices, got (4, 2). Use 'matrix', with split=(parts, dim) "
            "for a packed one",
        ),
        (
            Rule("matrices", split=(2, 1)),
            (4, 2, 2),
            "no split in the rule for 'x', got (2, 1). 'matrices' already cuts dimension 0",
        ),
        (
            Rule("matrices", row_dim=0),
            (4, 2, 2),
            "row_dim 1 or 2 in the rule for 'x', got 0. Dimension 0 counts the matrices",
        ),
        (
            "bias",
            (4, 2),
            "'x' to have 1 dimension to be a bias, got (4, 2). Use 'shift', which allows any shape",
        ),
        (
            "scale",
            (),
            "'x' to have at least 1 dimension to be a scale, got (). Leave it out; a single number has no norm to hold",
        ),
        (
            Rule("scale", split=(2, 0)),
            (4,),
            "no split in the rule for 'x', got (2, 0). A scale counts element by element",
        ),
        (Rule("bias", row_dim=0), (4,), "no row_dim in the rule for 'x', got 0. A bias has no rows"),
        (
            Rule(split=(3, 0)),
            (4, 3),
            "dimension 0 of 'x' to be divisible by 3 parts, got (4, 3). Check the number of parts and the dimension",
        ),
        (
            Rule("bias", split=(3, 0)),
            (4,),
            "dimension 0 of 'x' to be divisible by 3 parts, got (4,). Check the number of parts and the dimension",
        ),
        (
            Rule(split=(3, 2)),
            (3, 3),
            "the split dim of the rule for 'x' to be a dimension it has, got 2. 'x' has shape (3, 3)",
        ),
        (
            Rule(row_dim=-3),
            (3, 3),
            "the row_dim of the rule for 'x' to be a dimension it has, got -3. 'x' has shape (3, 3)",
        ),
    ],
)
def test_a_rule_that_does_not_fit(rule: str | Rule, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=error(message)):
        discover(Holder(x=shape), rules={"x": rule})


@pytest.mark.parametrize("value", [torch.tensor(1.0), "1", True, None])
@pytest.mark.parametrize("argument", ["target", "strength"])
def test_a_target_or_strength_that_is_no_number(argument: str, value: Any) -> None:
    message = f"{argument}['*'] to be a number, got {type(value).__name__}. Give a float"
    with pytest.raises(TypeError, match=error(message)):
        discover(Block(), **{argument: {"*": value}})


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_a_target_or_strength_out_of_range(value: float) -> None:
    message = f"to be finite and >= 0, got {value}. Give a float such as 1.0"
    with pytest.raises(ValueError, match=error(f"target {message}")):
        discover(Block(), target=value)
    for argument in ("target", "strength"):
        # Also where an earlier pattern leaves the value unused.
        with pytest.raises(ValueError, match=error(f"{argument}['qkv.*'] {message}")):
            discover(Block(), **{argument: {"*": 1.0, "qkv.*": value}})


def test_a_target_of_another_type() -> None:
    with pytest.raises(TypeError, match=error("target to be a number, got list. Give a float")):
        discover(Block(), target=[1.0])  # type: ignore[arg-type]


def test_a_target_pattern_of_biases_only() -> None:
    message = "every pattern of target to match a matrix or a scale, got '*.bias'. "
    with pytest.raises(ValueError, match=error(message + "Biases and shifts go to 0 and have no target")):
        discover(Block(), target={"*.weight": 1.0, "*.bias": 1.0})


def test_strengths_that_do_not_cover() -> None:
    message = (
        "strength to cover every treated parameter, got no pattern for 'norm.weight'. Add a '*' pattern"
    )
    with pytest.raises(ValueError, match=error(message)):
        discover(Block(), strength={"qkv.*": 1.0, "proj.*": 1.0})


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, 2, dtype=torch.int64),
        lambda: torch.ones(2, 2, dtype=torch.complex64),
        lambda: torch.ones(2, 2).to(torch.float8_e4m3fn),
        lambda: torch.ones(2, 2).to_sparse(),
        quantized,
    ],
    ids=["integer", "complex", "float8", "sparse", "quantized"],
)
def test_a_weight_that_is_not_dense_and_floating(make: Callable[[], Tensor]) -> None:
    tensor = make()
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(tensor, requires_grad=False)
    message = (
        "parameter 'weight' to be dense and float16, bfloat16, float32 or float64, "
        f"got {tensor.dtype}, {tensor.layout}. Leave it out with exclude='weight'"
    )
    with pytest.raises(TypeError, match=error(message)):
        discover(model)
    assert treatment(model, exclude="weight") == {"weight": "left out", "bias": "bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_supported_dtype(dtype: torch.dtype) -> None:
    assert treatment(nn.Linear(2, 2).to(dtype)) == {"weight": "matrix", "bias": "bias"}


def test_a_sharded_parameter() -> None:
    model = nn.Linear(2, 2)
    # What discover looks at in a DTensor, without a process group.
    model.weight.placements, model.weight.device_mesh = (), None  # type: ignore[attr-defined]
    got = "a DTensor, and sharded parameters are not supported yet"
    message = f"parameter 'weight' to be whole, got {got}. Leave it out with exclude='weight'"
    with pytest.raises(RuntimeError, match=error(message)):
        discover(model)
    assert treatment(model, exclude="weight") == {"weight": "left out", "bias": "bias"}


def test_the_attributes_that_tell_a_dtensor() -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    assert hasattr(tensor.DTensor, "placements") and hasattr(tensor.DTensor, "device_mesh")


def test_a_parameter_sharded_after_construction(tmp_path: Path) -> None:
    """fully_shard and distribute_tensor put DTensors into the modules: all forms say so at their next call."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is missing from this build")
    # In a process of its own: a process group would stay for the tests after this one.
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path / "store")], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    got = "a DTensor, and sharded parameters are not supported yet"
    message = f"parameter 'weight' to be whole, got {got}. Leave it out with exclude='weight'"
    assert result.stdout.splitlines() == [f"RuntimeError: SpectralRegularizer: expected {message}."] * 4 + ["same"]


SHARDED = """
import sys
import torch
from torch import nn
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from spectral_ops import SpectralRegularizer

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model = nn.Linear(4, 3)
reg = SpectralRegularizer(model, strength=0.1)
reg.accumulate_grad_()
before = {name: x.clone() for name, x in reg.sigmas().items()}
mesh = init_device_mesh("cpu", (1,))
for placement in (Shard(0), Replicate()):
    whole = model.weight
    model.weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [placement]))
    for call in (reg, reg.accumulate_grad_):
        try:
            call()
        except RuntimeError as error:
            print(f"RuntimeError: {error}")
    model.weight = whole
reg.accumulate_grad_()
print("same" if (reg.sigmas()["weight"] - before["weight"]).abs() < 1e-3 else "changed")
dist.destroy_process_group()
"""


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
