"""SpectralAdamW's parameters: read once, followed when they change, frozen, missing gradients, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BF16, F16, F64, same_bits
from optim_models import LR, STRENGTH, Batches, Net, largest_difference, net, train
from torch import nn

import spectral_ops.optim_parts
from spectral_ops import SpectralAdamW, SpectralRegularizer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def optimizer_of(trained: nn.Module, **options: Any) -> SpectralAdamW:
    return SpectralAdamW(trained.parameters(), **({"lr": LR, "model": trained, "strength": STRENGTH} | options))


@pytest.fixture
def primed(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The names of every priming read."""
    reads: list[set[str]] = []
    original = spectral_ops.optim_parts.Part.prime

    def prime(self: spectral_ops.optim_parts.Part, names: set[str]) -> None:
        reads.append(names)
        original(self, names)

    monkeypatch.setattr(spectral_ops.optim_parts.Part, "prime", prime)
    return reads


MATRICES = ("conv.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight")


def test_read_at_construction_and_never_again(primed: list[set[str]]) -> None:
    model = net()
    optimizer = optimizer_of(model)
    assert primed == [set(MATRICES)]
    train(model, optimizer, Batches(), 4)
    optimizer.state_dict()
    assert len(primed) == 1


CHANGES: dict[str, Callable[[Net], object]] = {
    "in place": lambda model: model.head.weight.mul_(2),
    "load_state_dict": lambda model: model.head.load_state_dict(nn.Linear(6, 5).state_dict()),
    "another memory": lambda model: setattr(model.head.weight, "data", 2 * model.head.weight.data),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_weight_changed_outside_is_read_again(primed: list[set[str]], change: str) -> None:
    model = net()
    optimizer = optimizer_of(model)
    batches = Batches()
    train(model, optimizer, batches, 2)
    with torch.no_grad():
        CHANGES[change](model)
    train(model, optimizer, batches, 2)
    assert primed == [set(MATRICES), {"head.weight"}]
    assert optimizer.sigmas()["head.weight"].item() == pytest.approx(
        torch.linalg.matrix_norm(model.head.weight, 2).item(),
        rel=0.1,  # three reads after its vectors, cold in the worst case
    )


def test_prime_reads_what_left_no_trace(primed: list[set[str]]) -> None:
    model = net()
    optimizer = optimizer_of(model)
    model.head.weight.data.mul_(3)
    before = optimizer.sigmas()["head.weight"].item()
    optimizer.prime()
    assert optimizer.sigmas()["head.weight"].item() == pytest.approx(3 * before, rel=1e-4)
    assert primed == 2 * [set(MATRICES)]


def test_masters_follow_a_change_and_keep_the_rest() -> None:
    model = net(BF16)
    optimizer = optimizer_of(model, master_weights=True)
    batches = Batches(BF16)
    train(model, optimizer, batches, 3)
    weight = model.head.weight
    kept = optimizer.state[weight]["master"].clone()
    with torch.no_grad():
        weight[0] = 2.0
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    train(model, optimizer, batches, 1)
    master = optimizer.state[weight]["master"]
    assert (master[0] == 2.0).all() and same_bits(master[1:], kept[1:])
    assert not same_bits(kept[1:], weight[1:].float()), "masters say nothing that weights do not"


@pytest.mark.parametrize("name", MATRICES)
def test_frozen_parameters_stay_and_come_back(name: str) -> None:
    """The vectors of matrices before and behind it are theirs meanwhile."""
    model, other = net(F64), net(F64)
    optimizer = optimizer_of(model)
    reg, beside = SpectralRegularizer(other, strength=STRENGTH), torch.optim.AdamW(other.parameters(), lr=LR)
    batches, others = Batches(F64), Batches(F64)
    weight = model.get_parameter(name)
    for step in range(12):
        for m in (model, other):
            m.get_parameter(name).requires_grad_(step not in range(4, 8))
        before = weight.clone()
        train(model, optimizer, batches, 1)
        beside.zero_grad()
        others.loss(other).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        reg.accumulate_grad_()
        beside.step()
        assert same_bits(weight, before) == (step in range(4, 8))
    assert largest_difference(model, other) <= 1e-10  # measured 2e-13


def test_what_is_not_updated_is_not_marked_as_changed(primed: list[set[str]], backend: str) -> None:
    """Autograd would refuse what it has saved of it, and the penalty would read it once more when it is thawed."""
    model = net()
    optimizer = optimizer_of(model)
    batches = Batches()
    train(model, optimizer, batches, 2)
    model.head.weight.requires_grad_(False)
    optimizer.zero_grad()
    words = model.table(torch.tensor([1, 2]))
    loss = torch.nn.functional.linear(words.detach().requires_grad_(), model.head.weight).sum()
    versions = [p._version for p in (model.head.weight, model.table.weight)]
    for _ in range(3):
        optimizer.step()
    assert [p._version for p in (model.head.weight, model.table.weight)] == versions
    loss.backward()
    words.sum().backward()
    model.head.weight.requires_grad_(True)
    train(model, optimizer, batches, 2)
    assert len(primed) == 1


def test_missing_gradients_count_as_zero_and_unpenalised_are_left() -> None:
    model = net()
    optimizer = optimizer_of(model)
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    optimizer.step()
    named, old = dict(model.named_parameters()), dict(before.named_parameters())
    assert not same_bits(named["head.weight"], old["head.weight"]), "the penalty alone moves it"
    for name in ("table.weight", "shift", "scale"):
        assert same_bits(named[name], old[name]) and named[name] not in optimizer.state
    assert all(p.grad is None for p in model.parameters())


def test_parameters_whose_first_gradient_comes_late() -> None:
    model, other = net(), net()
    optimizer = optimizer_of(model)
    reg, beside = SpectralRegularizer(other, strength=STRENGTH), torch.optim.AdamW(other.parameters(), lr=LR)
    batches, others = Batches(), Batches()
    for step in range(6):
        optimizer.zero_grad()
        batches.loss(model).backward()
        beside.zero_grad()
        others.loss(other).backward()
        if step in (0, 1, 4):
            model.table.weight.grad = other.table.weight.grad = None
        reg.accumulate_grad_()
        optimizer.step()
        beside.step()
    assert largest_difference(model, other) <= 1e-4
    assert optimizer.state[model.table.weight]["step"].item() == 3


def test_state_that_is_taken_away_starts_anew() -> None:
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, Batches(), 3)
    optimizer.state.clear()
    train(model, optimizer, Batches(), 2)
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}


