"""SpectralRegularizer: the value and gradient of a whole model against the SVD, choices, bad input, the table."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64, relative_error, with_values
from regularizer_truth import (
    NET,
    TOLERANCE,
    Mlp,
    Net,
    assert_close,
    assert_same_bits,
    bits,
    gradients,
    load_converged,
    refuses,
    truth,
)
from torch import Tensor, nn

from spectral_ops import Rule, SpectralRegularizer
from spectral_ops.vectors import START_TOL


def penalty(reg: SpectralRegularizer, model: nn.Module, advance: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    value = reg(advance=advance)
    value.backward()
    return value.detach(), gradients(model)


def assert_is_truth(reg: SpectralRegularizer, model: nn.Module, dtype: torch.dtype = F32, **arguments: Any) -> None:
    load_converged(reg, model)
    expected = truth(model, **arguments)
    value, found = penalty(reg, model)
    assert value.shape == () and abs(value.item() - expected.value) <= TOLERANCE[dtype] * expected.value
    assert_close(found, expected.gradients, TOLERANCE[dtype])


# ---- value and gradient ----


@pytest.mark.parametrize(
    ("exponent", "target", "dtype"),
    [
        (1.0, 1.0, F32),
        (1.5, 0.5, F32),
        (2.0, 1.0, F32),
        (2.0, 0.0, F32),
        (2.0, 2.0, F32),
        (3.0, 0.5, F32),
        (3, 1, F32),  # whole numbers are numbers too
        (1.5, 2.0, F64),
        (2.0, 1.0, F64),
    ],
)
def test_value_and_gradient_of_every_kind_of_layer(
    exponent: float, target: float, dtype: torch.dtype, backend: str
) -> None:
    model = Net().to(dtype)
    reg = SpectralRegularizer(model, strength=1.0, exponent=exponent, target=target)
    assert {entry.name for entry in reg.entries if entry.layout is not None} == set(NET)
    assert_is_truth(reg, model, dtype, exponent=exponent, target=target)


def test_strength_multiplies(backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=1.0)
    whole, found = penalty(reg, model, advance=False)
    reg.strength = 2.0**-10  # a power of two: exact
    small, small_found = penalty(reg, model, advance=False)
    assert small.item() * 2**10 == whole.item()
    assert_same_bits({name: g * 2**10 for name, g in small_found.items()}, found)


def test_strength_as_a_tensor_is_read_at_each_call(backend: str) -> None:
    model = Mlp()
    strength = torch.tensor(0.5)
    reg = SpectralRegularizer(model, strength=strength)
    first = reg(advance=False).item()
    strength.fill_(0.25)
    assert first > 0 and reg(advance=False).item() == first / 2
    assert reg.strength is strength
    # Of the same step: native takes the strength inside its sum, plain torch after it.
    assert abs(reg.accumulate_grad_().item() - first / 2) <= 1e-6 * first


def test_start_vectors_are_converged(backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=1.0)
    start = reg.sigmas()
    reg()
    for name, sigma in reg.sigmas().items():
        w = dict(model.named_parameters())[name].detach().double()
        exact = torch.stack([torch.linalg.matrix_norm(x, 2) for x in NET[name][1](w)])
        assert sigma.shape == exact.shape == start[name].shape
        for found in (start[name].double(), sigma.double()):
            # Never above sigma_1 but for rounding: 4 units of 1.2e-7, measured 1.
            assert (found <= exact * (1 + 5e-7)).all() and (found >= exact * (1 - START_TOL)).all()


def test_sigmas_are_copies(backend: str) -> None:
    reg = SpectralRegularizer(Mlp(), strength=1.0)
    before = bits(reg)
    for sigma in reg.sigmas().values():
        sigma.fill_(7.0)
    assert_same_bits(bits(reg), before)


# ---- choices ----


def test_targets_and_strengths_by_pattern(backend: str) -> None:
    model = Net()
    targets = {"conv.weight": 3.0, "norm.weight": 0.25, "*.weight": 0.5}
    strengths = {"head.*": 0.0, "lstm.*": 10.0, "*": 0.5}
    reg = SpectralRegularizer(model, strength=strengths, target=targets)
    multiplicative = [name for name, (kind, _) in NET.items() if kind in ("matrix", "scale")]
    by_name = {name: 0.5 if name.endswith(".weight") else 1.0 for name in multiplicative}
    by_name |= {"conv.weight": 3.0, "norm.weight": 0.25}
    coefficients = {name: 10.0 if name.startswith("lstm") else 0.5 for name in NET}
    coefficients |= {"head.weight": 0.0, "head.bias": 0.0}
    assert_is_truth(reg, model, targets=by_name, strengths=coefficients)
    reg.strength = 2.0  # multiplies what the mapping says
    assert_is_truth(reg, model, targets=by_name, strengths={name: 2 * c for name, c in coefficients.items()})


@pytest.mark.parametrize(
    ("switch", "kinds"),
    [("weights", ("bias", "scale", "shift")), ("biases", ("matrix", "scale", "shift")), ("norms", ("matrix", "bias"))],
)
def test_switches(switch: str, kinds: tuple[str, ...], backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=1.0, **{switch: False})
    assert_is_truth(reg, model, names={name: kind for name, (kind, _) in NET.items() if kind in kinds})


def test_include_and_exclude(backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=1.0, include=["conv.*", "head.*"], exclude="*.bias")
    assert_is_truth(reg, model, names={"conv.weight": 1, "head.weight": 1})


@pytest.mark.parametrize(("shape", "dim"), [((12, 5), 0), ((5, 12), 1)])  # a Linear called qkv; GPT-2's c_attn
def test_packed_layer_by_a_rule(shape: tuple[int, int], dim: int, backend: str) -> None:
    model = nn.ParameterDict({"packed": nn.Parameter(torch.randn(shape))})
    rule = Rule(split=(3, dim), row_dim=dim)
    reg = SpectralRegularizer(model, strength=1.0, rules={"packed": rule})
    for _ in range(60):  # random 4 x 5 matrices: enough for float32
        reg()
    _, found = penalty(reg, model)
    w = model["packed"].detach().double().requires_grad_()
    sum((torch.linalg.matrix_norm(x, 2) ** 2 - 1) ** 2 for x in w.chunk(3, dim)).backward()  # type: ignore[union-attr]
    assert relative_error(found["packed"], w.grad) <= 1e-5  # type: ignore[arg-type]  # measured 4e-7


def test_pairs_instead_of_a_model(backend: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    reg = SpectralRegularizer(model.named_parameters(), strength=1.0)
    assert_is_truth(reg, model)


# ---- edges ----


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_zero_parameters_have_no_gradient_and_no_nan(exponent: float, backend: str) -> None:
    model = Mlp()
    for p in model.parameters():
        nn.init.zeros_(p)
    reg = SpectralRegularizer(model, strength=1.0, exponent=exponent)
    value, found = penalty(reg, model)
    assert value.item() == 2 + 8  # t^2k of two matrices and eight scales
    assert all(g.abs().max().item() == 0 for g in found.values())
    assert all(s.item() == 0 for s in reg.sigmas().values())
    nn.init.normal_(model.first.weight)
    for _ in range(60):
        reg()
    exact = torch.linalg.matrix_norm(model.first.weight, 2).item()
    assert abs(reg.sigmas()["first.weight"].item() - exact) <= 1e-5 * exact  # it has come back from W = 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["loss", "accumulate"])
def test_non_finite_weight_and_back(bad: float, form: str, backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    before = reg.state_dict()["v"]
    kept = model.conv.weight[0, 0, 0, 0].item()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = bad
    value = reg() if form == "loss" else reg.accumulate_grad_()
    assert not math.isfinite(value.item())
    # The second group of the convolution, and all other matrices, went on as if nothing were.
    sigma = reg.sigmas()["conv.weight"]
    assert not sigma[0].isfinite() and sigma[1].isfinite()
    assert torch.equal(reg.state_dict()["v"]["conv.weight"][0], before["conv.weight"][0])
    assert all(v.isfinite().all() for v in reg.state_dict()["v"].values())
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = kept
    expected = truth(model)
    value, found = penalty(reg, model)  # from the vectors that survived, not from new ones
    assert abs(value.item() - expected.value) <= TOLERANCE[F32] * expected.value
    assert_close(found, expected.gradients, TOLERANCE[F32])


def test_value_may_overflow_but_sigma_does_not(backend: str) -> None:
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(with_values("huge", 4, 4, [1e30, 1.0, 1.0, 1.0]))
    reg = SpectralRegularizer(model, strength=1.0)
    assert reg().item() == math.inf
    assert abs(reg.sigmas()["weight"].item() / 1e30 - 1) <= 1e-5


# ---- bad input ----


NOT_NEGATIVE, A_NUMBER = "finite and not negative", "a number, a 0-d tensor or a mapping"
A_FLOAT, A_TENSOR, PAPER = "Pass a float such as 1e-3", "Use torch.tensor(1e-3)", "2.0 is the paper's"
TARGET = "Give a float such as 1.0"


@pytest.mark.parametrize(
    ("argument", "value", "kind", "condition", "got", "remedy"),
    [
        ("strength", -1e-3, ValueError, NOT_NEGATIVE, "-0.001", A_FLOAT),
        ("strength", math.nan, ValueError, NOT_NEGATIVE, "nan", A_FLOAT),
        ("strength", math.inf, ValueError, NOT_NEGATIVE, "inf", A_FLOAT),
        ("strength", "1e-3", TypeError, A_NUMBER, "str", A_FLOAT),
        ("strength", True, TypeError, A_NUMBER, "bool", A_FLOAT),
        ("strength", torch.ones(1), ValueError, "a 0-d float tensor", "torch.float32 of shape (1,)", A_TENSOR),
        ("strength", torch.tensor(1), ValueError, "a 0-d float tensor", "torch.int64 of shape ()", A_TENSOR),
        ("exponent", 0.5, ValueError, "finite and at least 1", "0.5", PAPER),
        ("exponent", math.nan, ValueError, "finite and at least 1", "nan", PAPER),
        ("exponent", "2", TypeError, "a number", "str", PAPER),
        ("target", -1.0, ValueError, "finite and >= 0", "-1.0", TARGET),
        ("target", math.nan, ValueError, "finite and >= 0", "nan", TARGET),
        ("target", "1", TypeError, "a number", "str", TARGET),
    ],
)
def test_bad_arguments(
    argument: str, value: Any, kind: type[Exception], condition: str, got: str, remedy: str
) -> None:
    with refuses(kind, f"SpectralRegularizer: expected {argument} to be {condition}, got {got}. {remedy}."):
        SpectralRegularizer(nn.Linear(3, 2), **{"strength": 1e-3, argument: value})


def test_pattern_without_a_match() -> None:
    message = (
        "expected every pattern of exclude to match a parameter, got 'weigth', which matches none. "
        "The nearest names are 'weight'."
    )
    with refuses(ValueError, f"SpectralRegularizer: {message}"):
        SpectralRegularizer(nn.Linear(3, 2), strength=1e-3, exclude="weigth")


def test_strength_has_no_default() -> None:
    with pytest.raises(TypeError, match="strength"):
        SpectralRegularizer(nn.Linear(3, 2))  # type: ignore[call-arg]


def test_strength_set_later_is_checked_too() -> None:
    reg = SpectralRegularizer(nn.Linear(3, 2), strength=0)
    with pytest.raises(ValueError, match="not negative, got -1"):
        reg.strength = -1
    assert reg.strength == 0


def test_empty_model() -> None:
    message = "expected a model with parameters, got none. Pass the model that is trained, once it is built."
    with refuses(ValueError, f"SpectralRegularizer: {message}"):
        SpectralRegularizer(nn.ReLU(), strength=1e-3)


def test_nothing_to_treat() -> None:
    message = (
        "expected at least one parameter to treat, got 1 left out (embedding). "
        "Name a parameter in rules, or leave out less."
    )
    with refuses(ValueError, f"SpectralRegularizer: {message}"):
        SpectralRegularizer(nn.Embedding(3, 2), strength=1e-3)


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "torch.int64, torch.strided"),
        (torch.ones(2, 3, dtype=torch.complex64), "torch.complex64, torch.strided"),
        (torch.eye(2, 3).to_sparse(), "torch.float32, torch.sparse_coo"),
    ],
)
def test_parameter_that_cannot_be_read(tensor: Tensor, got: str) -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(tensor, requires_grad=False)
    message = (
        f"expected parameter 'weight' to be dense and float16, bfloat16, float32 or float64, got {got}. "
        "Leave it out with exclude='weight'."
    )
    with refuses(TypeError, f"SpectralRegularizer: {message}"):
        SpectralRegularizer(model, strength=1e-3)
    SpectralRegularizer(model, strength=1e-3, exclude="weight")  # the remedy


# ---- the table ----


def test_strengths_by_pattern_in_the_table() -> None:
    """Not as the 1.0 that a mapping leaves as the factor of all."""
    reg = SpectralRegularizer(nn.Linear(3, 2), strength={"weight": 0.5, "*": 0.1})
    for shown in (reg, copy.deepcopy((reg._root, reg))[1]):
        assert str(shown).splitlines()[0] == "SpectralRegularizer(strength=by pattern, exponent=2)"
    value = reg(advance=False).item()
    reg.strength = 0.25
    assert str(reg).splitlines()[0] == "SpectralRegularizer(strength=0.25 * by pattern, exponent=2)"
    assert abs(reg(advance=False).item() - 0.25 * value) <= 1e-6 * value


def small_model() -> nn.Module:
    conv = nn.Conv1d(4, 2, 1, groups=2, bias=False)
    model = nn.Sequential(nn.Embedding(9, 2), nn.Linear(2, 2), nn.LayerNorm(2), conv)
    with torch.no_grad():
        model[1].weight.copy_(torch.diag(torch.tensor([3.0, 0.5])))
        conv.weight.copy_(torch.tensor([[0.75, 0.0], [0.0, 1.5]])[..., None])
    return model


def test_table() -> None:
    reg = SpectralRegularizer(small_model(), strength=1e-3)
    assert str(reg) == repr(reg)
    assert str(reg).splitlines() == [
        "SpectralRegularizer(strength=0.001, exponent=2)",
        "parameter  treated as  shape  target  sigma      reason",
        "0.weight   left out    9x2    -       -          embedding",
        "1.weight   matrix      2x2    1       3          nn.Linear weight",
        "1.bias     bias        2      -       -          nn.Linear bias",
        "2.weight   scale       2      1       -          nn.LayerNorm weight",
        "2.bias     shift       2      -       -          nn.LayerNorm bias",
        "3.weight   2 matrices  2x2x1  1       0.75..1.5  nn.Conv1d weight: one per group",
        "",
        "5 of 6 parameters: 3 matrices, 1 bias, 1 scale, 1 shift",
    ]


def test_table_with_notes() -> None:
    model = small_model()
    reg = SpectralRegularizer(model, strength=torch.tensor(0.5), exponent=1.5)
    model[1].requires_grad_(False)
    model[2].to("meta")
    assert str(reg).splitlines() == [
        "SpectralRegularizer(strength=0.5, exponent=1.5)",
        "parameter  treated as  shape  target  sigma      reason",
        "0.weight   left out    9x2    -       -          embedding",
        "1.weight   matrix      2x2    1       3          nn.Linear weight; frozen now",
        "1.bias     bias        2      -       -          nn.Linear bias; frozen now",
        "2.weight   scale       2      1       -          nn.LayerNorm weight; on meta, waits for its data",
        "2.bias     shift       2      -       -          nn.LayerNorm bias; on meta, waits for its data",
        "3.weight   2 matrices  2x2x1  1       0.75..1.5  nn.Conv1d weight: one per group",
        "",
        "5 of 6 parameters: 3 matrices, 1 bias, 1 scale, 1 shift",
    ]


def test_table_shows_the_last_sigma() -> None:
    model = nn.Linear(2, 2, bias=False).to(BF16)
    reg = SpectralRegularizer(model, strength=1e-3)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([4.0, 4.0])))
    reg()
    assert str(reg).splitlines()[2].split() == ["weight", "matrix", "2x2", "1", "4", "nn.Linear", "weight"]
