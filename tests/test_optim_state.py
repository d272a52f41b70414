"""SpectralAdamW saved, loaded, copied: bit by bit, and to and from torch.optim.AdamW."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64, same_bits
from optim_models import LR, STRENGTH, Batches, Net, apart, folded, largest_difference, net, train
from torch import nn

from spectral_ops import SpectralAdamW, SpectralRegularizer


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # models of a few hundred numbers


def optimizer_of(model: nn.Module, **options: Any) -> SpectralAdamW:
    return SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH, **options)


def saved(state: Any) -> Any:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(model: nn.Module, optimizer: SpectralAdamW, other: nn.Module, restored: SpectralAdamW) -> None:
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    ours, theirs = optimizer.state_dict(), restored.state_dict()
    for number, state in ours["state"].items():
        assert all(same_bits(x, theirs["state"][number][key]) for key, x in state.items())
    for key, by_name in ours["spectral"].items():
        assert all(same_bits(x, theirs["spectral"][key][name]) for name, x in by_name.items()), key


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "optimizer first"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (F32, {}),
        (F32, {"amsgrad": True, "decoupled": True}),
        (BF16, {}),
        (BF16, {"master_weights": True}),
        (BF16, {"stochastic_rounding": True, "seed": 7}),
        (F64, {}),
    ],
    ids=str,
)
def test_resume_keeps_every_bit(dtype: torch.dtype, options: dict[str, Any], model_first: bool) -> None:
    model = net(dtype)
    optimizer = optimizer_of(model, **options)
    batches = Batches(dtype)
    train(model, optimizer, batches, 6)
    state = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other = net(dtype, seed=1)
    restored = optimizer_of(other, **options)
    parts = [(other, "model"), (restored, "optimizer")]
    for target, key in parts if model_first else reversed(parts):
        target.load_state_dict(state[key])
    resumed = copy.deepcopy(batches)
    train(model, optimizer, batches, 6)
    train(other, restored, resumed, 6)
    assert_same(model, optimizer, other, restored)


def test_loading_takes_copies() -> None:
    model, optimizer = folded(net(), 3)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    other = copy.deepcopy(model)
    restored = optimizer_of(other)
    restored.load_state_dict(state)
    train(other, restored, Batches(), 3)
    for number, entries in kept["state"].items():
        assert all(same_bits(x, state["state"][number][key]) for key, x in entries.items())


def test_moments_of_16_bit_weights_stay_float32() -> None:
    model, optimizer = folded(net(BF16), 3, dtype=BF16)
    restored = optimizer_of(model)
    restored.load_state_dict(saved(optimizer.state_dict()))
    for p in model.parameters():
        assert restored.state[p]["exp_avg"].dtype == F32
        assert same_bits(restored.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_states_go_to_and_from_torch(amsgrad: bool, fused: bool | None) -> None:
    """Half of a run by each, either first: the trajectory is that of either alone."""
    options = {"amsgrad": amsgrad, "fused": fused}
    truth, other, _ = apart(net(F64), 10, dtype=F64, **options)
    start, state = copy.deepcopy(truth), saved(other.state_dict())
    train_apart(truth, other)

    model = copy.deepcopy(start)
    ours = optimizer_of(model, **options)
    ours.load_state_dict(state)
    batches = Batches(F64)
    skip(batches, 10)
    train(model, ours, batches, 10)
    assert largest_difference(model, truth) <= 1e-10
    assert largest_difference(start, truth) >= 1e-2

    model, ours = folded(net(F64), 10, dtype=F64, **options)
    torchs = torch.optim.AdamW(model.parameters(), lr=1.0)
    torchs.load_state_dict(saved(ours.state_dict()))
    assert torchs.param_groups[0]["lr"] == LR
    train_apart(model, torchs)
    assert largest_difference(model, truth) <= 1e-10


def train_apart(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Ten more steps, with the vectors that a new regularizer starts with."""
    reg = SpectralRegularizer(model, strength=STRENGTH)
    batches = Batches(F64)
    skip(batches, 10)
    for _ in range(10):
        optimizer.zero_grad()
        batches.loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        reg.accumulate_grad_()
        optimizer.step()


def skip(batches: Batches, steps: int) -> None:
    for _ in range(steps):
        batches.loss(net(F64))


def test_settings_of_groups_survive_a_state_of_torchs() -> None:
    model, other, _ = apart(net(), 2)
    optimizer = optimizer_of(model)
    optimizer.param_groups[0]["target"] = 0.5
    optimizer.load_state_dict(other.state_dict())
    assert {key: optimizer.param_groups[0][key] for key in ("strength", "exponent", "target")} == {
        "strength": STRENGTH,
        "exponent": 2.0,
        "target": 0.5,
    }


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_copies_go_on_alike(by: str) -> None:
    model, optimizer = folded(net(), 4)
    if by == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    else:
        other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    assert copied.param_groups[0]["params"][0] is next(other.parameters())
    batches, others = Batches(), Batches()
    train(model, optimizer, batches, 4)
    train(other, copied, others, 4)
    assert_same(model, optimizer, other, copied)