def test_a_group_added_later_is_penalised_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = SpectralAdamW(model[0].parameters(), lr=LR, model=model, strength=STRENGTH)
    assert set(optimizer.sigmas()) == {"0.weight"}
    before = optimizer.sigmas()["0.weight"]
    optimizer.add_param_group({"params": model[1].parameters(), "strength": 0.5})
    assert set(optimizer.sigmas()) == {"0.weight", "1.weight"}
    assert same_bits(optimizer.sigmas()["0.weight"], before)
    assert optimizer.param_groups[1]["strength"] == 0.5


def test_without_a_model() -> None:
    """By names, or by shapes alone."""
    model = net()
    named = SpectralAdamW(model.named_parameters(), lr=LR, strength=STRENGTH)
    assert set(named.sigmas()) == {n for n, p in model.named_parameters() if p.ndim > 1}
    unnamed = SpectralAdamW(net().parameters(), lr=LR, strength=STRENGTH)
    assert set(unnamed.sigmas()) == {f"0.{i}" for i, p in enumerate(net().parameters()) if p.ndim > 1}
    train(model, named, Batches(), 2)


def test_moved_to_another_dtype_and_memory_format() -> None:
    model = net()
    optimizer = optimizer_of(model)
    batches = Batches()
    train(model, optimizer, batches, 2)
    model.to(memory_format=torch.channels_last)
    train(model, optimizer, batches, 2)
    assert optimizer.state[model.up.weight]["exp_avg"].stride() == model.up.weight.stride() == (24, 1, 12, 6)
    model.to(torch.float64)
    train(model, optimizer, Batches(torch.float64), 2)
    assert optimizer.state[model.conv.weight]["exp_avg"].dtype == torch.float64
    assert optimizer.state[model.conv.weight]["step"].item() == 6


