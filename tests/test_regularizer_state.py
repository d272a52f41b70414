"""SpectralRegularizer's state: saved, loaded, refused when damaged; and that equal runs are equal bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BF16, F32, F64
from regularizer_truth import (
    Mlp,
    Net,
    assert_close,
    assert_same_bits,
    batch,
    bits,
    gradients,
    load_random,
    refuses,
    weights,
)
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer, available, spectral_norm

FORMS = ("loss", "accumulate", "attach")
State = dict[str, Any]


class Run:
    """A small training run; everything that a checkpoint must hold is in it."""

    def __init__(self, form: str, dtype: torch.dtype, weights_of: nn.Module | None = None) -> None:
        self.form, self.dtype = form, dtype
        self.model = Mlp().to(dtype) if weights_of is None else copy.deepcopy(weights_of)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.reg = SpectralRegularizer(self.model, strength=0.3)
        if form == "attach":
            self.reg.attach(self.optimizer)

    def train(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(self.dtype)
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            if self.form == "loss":
                loss = loss + self.reg().to(self.dtype)
            loss.backward()
            if self.form == "accumulate":
                self.reg.accumulate_grad_()
            self.optimizer.step()

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save([x.state_dict() for x in (self.model, self.optimizer, self.reg)], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for x, state in zip((self.model, self.optimizer, self.reg), states, strict=True):
            x.load_state_dict(state)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_resumed_run_is_the_same_bit_for_bit(form: str, dtype: torch.dtype, backend: str) -> None:
    straight = Run(form, dtype)
    straight.train(range(10))
    saved = straight.save()
    straight.train(range(10, 20))
    resumed = Run(form, dtype)  # other weights, other vectors
    resumed.load(saved)
    resumed.train(range(10, 20))
    assert_same_bits(weights(resumed.model), weights(straight.model))
    assert_same_bits(bits(resumed.reg), bits(straight.reg))


def test_resuming_without_the_state_differs(backend: str) -> None:
    """That the test above can fail: new vectors, converged, are others than the warm ones."""
    straight = Run("attach", F32)
    straight.train(range(10))
    resumed = Run("attach", F32, weights_of=straight.model)
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    for run in (straight, resumed):
        run.train(range(10, 20))
    assert not torch.equal(resumed.model.first.weight, straight.model.first.weight)
    assert_close(weights(resumed.model), weights(straight.model), 1e-3)


def test_state_dict_is_plain_and_a_copy(backend: str) -> None:
    reg = SpectralRegularizer(Net(), strength=1.0)
    state = reg.state_dict()
    assert list(state) == ["v", "exponent", "sigma"]
    assert state["v"]["conv.weight"].shape == (2, 18) and state["v"]["transposed.weight"].shape == (2, 27)
    for entries in state.values():
        assert list(entries) == [name for name in reg.sigmas()]
        assert all(type(x) is Tensor and not x.requires_grad for x in entries.values())
    assert {x.dtype for x in state["exponent"].values()} == {torch.int32}
    before = bits(reg)
    for x in state["v"].values():
        x.zero_()
    assert_same_bits(bits(reg), before)
    reg.load_state_dict(reg.state_dict())
    assert_same_bits(bits(reg), before)


@pytest.mark.parametrize("frozen", [False, True])  # frozen, the loaded vectors wait as they came
def test_loaded_state_is_a_copy(frozen: bool, backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=1.0)
    state = reg.state_dict()
    model.requires_grad_(not frozen)
    reg.load_state_dict(state)
    before = bits(reg)
    for entries in state.values():
        for x in entries.values():
            x.zero_()
    assert_same_bits(bits(reg), before)


def test_state_of_another_precision(backend: str) -> None:
    """A float32 checkpoint in a float64 model, and back: the vectors are cast."""
    model = Mlp()
    reg = SpectralRegularizer(model, strength=1.0)
    before = bits(reg)
    double = SpectralRegularizer(copy.deepcopy(model).double(), strength=1.0)
    double.load_state_dict(reg.state_dict())
    assert double.state_dict()["v"]["first.weight"].dtype == F64
    reg.load_state_dict(double.state_dict())
    assert_same_bits(bits(reg), before)


def test_state_of_a_partly_frozen_model(backend: str) -> None:
    """What was never trained has no vectors: it is not in the state and not missed while it is frozen."""
    model = Mlp()
    model.first.requires_grad_(False)
    reg = SpectralRegularizer(model, strength=1.0)
    state = reg.state_dict()
    assert list(state["v"]) == ["last.weight"]
    other = copy.deepcopy(model)
    loaded = SpectralRegularizer(other, strength=1.0)
    loaded.load_state_dict(state)
    assert_same_bits(bits(loaded), bits(reg))
    other.first.requires_grad_(True)
    loaded()  # converged now
    assert list(loaded.sigmas()) == ["first.weight", "last.weight"]
    whole = loaded.state_dict()
    reg.load_state_dict(whole)  # frozen here, and its vectors are kept for later
    assert_same_bits(bits(reg), bits(loaded))
    other.first.requires_grad_(True)
    message = (
        "expected state['v'] to hold exactly the matrices of this model, got missing ['first.weight'] and unexpected "
        "[]. Build the regularizer with the rules, and freeze the parameters, that the state was saved under."
    )
    with refuses(ValueError, f"SpectralRegularizer.load_state_dict: {message}"):
        loaded.load_state_dict(state)


def test_pickled_with_its_model(backend: str) -> None:
    model = Mlp()
    reg = SpectralRegularizer(model, strength=torch.tensor(0.3), target={"*.weight": 0.5})
    load_random(reg)
    other, loaded = pickle.loads(pickle.dumps((model, reg)))
    assert_same_bits(bits(loaded), bits(reg))
    assert loaded().item() == reg().item() and str(loaded) == str(reg)
    loaded().backward()
    assert gradients(other) and not gradients(model)


# ---- damaged states ----


def without(key: str) -> Callable[[State], Any]:
    return lambda state: {k: x for k, x in state.items() if k != key}


def with_entry(key: str, name: str, value: Any) -> Callable[[State], Any]:
    return lambda state: {**state, key: {**state[key], name: value}}


def missing_entry(key: str) -> Callable[[State], Any]:
    return lambda state: {**state, key: {n: x for n, x in state[key].items() if n != "last.weight"}}


def with_nan(state: State) -> State:
    state["v"]["last.weight"][0, 3] = torch.nan
    return state


RETURNED = "Pass what state_dict() returned"
RULES = "Build the regularizer with the rules, and freeze the parameters, that the state was saved under"
OTHER = "The state belongs to another model, or to other rules, conv or input_size"
EXACTLY = "to hold exactly the matrices of this model"
KEYS = "state with the keys ['exponent', 'sigma', 'v']"
LAST = "['last.weight']"


@pytest.mark.parametrize(
    ("damage", "kind", "condition", "got", "remedy"),
    [
        (lambda state: None, ValueError, KEYS, "NoneType", RETURNED),
        (without("sigma"), ValueError, KEYS, "['exponent', 'v']", RETURNED),
        (lambda s: {**s, "u": {}}, ValueError, KEYS, "['exponent', 'sigma', 'u', 'v']", RETURNED),
        (lambda s: {**s, "v": [1]}, TypeError, "state['v'] to be a dict", "list", RETURNED),
        (missing_entry("v"), ValueError, f"state['v'] {EXACTLY}", f"missing {LAST} and unexpected []", RULES),
        (missing_entry("sigma"), ValueError, f"state['sigma'] {EXACTLY}", f"missing {LAST} and unexpected []", RULES),
        (with_entry("v", "head", 1), ValueError, f"state['v'] {EXACTLY}", "missing [] and unexpected ['head']", RULES),
        (with_entry("v", "last.weight", 1), TypeError, f"state['v']{LAST} to be a tensor", "int", RETURNED),
        (
            with_entry("v", "last.weight", torch.ones(8)),
            ValueError, f"state['v']{LAST} of shape (1, 8)", "(8,)", OTHER,
        ),
        (
            with_entry("exponent", "last.weight", torch.ones(2, dtype=torch.int32)),
            ValueError, f"state['exponent']{LAST} of shape (1,)", "(2,)", OTHER,
        ),
        (
            with_entry("v", "last.weight", torch.ones(1, 8, dtype=torch.int32)),
            TypeError, f"state['v']{LAST} to be a float tensor", "torch.int32", RETURNED,
        ),
        (
            with_entry("v", "last.weight", torch.ones(1, 8, dtype=torch.complex64)),
            TypeError, f"state['v']{LAST} to be a float tensor", "torch.complex64", RETURNED,
        ),
        (
            with_entry("exponent", "last.weight", torch.ones(1)),
            TypeError, f"state['exponent']{LAST} to be an integer tensor", "torch.float32", RETURNED,
        ),
        (
            with_nan,
            ValueError, f"state['v']{LAST} to be finite", "NaN or infinity",
            "The state is damaged: start from a new regularizer",
        ),
    ],
)  # fmt: skip
def test_damaged_state_is_refused_and_changes_nothing(
    damage: Callable[[State], Any], kind: type[Exception], condition: str, got: str, remedy: str
) -> None:
    model = Mlp()
    reg = SpectralRegularizer(model, strength=1.0)
    state = reg.state_dict()
    load_random(reg)
    before, value = bits(reg), reg(advance=False).item()
    with refuses(kind, f"SpectralRegularizer.load_state_dict: expected {condition}, got {got}. {remedy}."):
        reg.load_state_dict(damage(state))
    assert_same_bits(bits(reg), before)
    assert reg(advance=False).item() == value


@pytest.mark.parametrize("first", ["built", "moved", "loaded"])
def test_state_made_under_inference_mode_is_trained_on(first: str, backend: str) -> None:
    """An evaluation may be what comes first; torch refuses to write into what is made in it."""
    model = Mlp()
    saved = SpectralRegularizer(model, strength=0.3).state_dict()
    model.last.weight.requires_grad_(first != "loaded")  # in no group: its vectors stay as loaded
    with torch.inference_mode(first == "built"):
        reg = SpectralRegularizer(model, strength=0.3)
    if first == "moved":
        model.double()
    with torch.inference_mode():
        if first == "loaded":
            reg.load_state_dict(saved)
        reg()
    for _ in range(2):
        reg().backward()
        reg.accumulate_grad_()
        reg.load_state_dict(reg.state_dict())


def test_state_after_a_non_finite_weight_can_be_loaded(backend: str) -> None:
    """sigma is NaN then; the vectors, which count, are not."""
    model = Mlp()
    reg = SpectralRegularizer(model, strength=1.0)
    with torch.no_grad():
        model.last.weight[0, 0] = torch.nan
    reg()
    state = reg.state_dict()
    assert state["sigma"]["last.weight"].isnan().all()
    reg.load_state_dict(state)


# ---- equal runs are equal ----


def test_the_users_random_state_is_untouched(backend: str) -> None:
    model = Net()
    nn.init.zeros_(model.head.weight)  # W v = 0: another vector is made up
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    reg = SpectralRegularizer(model, strength=1.0)
    reg().backward()
    reg.accumulate_grad_()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[arg-type]


def test_two_regularizers_start_alike(backend: str) -> None:
    model = Net()
    first = SpectralRegularizer(model, strength=1.0)
    torch.manual_seed(123)
    assert_same_bits(bits(SpectralRegularizer(model, strength=1.0)), bits(first))


@pytest.mark.parametrize("form", FORMS)
def test_one_or_two_threads_give_the_same_bits(form: str) -> None:
    """The native backend: a fixed partition, ordered sums. Large enough that two threads share a matrix."""
    if available()["native"] is not None:
        pytest.skip("the native backend is not built; plain torch promises nothing of threads")
    model = nn.Sequential(nn.Linear(700, 300), nn.LayerNorm(300), nn.Linear(300, 900))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        copied = copy.deepcopy(model)
        reg = SpectralRegularizer(copied, strength=0.3)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        handle = reg.attach(optimizer) if form == "attach" else None
        for _ in range(3):
            optimizer.zero_grad()
            if form == "loss":
                value = reg()
                value.backward()
            elif form == "accumulate":
                value = reg.accumulate_grad_()
            optimizer.step()
        value = value if handle is None else handle.penalty  # type: ignore[assignment]
        found.append({"value": value.detach(), **weights(copied), **bits(reg)})
    assert_same_bits(*found)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_mode(form: str, deterministic: None, backend: str) -> None:
    """Nothing here is refused under it, and memory that it fills with NaN reaches no result."""
    model, x = Net(), batch()
    found = []
    for _ in range(2):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(copied.parameters(), lr=0.01)
        reg = SpectralRegularizer(copied, strength=0.3)
        if form == "attach":
            reg.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            loss = copied(x).square().mean()
            (loss + reg() if form == "loss" else loss).backward()
            if form == "accumulate":
                reg.accumulate_grad_()
            optimizer.step()
        found.append({**weights(copied), **bits(reg)})
        assert all(x.isfinite().all() for x in found[-1].values())
        assert abs(reg.sigmas()["head.weight"] - spectral_norm(copied.head.weight)) <= 0.05
    assert_same_bits(*found)
