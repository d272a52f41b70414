"""SpectralAdamW on tensors that do not lie where their address says, and where torch must see every operation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import same_bits
from optim_models import LR, STRENGTH
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import AdamW
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_ops import SpectralAdamW
from spectral_ops.backends import use_backend

SHAPE = 5, 4


def weight() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 2, 20).view(SHAPE).sin())


def gradient(step: int) -> Tensor:
    return torch.linspace(1, 2, 20).view(SHAPE) * (step + 1)


def optimizer_of(p: nn.Parameter, exclude: str | None = None) -> SpectralAdamW:
    """With an excluded one, another is there that has a penalty."""
    params = [("weight", p), ("beside", nn.Parameter(torch.eye(3)))][: 1 if exclude is None else 2]
    return SpectralAdamW(params, lr=LR, strength=STRENGTH, exclude=exclude)


def trained(p: nn.Parameter, exclude: str | None = None, given: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """After three steps."""
    optimizer = optimizer_of(p, exclude)
    for step in range(3):
        p.grad = given(gradient(step))
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert "weight" in repr(optimizer)
    return p.detach()


def by_reference(exclude: str | None = None) -> Tensor:
    with use_backend("reference"):
        return trained(weight(), exclude)


def two(x: Tensor) -> Tensor:
    return TwoTensor(x.detach().clone(), x.detach().clone())


@pytest.mark.parametrize("exclude", [None, "weight"])
def test_a_subclass_that_holds_other_tensors(exclude: str | None) -> None:
    p = nn.Parameter(two(weight()))
    moved = trained(p, exclude, two)
    assert same_bits(moved.a, moved.b) and same_bits(moved.a, by_reference(exclude))


@pytest.mark.parametrize("exclude", [None, "weight"])
def test_a_gradient_of_such_a_subclass(exclude: str | None) -> None:
    assert same_bits(trained(weight(), exclude, two), by_reference(exclude))


@pytest.mark.parametrize("exclude", [None, "weight"])
def test_a_gradient_that_is_a_zero_without_memory(exclude: str | None) -> None:
    def step(grad: Tensor) -> Tensor:
        p = weight()
        optimizer = optimizer_of(p, exclude)
        p.grad = grad
        optimizer.step()
        return p.detach()

    found = step(torch._efficientzerotensor(SHAPE))
    with use_backend("reference"):
        assert torch.allclose(found, step(torch.zeros(SHAPE)), rtol=1e-6, atol=0)  # the vectors began elsewhere
    assert not same_bits(found, weight()), "weight decay moves it, too"


@pytest.mark.parametrize("exclude", [None, "weight"])
def test_a_weight_with_the_negative_bit(exclude: str | None) -> None:
    """Its memory holds the numbers with the other sign."""
    start = weight().detach()
    p = nn.Parameter(torch.complex(start, -start).conj().imag)
    assert p.is_neg() and torch.equal(p, start)
    assert torch.equal(trained(p, exclude), by_reference(exclude))


def test_a_state_of_such_a_subclass() -> None:
    p, other = weight(), weight()
    optimizer, beside = optimizer_of(p), optimizer_of(other)
    for step in range(4):
        p.grad, other.grad = gradient(step), gradient(step)
        if step == 2:
            optimizer.state[p]["exp_avg"] = two(optimizer.state[p]["exp_avg"])
        optimizer.step()
        with use_backend("native" if step < 2 else "reference"):
            beside.step()
    assert same_bits(p.detach(), other.detach())
    assert same_bits(optimizer.state[p]["exp_avg"].a, beside.state[other]["exp_avg"])


def test_fake_tensors() -> None:
    """As where memory is estimated: nothing is computed, everything has its shape."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        optimizer = SpectralAdamW(model.parameters(), model=model, strength=STRENGTH)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[model[0].weight]
        assert isinstance(state["exp_avg"], FakeTensor) and state["exp_avg"].shape == (5, 4)
        assert "0.weight" in repr(optimizer)
    assert isinstance(optimizer.penalty, FakeTensor)


def test_weights_that_autograd_may_copy_before_a_change() -> None:
    """The step between forward and backward."""

    def found(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> Tensor:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
                p.grad = torch.ones_like(p)
        optimizer = optimizer_of(model)
        optimizer.step()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            y = model(torch.ones(1, 4).double()).sum()
            optimizer.step()
            optimizer.zero_grad()
            y.backward()
        assert model[0].weight.grad is not None
        return model[0].weight.grad

    ours = found(lambda m: SpectralAdamW(m.parameters(), lr=0.1, model=m, strength=0.0))
    torchs = found(lambda m: AdamW(m.parameters(), lr=0.1))
    assert torch.allclose(ours, torchs, rtol=1e-12, atol=0)


class Seen(TorchDispatchMode):
    """Which operators were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_step_that_was_repeated_before() -> None:
    p, other = weight(), weight()
    optimizer, beside = optimizer_of(p), optimizer_of(other)
    for step in range(5):
        p.grad, other.grad = gradient(step), gradient(step)
        with use_backend("reference" if step == 2 else "native"):
            beside.step()
        if step == 2:
            with Seen() as seen:
                optimizer.step()
            assert {"copy_", "sqrt"} <= seen.names
        else:
            optimizer.step()
    assert same_bits(p.detach(), other.detach())


def test_copies_go_on_alike() -> None:
    p = nn.Parameter(two(weight()))
    optimizer = optimizer_of(p)
    p.grad = two(gradient(0))
    optimizer.step()
    q, copied = copy.deepcopy((p, optimizer))
    for x, own in ((p, optimizer), (q, copied)):
        x.grad = two(gradient(1))
        own.step()
    assert same_bits(p.detach().a, q.detach().a)