def plain_one(cls: type[torch.optim.Optimizer], **options: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A plain parameter beside a matrix."""
    p = nn.Parameter(torch.zeros(3))
    return p, cls([("shift", p), ("w", nn.Parameter(torch.eye(2)))], lr=0.1, weight_decay=0.0, **options)


@pytest.mark.parametrize(
    "convert",
    [
        lambda step: step.to(torch.int64),
        lambda step: step.to(BF16),
        lambda step: step.double(),
        lambda step: step.view(1),
        lambda step: step.item(),
        lambda step: int(step.item()),
    ],
    ids=["int64", "bfloat16", "float64", "1-d", "float", "int"],
)
@pytest.mark.parametrize("when", ["before every step", "once"])
def test_counts_of_steps_of_any_type(convert: Callable[[torch.Tensor], Any], when: str, backend: str) -> None:
    """As torch's AdamW takes them. Those set once come when the look-up of the steps before would go on."""
    p, ours = plain_one(SpectralAdamW, strength=0.0)
    q, torchs = plain_one(torch.optim.AdamW)
    for i in range(5):
        for x, optimizer in ((p, ours), (q, torchs)):
            x.grad = torch.tensor([1.0, 2.0, -1.0]) * (i + 1)
            if x is p and (i == 3 or (i > 0 and when != "once")):
                ours.state[p]["step"] = convert(ours.state[p]["step"])
            optimizer.step()
        assert float(ours.state[p]["step"]) == i + 1
        assert torch.allclose(p, q, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("step", "kind", "got"),
    [
        ("3", TypeError, "the step of 'shift' to be a tensor or a number, got str"),
        (torch.zeros(0), ValueError, r"the step of shift to be one float32 or .*got torch.float32 of shape \(0,\)"),
        (torch.zeros(2), ValueError, r"the step of shift to be one float32 or .*got torch.float32 of shape \(2,\)"),
    ],
    ids=["str", "empty", "two"],
)
def test_what_counts_no_steps(step: Any, kind: type[Exception], got: str, backend: str) -> None:
    p, optimizer = plain_one(SpectralAdamW, strength=0.0)
    for given in (None, None, step):
        p.grad = torch.ones(3)
        if given is None:
            optimizer.step()
    before = p.detach().clone()
    optimizer.state[p]["step"] = step
    with pytest.raises(kind, match=f"{got}.*Delete the parameter's entry in optimizer.state"):
        optimizer.step()
    assert same_bits(p.detach(), before)


def test_printed_with_every_parameter() -> None:
    text = repr(optimizer_of(net()))
    assert "strength: 0.01" in text and "head.weight" in text and "embedding" in text


# ---- bad input ----


def refused(model: Net, optimizer: SpectralAdamW, kind: type[Exception], message: str) -> None:
    """The step raises, and nothing is changed."""
    before = [p.clone() for p in model.parameters()]
    state = {key: x.clone() for key, x in optimizer.state[model.head.weight].items()}
    sigmas = optimizer.sigmas()
    with pytest.raises(kind, match=message):
        optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(same_bits(x, state[key]) for key, x in optimizer.state[model.head.weight].items())
    assert all(same_bits(x, sigmas[name]) for name, x in optimizer.sigmas().items())


def test_bad_gradients(backend: str) -> None:
    if backend == "triton":
        pytest.skip("checked before a backend is asked")
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, Batches(), 2)
    weight = model.table.weight
    good = weight.grad
    weight.grad = None
    nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).sum().backward()
    refused(model, optimizer, TypeError, r"gradient of table.weight to be dense, got a sparse_coo one.*sparse=True")
    weight.grad = good
    if hasattr(weight, "grad_dtype"):
        weight.grad_dtype = None
        weight.grad = torch.zeros(11, 6, dtype=torch.complex64)
        refused(model, optimizer, TypeError, r"gradient of table.weight to be float32.*got torch.complex64. Convert")
        weight.grad = torch.zeros(11, 6, dtype=torch.float64)
        refused(model, optimizer, TypeError, r"gradient of table.weight to be float32.*got torch.float64. Convert")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_strengths(value: float) -> None:
    with pytest.raises(ValueError, match=r"SpectralAdamW.*strength.* finite and not negative, got"):
        optimizer_of(net(), strength=value)
    model = net()
    optimizer = optimizer_of(model)
    train(model, optimizer, Batches(), 1)
    optimizer.param_groups[0]["strength"] = value
    refused(model, optimizer, ValueError, r"param_groups\[0\]\['strength'\] to be finite")


