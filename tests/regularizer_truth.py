"""A model with every kind of layer, its penalty and gradient in float64 by the SVD, and what tests compare."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from helpers import F32, F64, relative_error, same_bits, with_values
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer

# Of a penalty's value and gradient against the SVD in float64, for exact vectors. Measured on the models tested here:
# 2e-5 and 1e-14, where sigma is within some percent of the target and sigma^k - t^k cancels; else 1e-6.
TOLERANCE = {F32: 5e-5, F64: 1e-13}


class Net(nn.Module):
    """Every kind of parameter that is treated: groups, depthwise, transposed, packed attention, gates, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2)
        self.batch_norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(5, 6, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            for p in self.parameters():  # biases and norms start at 0 and 1, where there is nothing to see
                p.add_(0.3 * torch.randn_like(p))

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 5, 5)
        x = self.batch_norm(self.transposed(self.conv(self.depthwise(x))))
        x = self.norm(self.lstm(x.mean(dim=3))[0])  # (batch, 4, 6)
        return self.head(self.attention(x, x, x)[0].mean(dim=1))


def batch(n: int = 8) -> Tensor:
    return torch.randn(n, 4, 5, 5)


class Mlp(nn.Module):
    """Small, smooth, without buffers, its top singular values apart: for loops whose weights are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.3 * torch.randn_like(p))
            self.first.weight.copy_(with_values("first", 8, 6, [2.0, 0.5, 0.4, 0.3, 0.2, 0.1]))
            self.last.weight.copy_(with_values("last", 3, 8, [1.7, 0.5, 0.3]))

    def forward(self, x: Tensor) -> Tensor:  # (batch, 6)
        return self.last(torch.tanh(self.norm(self.first(x))))


def _whole(w: Tensor) -> list[Tensor]:
    return [w.flatten(1) if w.ndim > 1 else w]


def _chunks(n: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda w: [part for whole in w.chunk(n) for part in _whole(whole)]


def _output_first(groups: int) -> Callable[[Tensor], list[Tensor]]:
    return lambda w: [part.transpose(0, 1).flatten(1) for part in w.chunk(groups)]


# Written out by hand and apart from the library's own reading of a model.
NET: dict[str, tuple[str, Callable[[Tensor], list[Tensor]]]] = {
    "depthwise.weight": ("matrix", _chunks(4)),
    "depthwise.bias": ("bias", _chunks(4)),
    "conv.weight": ("matrix", _chunks(2)),
    "conv.bias": ("bias", _chunks(2)),
    "transposed.weight": ("matrix", _output_first(2)),
    "transposed.bias": ("bias", _chunks(2)),
    "batch_norm.weight": ("scale", _whole),
    "batch_norm.bias": ("shift", _whole),
    "lstm.weight_ih_l0": ("matrix", _chunks(4)),
    "lstm.weight_hh_l0": ("matrix", _chunks(4)),
    "lstm.bias_ih_l0": ("bias", _chunks(4)),
    "lstm.bias_hh_l0": ("bias", _chunks(4)),
    "norm.weight": ("scale", _whole),
    "norm.bias": ("shift", _whole),
    "attention.in_proj_weight": ("matrix", _chunks(3)),
    "attention.in_proj_bias": ("bias", _chunks(3)),
    "attention.out_proj.weight": ("matrix", _whole),
    "attention.out_proj.bias": ("bias", _whole),
    "head.weight": ("matrix", _whole),
    "head.bias": ("bias", _whole),
}


def reading_of(name: str, p: Tensor) -> tuple[str, Callable[[Tensor], list[Tensor]]]:
    """As NET says; of other models, a Linear's or a norm's."""
    if name in NET:
        return NET[name]
    if "norm" in name:
        return ("scale" if name.endswith("weight") else "shift"), _whole
    return ("matrix" if p.ndim > 1 else "bias"), _whole


class Truth(NamedTuple):
    value: float
    gradients: dict[str, Tensor]


def truth(
    model: nn.Module,
    *,
    exponent: float = 2.0,
    target: float = 1.0,
    targets: Mapping[str, float] | None = None,
    strengths: Mapping[str, float] | None = None,
    names: Mapping[str, object] | None = None,
) -> Truth:
    """R and its gradients in float64: of `names` alone if given; target and strength of single parameters by name."""
    k, total = exponent, torch.zeros((), dtype=F64)
    leaves = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    for name, w in leaves.items():
        if names is not None and name not in names:
            continue
        kind, parts = reading_of(name, w)
        t = (targets or {}).get(name, target if kind == "matrix" else 1.0)
        for x in parts(w):
            if kind == "matrix":
                term = (torch.linalg.matrix_norm(x, 2) ** k - t**k) ** 2
            elif kind == "bias":
                term = x.square().sum() ** k
            elif kind == "scale":
                term = ((x.abs() ** k - t**k) ** 2).sum()
            else:
                term = (x.abs() ** (2 * k)).sum()
            total = total + (strengths or {}).get(name, 1.0) * term
    total.backward()
    return Truth(total.item(), {name: x.grad for name, x in leaves.items() if x.grad is not None})


def load_converged(reg: SpectralRegularizer, model: nn.Module) -> None:
    """The exact top right singular vectors as the state, so that what is measured is not the start's tolerance."""
    state = reg.state_dict()
    parameters = dict(model.named_parameters())
    for name, v in state["v"].items():
        w = parameters[name].detach().double()
        parts = reading_of(name, w)[1](w)
        v.copy_(torch.stack([torch.linalg.svd(x)[2][0] for x in parts]))
    reg.load_state_dict(state)


def load_random(reg: SpectralRegularizer) -> dict[str, Tensor]:
    """Random unit vectors as the state: a step then moves them visibly. Returns them."""
    state = reg.state_dict()
    for v in state["v"].values():
        v.copy_(nn.functional.normalize(torch.randn_like(v), dim=1))
    reg.load_state_dict(state)
    return state["v"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits(reg: SpectralRegularizer) -> dict[str, Tensor]:
    return {f"{key} of {name}": x for key, entries in reg.state_dict().items() for name, x in entries.items()}


def assert_same_bits(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> None:
    assert x.keys() == y.keys()
    assert [name for name in x if not same_bits(x[name], y[name])] == []


def assert_close(x: Mapping[str, Tensor], y: Mapping[str, Tensor], tolerance: float) -> None:
    """||x - y|| / ||y|| of every tensor at most `tolerance`; NaN and missing ones fail."""
    assert x.keys() == y.keys()
    errors = {name: relative_error(x[name], y[name]) for name in x}
    assert all(e <= tolerance for e in errors.values()), {name: e for name, e in errors.items() if not e <= tolerance}


def refuses(kind: type[Exception], message: str) -> AbstractContextManager[Any]:
    """The whole message, and the very type."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")
