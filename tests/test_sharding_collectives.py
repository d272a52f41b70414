"""What a step of a sharded model sends and keeps: one all-reduce for all layers, two with columns, and no weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers import F32, F64
from sharding_models import SHARDINGS, WITH_FORWARD, Columns, Feedforward, Rows, make, train
from sharding_run import run
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_ops import SpectralRegularizer, use_backend

pytestmark = pytest.mark.slow

ONE = [
    ("fsdp", Rows, 2),
    ("fsdp", Rows, 4),
    ("hsdp", Rows, 4),
    ("twice_dim_0", Rows, 4),  # both dimensions of the mesh in one
]
TWO = [
    ("first_dim", Columns, 3),  # a transposed conv among rows
    ("dim_1", Columns, 3),
    ("tensor_parallel", Feedforward, 2),
    ("rows_and_columns", Columns, 4),
    ("fsdp_and_tensor_parallel", Feedforward, 4),
    ("hsdp_and_tensor_parallel", Feedforward, 4),
]
CASES = [(1, *case) for case in ONE] + [(2, *case) for case in TWO] + [(0, "replicated", Columns, 2)]


def collectives(sharding: str, kind: type[nn.Module]) -> list[int]:
    return train(sharding, kind, "accumulate", "native", F64, sharding in WITH_FORWARD).collectives


@pytest.mark.parametrize(("count", "sharding", "kind", "world"), CASES, ids=str)
def test_every_step_the_first_too(count: int, sharding: str, kind: type[nn.Module], world: int) -> None:
    assert run(world, collectives, sharding, kind) == [[count] * 3] * world


class Seen(NamedTuple):
    kinds: list[str]
    sent: list[int]  # bytes of every collective
    largest: int  # bytes of the largest tensor made
    shards: int  # bytes of the largest shard
    numbers: int  # that the vectors of a step hold on this rank


class _Watch(TorchDispatchMode):
    """Sizes of what is made and of what is sent."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.made, self.sent = 0, []
        self._known = {x.data_ptr() for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if "c10d" in str(function):
            self.sent += [x.nbytes for x in args[0]]
        elif type(out) is Tensor and out.untyped_storage().data_ptr() not in self._known:
            self.made = max(self.made, out.untyped_storage().nbytes())
        return out


class Tall(nn.Module):
    """Weights that are much larger than their vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(60, 80)
        self.packed = nn.Linear(60, 90)


def watched(sharding: str, backend: str, form: str) -> Seen:
    model = make(Tall, F32)
    SHARDINGS[sharding](model)
    with use_backend(backend):  # type: ignore[arg-type]
        reg = SpectralRegularizer(model, strength=0.1, rules={"packed.weight": _split()})
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        reg.accumulate_grad_()
        known = [x.to_local() for p in model.parameters() for x in (p, p.grad)]  # type: ignore[union-attr]
        with CommDebugMode() as counter, _Watch(known) as watch:
            reg.accumulate_grad_() if form == "accumulate" else reg().backward()
    shard = max(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    v = sum(x.numel() for x in reg.state_dict()["v"].values())
    return Seen([str(kind) for kind in counter.get_comm_counts()], watch.sent, watch.made, shard, v)


def _split() -> Any:
    from spectral_ops.rules import Rule

    return Rule(split=(3, 0))


@pytest.mark.parametrize("form", ["accumulate", "loss"])
def test_nothing_but_vectors_is_sent_and_kept(form: str) -> None:
    for seen in run(2, watched, "first_dim", "native", form):
        assert seen.kinds == ["c10d.allreduce_"]
        # z of every matrix and bias in float64, ||y||^2 of each (4 matrices, 4 parts of biases), and what vectors give.
        assert seen.sent == [8 * (seen.numbers + 4 + 8 + 1)]
        # The largest is that buffer, which is smaller than a shard; in the loss, the gradient of a shard.
        assert seen.largest <= (max(seen.sent) if form == "accumulate" else seen.shards)
        assert max(seen.sent) < seen.shards


def test_columns_send_rows_too_but_no_weight() -> None:
    for seen in run(2, watched, "dim_1", "native", "accumulate"):
        assert seen.kinds == ["c10d.allreduce_"]
        assert seen.sent == [8 * (80 + 90), 8 * (seen.numbers + 4 + 8 + 1)]
        assert seen.largest < seen.shards / 4