def test_a_parameter_in_two_groups() -> None:
    model = net()
    groups = [{"params": [model.head.weight]}, {"params": [model.head.bias, model.head.weight]}]
    with pytest.raises(ValueError, match=r"parameter 'head.weight' once, got one that group 0 holds too\. Leave"):
        SpectralAdamW(groups, model=model, strength=STRENGTH)
    optimizer = SpectralAdamW([model.head.weight], model=model, strength=STRENGTH)
    with pytest.raises(ValueError, match="'head.weight' once"):
        optimizer.add_param_group({"params": [model.head.weight]})
    assert len(optimizer.param_groups) == 1


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "differentiable": ({"differentiable": True}, ValueError, "differentiable=False"),
    "both roundings": ({"master_weights": True, "stochastic_rounding": True}, ValueError, "got both"),
    "exponent": ({"exponent": 0.5}, ValueError, "exponent to be finite and at least 1"),
    "target": ({"target": -1.0}, ValueError, "SpectralAdamW: expected target"),
    "include": ({"include": "nothing.*"}, ValueError, "SpectralAdamW: expected every pattern of include"),
    "strength type": ({"strength": "much"}, TypeError, "strength to be a number"),
    "another model": ({"model": nn.Linear(2, 2)}, ValueError, "every parameter to be one of model's"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments(name: str) -> None:
    options, kind, message = BAD[name]
    model = net()
    with pytest.raises(kind, match=message):
        SpectralAdamW(model.parameters(), **({"model": model, "strength": STRENGTH} | options))


def test_stochastic_rounding_of_float16_is_refused() -> None:
    message = "bfloat16 for stochastic_rounding in 'shift', got torch.float16. Use master_weights"
    with pytest.raises(TypeError, match=message):
        optimizer_of(net(F16), stochastic_rounding=True)


def test_stochastic_rounding_keeps_small_updates() -> None:
    """Updates below half a unit in the last place: lost where rounded to nearest, by chance they count on average."""
    moved = {}
    for stochastic in (False, True):
        model = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        model.to(BF16)
        optimizer = SpectralAdamW(
            model.parameters(), lr=1e-4, weight_decay=0.0, strength=0.0, model=model, stochastic_rounding=stochastic
        )
        for _ in range(200):
            model.weight.grad = torch.ones(64, 64, dtype=BF16)
            optimizer.step()
        moved[stochastic] = 1.0 - model.weight.float().mean().item()
    assert moved[False] == 0.0
    # 200 steps of 1e-4, each of 4096 weights a draw with a deviation of at most 2^-9.
    assert abs(moved[True] - 0.02) <= 5 * 2.0**-9 * (200 / 4096) ** 0.5


def test_nothing_is_changed_where_another_call_of_the_step_has_a_bad_gradient() -> None:
    """Groups of another exponent go through a call of their own, which comes second."""
    model = net()
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizer = SpectralAdamW(
        [{"params": head}, {"params": rest, "exponent": 1.0}], lr=LR, model=model, strength=STRENGTH
    )
    train(model, optimizer, Batches(), 2)
    model.table.weight.grad = None
    nn.functional.embedding(torch.tensor([1, 2]), model.table.weight, sparse=True).sum().backward()
    refused(model, optimizer, TypeError, "gradient of table.weight to be dense")
