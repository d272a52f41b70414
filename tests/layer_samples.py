"""Small modules of every kind that the rules know, and of kinds that they do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops.layers import Entry, discover
from spectral_ops.ops.layout import Kind, Layout, as_matrices

NOT_RECOGNISED = "not recognised; name it in rules to treat it"
SCALE, SHIFT, BIAS = Layout(Kind.SCALE), Layout(Kind.SHIFT), Layout(Kind.BIAS)


class Holder(nn.Module):
    """Parameters that belong to no layer we know."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class Conv1D(Holder):
    """As GPT-2's layer in transformers: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__(weight=(nx, nf), bias=(nf,))
        self.nf = nf


class Block(nn.Module):
    """A packed projection, a second layer and a norm."""

    def __init__(self, packed: nn.Module | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12) if packed is None else packed
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Tied(nn.Module):
    """Two linears and an embedding around one parameter, registered under the linear's name first."""

    def __init__(self, with_embedding: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False)
        self.other = nn.Linear(4, 6)
        self.other.weight = self.head.weight
        if with_embedding:
            self.table = nn.Embedding(6, 4)
            self.table.weight = self.head.weight


def holder_named(class_name: str, **shapes: tuple[int, ...]) -> nn.Module:
    return type(class_name, (Holder,), {})(**shapes)


def beside_linear(module: nn.Module) -> nn.Sequential:
    """The module with a layer that is always treated, as nothing to treat is an error."""
    return nn.Sequential(module, nn.Linear(2, 2))


def treatment(model: Any, **arguments: Any) -> dict[str, str]:
    return {entry.name: entry.treated_as for entry in discover(model, **arguments)}


def entry_of(model: Any, name: str, **arguments: Any) -> Entry:
    return next(entry for entry in discover(model, **arguments) if entry.name == name)


def parts_of(entry: Entry) -> Tensor:
    assert entry.layout is not None
    return as_matrices(entry.parameter, entry.layout)
