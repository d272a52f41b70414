"""SpectralRegularizer on parameters whose address is not that of their elements: subclasses, fake and negative ones."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from regularizer_truth import assert_same_bits, bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from spectral_ops import SpectralRegularizer


class Held(Tensor):
    """A tensor that keeps its elements in another one, as quantised weights do; an op acts on these."""

    @staticmethod
    def __new__(cls, elements: Tensor, requires_grad: bool = False) -> Held:
        return Tensor._make_wrapper_subclass(cls, elements.shape, dtype=elements.dtype, requires_grad=requires_grad)

    def __init__(self, elements: Tensor, requires_grad: bool = False) -> None:
        self.elements = elements

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Held, lambda t: t.elements, (args, kwargs or {}))
        return tree_map_only(Tensor, Held, func(*args, **kwargs))


def test_parameters_that_keep_their_elements_elsewhere(backend: str) -> None:
    """They have no address: kernels must not be handed it."""
    plain = nn.Linear(4, 3)
    held = nn.Linear(4, 3)
    for name, p in plain.named_parameters():
        setattr(held, name, nn.Parameter(Held(p.detach().clone())))
    values = []
    for model in (plain, held):
        reg = SpectralRegularizer(model, strength=0.3)
        values.append([reg(), reg.accumulate_grad_()])
    for x, y in zip(*values, strict=True):
        assert type(y) is Held
        torch.testing.assert_close(x, y.elements)  # the registered op takes a strength as a tensor
    for x, y in zip(plain.parameters(), held.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad.elements)


@pytest.mark.parametrize("fake_model", [False, True], ids=["model", "fake_model"])
def test_under_fake_tensor_mode(fake_model: bool, backend: str) -> None:
    """As estimates of memory run a step: shapes come out and nothing is read."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode if fake_model else contextlib.nullcontext():
        model = nn.Linear(4, 3)
        reg = SpectralRegularizer(model, strength=0.3)
    before = None if fake_model else bits(reg)
    with mode:
        for value in (reg(), reg(advance=False), reg.accumulate_grad_()):
            assert isinstance(value, FakeTensor) and value.shape == ()
    if before is not None:
        assert_same_bits(bits(reg), before)
        model.zero_grad()
        assert reg().item() >= 0


def test_a_parameter_with_the_negative_bit(backend: str) -> None:
    """z.conj().imag: its memory holds the numbers with the other sign, and so would its gradient."""
    z = torch.randn(5, 4, dtype=torch.complex64)
    negative = nn.Parameter(z.conj().imag)
    plain = nn.Parameter(negative.detach().resolve_neg().clone())
    assert negative.is_neg() and torch.equal(negative, plain)
    for p in (negative, plain):
        reg = SpectralRegularizer([("weight", p)], strength=0.3)
        reg().backward()
        reg.accumulate_grad_()
    assert torch.equal(negative.grad, plain.grad)
