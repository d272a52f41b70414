"""What is refused when parameters are read: each message says what was expected, what came, and the remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_samples import (
    Block,
    Holder,
    treatment,
)
from torch import Tensor, nn

from spectral_ops.layers import discover
from spectral_ops.rules import Rule


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
        ([("weight", 3.0)], "float under 'weight'"),
        ([(0, nn.Parameter(torch.ones(2, 2)))], "an item of type tuple"),
    ],
)
def test_neither_a_module_nor_pairs(model: Any, got: str) -> None:
    with pytest.raises(TypeError, match=error(f"model to be a module or (name, parameter) pairs, got {got}. {REMEDY}")):
        discover(model)


@pytest.mark.parametrize("made", [lambda: torch.ones(2, 2), lambda: 2 * torch.ones(2, 2, requires_grad=True)])
def test_a_tensor_in_pairs_that_nobody_trains(made: Callable[[], Tensor]) -> None:
    condition = "'weight' to be a parameter, or a leaf tensor that requires a gradient"
    remedy = "Wrap it in nn.Parameter, or call its requires_grad_()"
    with pytest.raises(TypeError, match=error(f"{condition}, got another tensor. {remedy}")):
        discover([("weight", made())])


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
    example = "1e-3" if argument == "strength" else "1.0"
    message = f"{argument}['*'] to be a number, got {type(value).__name__}. Give a float such as {example}"
    with pytest.raises(TypeError, match=error(message)):
        discover(Block(), **{argument: {"*": value}})


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_a_target_or_strength_out_of_range(value: float) -> None:
    message = f"to be finite and >= 0, got {value}. Give a float such as"
    with pytest.raises(ValueError, match=error(f"target {message} 1.0")):
        discover(Block(), target=value)
    for argument, example in (("target", "1.0"), ("strength", "1e-3")):
        # Also where an earlier pattern leaves the value unused.
        with pytest.raises(ValueError, match=error(f"{argument}['qkv.*'] {message} {example}")):
            discover(Block(), **{argument: {"*": 1.0, "qkv.*": value}})


def test_a_target_of_another_type() -> None:
    with pytest.raises(TypeError, match=error("target to be a number, got list. Give a float such as 1.0")):
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


def test_the_attributes_that_tell_a_dtensor() -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    assert hasattr(tensor.DTensor, "placements") and hasattr(tensor.DTensor, "device_mesh")


def test_a_parameter_sharded_after_construction(tmp_path: Path) -> None:
    """fully_shard and distribute_tensor put DTensors into the modules: all forms follow, and back again."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is missing from this build")
    # In a process of its own: a process group would stay for the tests after this one.
    result = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path / "store")], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["sharded, same"] * 4 + ["same"]


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
        call()
        changed = (reg.sigmas()["weight"] - before["weight"]).abs() >= 1e-3
        print("sharded, changed" if changed else "sharded, same")
    model.weight = whole
reg.accumulate_grad_()
print("same" if (reg.sigmas()["weight"] - before["weight"]).abs() < 1e-3 else "changed")
dist.destroy_process_group()
"""
