"""SpectralAdamW beside CUDA graphs, as far as a CPU can tell: what a graph uses is kept, and a first step refused.

tests/test_adamw_cuda.py captures and replays.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from optim_models import LR, STRENGTH
from torch import nn

from spectral_ops import SpectralAdamW
from spectral_ops.ops import capture
from spectral_ops.optim_parts import Part


def made() -> tuple[nn.Sequential, SpectralAdamW]:
    """Two steps on, its embedding without a gradient yet."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Embedding(4, 5))
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Sequential, optimizer: SpectralAdamW) -> None:
    model[0].zero_grad()
    model[0](torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


def first_gradient(model: nn.Sequential, optimizer: SpectralAdamW) -> None:
    model[1].weight.grad = torch.ones(4, 5)


def freeze(model: nn.Sequential, optimizer: SpectralAdamW) -> None:
    model[0].bias.requires_grad_(False)


def edit(model: nn.Sequential, optimizer: SpectralAdamW) -> None:
    optimizer.param_groups[0]["exponent"] = 1.0


def add(model: nn.Sequential, optimizer: SpectralAdamW) -> None:
    model.append(nn.Linear(2, 3))
    optimizer.add_param_group({"params": model[-1].parameters()})


def load(model: nn.Sequential, optimizer: SpectralAdamW) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_spectral(model: nn.Sequential, optimizer: SpectralAdamW) -> None:
    optimizer.load_spectral_state_dict(optimizer.spectral_state_dict())


CHANGES: list[Callable[[nn.Sequential, SpectralAdamW], None]] = [first_gradient, freeze, edit, add, load, load_spectral]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_graph_uses_is_kept(
    change: Callable[..., None], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay reads and writes the memory of its capture, whatever has become of the parameters since."""
    monkeypatch.setattr(Part, "captured", captured)
    model, optimizer = made()
    assert optimizer._cut is not None
    (part,) = [weakref.ref(part) for part in optimizer._cut.parts]
    change(model, optimizer)
    step(model, optimizer)
    gc.collect()
    assert (part() is not None) == captured


def test_copies_keep_nothing_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Part, "captured", True)
    model, optimizer = made()
    edit(model, optimizer)
    step(model, optimizer)
    assert len(optimizer._captured) == 1
    assert copy.deepcopy(optimizer)._captured == pickle.loads(pickle.dumps(optimizer))._captured == []


@pytest.mark.parametrize("change", CHANGES[:4])
def test_a_first_step_under_capture_is_refused(change: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """s, u, v would be written anew at every replay, and tables for the first time."""
    model, optimizer = made()
    before = [p.detach().clone() for p in model.parameters()]
    with monkeypatch.context() as patch:
        if change is not add:  # which cuts by itself
            change(model, optimizer)
        patch.setattr(capture, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="before a CUDA graph of it is captured"):
            change(model, optimizer) if change is add else optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=False))
    step(model, optimizer)
    assert not torch.equal(before[0], model[0].weight)


def test_a_step_like_the_last_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    monkeypatch.setattr(capture, "capturing", lambda device: True)
    step(model, optimizer)