def test_state_of_another_shape_is_refused_before_anything_changes() -> None:
    model, optimizer = folded(net(), 3)
    before = copy.deepcopy(optimizer.state_dict())
    for place, name in ((0, "exp_avg"), (5, "exp_avg_sq")):
        state = copy.deepcopy(before)
        state["state"][place][name] = torch.zeros(3, 3)
        named = [n for n, _ in model.named_parameters()][place]
        with pytest.raises(ValueError, match=f"expected the {name} of '{named}' of shape .*got \\(3, 3\\)"):
            optimizer.load_state_dict(state)
    state = copy.deepcopy(before)
    state["spectral"]["v"]["head.weight"] = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"SpectralAdamW.*'head.weight'.*\(1, 6\), got \(1, 3\)"):
        optimizer.load_state_dict(state)
    state = copy.deepcopy(before)
    state["spectral"]["u"]["head.weight"] = torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"'head.weight'.*\(1, 5\), got \(2, 5\)"):
        optimizer.load_state_dict(state)
    state = copy.deepcopy(before)
    del state["spectral"]["u"]
    with pytest.raises(ValueError, match="got none of"):
        optimizer.load_state_dict(state)
    state = copy.deepcopy(before)
    state["param_groups"].append({"params": []})
    with pytest.raises(ValueError, match="a state of parameter groups of"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    for number, entries in before["state"].items():
        assert all(same_bits(x, after["state"][number][key]) for key, x in entries.items())
    for key, by_name in before["spectral"].items():
        assert all(same_bits(x, after["spectral"][key][name]) for name, x in by_name.items())


def test_a_state_for_other_weights_is_read_anew() -> None:
    """Loaded beside weights that it was not saved with: sigma is theirs after the first step."""
    _, optimizer = folded(net(), 3)
    other: Net = net(seed=1)
    restored = optimizer_of(other)
    restored.load_state_dict(optimizer.state_dict())
    train(other, restored, Batches(), 1)
    start = net(seed=1)
    with torch.no_grad():
        start.head.weight.mul_(0)
    sigma, truth = restored.sigmas()["head.weight"].item(), torch.linalg.matrix_norm(other.head.weight, 2).item()
    # Two reads after vectors of another matrix.
    assert 0.8 * truth <= sigma <= truth * (1 + 1e-5)


def test_a_state_without_masters_gets_them() -> None:
    model = net().bfloat16()
    theirs = torch.optim.AdamW(model.parameters(), lr=LR)
    train(model, theirs, Batches(BF16), 2)
    ours = optimizer_of(model, master_weights=True)
    ours.load_state_dict(theirs.state_dict())
    train(model, ours, Batches(BF16), 1)
    for p in model.parameters():
        master = ours.state[p]["master"]
        assert master.dtype == F32 and same_bits(master.to(BF16), p.detach())
        assert ours.state[p]["step"].item() == 3


# ---- hooks ----


def test_a_hook_loads_by_names_in_another_order() -> None:
    """As torch.optim.Optimizer.load_state_dict documents it."""
    model, optimizer = folded(net(), 3)
    other = copy.deepcopy(model)
    restored = SpectralAdamW(list(other.parameters())[::-1], lr=LR, model=other, strength=STRENGTH)
    count = len(restored.param_groups[0]["params"])

    def reverse(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"state": {count - 1 - place: entries for place, entries in state["state"].items()}}

    restored.register_load_state_dict_pre_hook(reverse)
    restored.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert all(same_bits(x, restored.state[q][key]) for key, x in optimizer.state[p].items())
    batches, others = Batches(), Batches()
    train(model, optimizer, batches, 3)
    train(other, restored, others, 3)
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("when", ["before", "behind"])
def test_what_hooks_change_is_what_is_loaded(when: str) -> None:
    model, optimizer = folded(net(), 3)
    state = optimizer.state_dict()

    def forget(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        assert "spectral" in state
        entries = {n: s | {"exp_avg": torch.zeros_like(s["exp_avg"])} for n, s in state["state"].items()}
        return state | {"state": entries}

    def forget_loaded(restored: Any) -> None:
        for entries in restored.state.values():
            entries["exp_avg"] = torch.zeros_like(entries["exp_avg"])

    if when == "before":
        optimizer.register_load_state_dict_pre_hook(forget)
    else:
        optimizer.register_load_state_dict_post_hook(forget_loaded)
    for _ in range(2):
        optimizer.load_state_dict(state)
        for p in model.parameters():
            assert not optimizer.state[p]["exp_avg"].any() and optimizer.state[p]["exp_avg_sq"].any()
        train(model, optimizer, Batches(), 1)


def test_a_state_of_another_kind_of_optimizer_is_refused() -> None:
    model, optimizer = folded(net(), 2)
    before = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    train(model, other, Batches(), 1)
    with pytest.raises(ValueError, match=r"state of 'shift' with step, exp_avg and .*got \['momentum_buffer'\]"):
        optimizer.load_state_dict(other.state_dict())
    for number, entries in before["state"].items():
        assert all(same_bits(x, optimizer.state_dict()["state"][number][key]) for key, x in entries.items())
