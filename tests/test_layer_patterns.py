"""How the user changes what is treated as what: patterns, rules, switches, targets and strengths."""

from __future__ import annotations

import re
from typing import Any

import pytest
from layer_samples import (
    BIAS,
    SCALE,
    SHIFT,
    Block,
    Conv1D,
    Holder,
    Tied,
    beside_linear,
    entry_of,
    parts_of,
    treatment,
)
from torch import nn

from spectral_ops.layers import discover
from spectral_ops.ops.layout import Kind, Layout
from spectral_ops.rules import Rule


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
