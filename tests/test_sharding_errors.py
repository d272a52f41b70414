"""What a sharded model may not be: an error on every rank that names the parameter and the remedy, nothing changed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import F32, F64, gaussian
from regularizer_truth import assert_same_bits
from sharding_models import Feedforward, Rows, fsdp, like, make, mesh, place, state_of, tensor_parallel
from sharding_run import LIMIT, World, run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from spectral_ops import SpectralRegularizer

pytestmark = pytest.mark.slow


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def build(model: nn.Module, **arguments: Any) -> str:
    return message(lambda: SpectralRegularizer(model, strength=0.1, **arguments))


# ---- placements and meshes ----


def partial() -> str:
    model = nn.Linear(4, 6)
    model.weight = nn.Parameter(DTensor.from_local(model.weight.detach(), mesh(-1), [Partial()]))
    return build(model)


def test_partial() -> None:
    for text in run(2, partial):
        assert text == (
            "RuntimeError: SpectralRegularizer: expected parameter 'weight' sharded or replicated, got "
            "(Partial(sum),). Redistribute it to Shard or Replicate, or leave it out with exclude='weight'."
        )


def operator() -> str:
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    place(model, mesh(-1), lambda name, p, i: [Shard(0)])
    assert build(model, conv="operator", input_size=(2, 5, 5), rules={"0.weight": "matrix"}) == "no error"
    return build(model, conv="operator", input_size=(2, 5, 5))


def test_sharded_operator() -> None:
    for text in run(2, operator):
        assert text == (
            "NotImplementedError: SpectralRegularizer: expected conv operator '0.weight' on one rank, got a sharded "
            "weight. Read it as a matrix by rules={'0.weight': 'matrix'}, or leave it unsharded."
        )


def rows_and_columns() -> str:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    place(model, mesh(2, -1), lambda name, p, i: [Shard(i), Shard(1 - i)])
    return build(model)


def test_rows_and_columns_over_one_dimension() -> None:
    for text in run(4, rows_and_columns):
        assert text == (
            "RuntimeError: SpectralRegularizer: expected parameters cut along two dimensions of the mesh to be cut by "
            "rows along the same one, got rows of '0.weight' and columns of '1.weight' along one. Exchange the "
            "placements of one of them, or leave it out with exclude='0.weight'."
        )


def meshes() -> str:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    whole = mesh(2, -1, names=("a", "b"))
    for layer, name in zip(model, ("a", "b"), strict=True):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), whole[name], [Shard(0)]))
    return build(model)


def test_meshes_that_differ() -> None:
    for text in run(4, meshes):
        assert text.startswith("RuntimeError: SpectralRegularizer: expected parameter '1.weight' on the mesh of '0.")
        assert text.endswith("Slice both out of one init_device_mesh, or leave one out with exclude='1.weight'.")


def uneven() -> str:
    model = nn.Linear(4, 8, bias=False)  # torch.chunk would cut it into 3, 3 and 2 rows
    rows = [3, 2, 3][dist.get_rank()]
    local = model.weight.detach()[:rows].clone()
    model.weight = nn.Parameter(
        DTensor.from_local(local, mesh(-1), [Shard(0)], run_check=False, shape=torch.Size([8, 4]), stride=(4, 1))
    )
    return build(model)


def test_shards_of_other_sizes() -> None:
    """The first rank's shard is as expected: it is told all the same, and does not wait for the others."""
    start = time.monotonic()
    for text in run(3, uneven):
        assert text.startswith("RuntimeError: SpectralRegularizer: expected the shard")
        assert "'weight'" in text
        assert text.endswith("Shard it by distribute_tensor or fully_shard, or leave it out with exclude='weight'.")
    assert time.monotonic() - start < LIMIT.total_seconds() / 2


def elsewhere() -> str:
    first = DeviceMesh("cpu", [0, 1])
    model = nn.Linear(4, 8, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), first, [Shard(0)]))
    return build(model)


def test_a_mesh_without_this_rank() -> None:
    in_it, there, *others = run(4, elsewhere)
    assert in_it == there == "no error"
    for text in others:
        assert text.startswith("RuntimeError: SpectralRegularizer: expected parameter 'weight' on a mesh with this")
        assert text.endswith("Build the regularizer from the parameters that this rank trains.")


# ---- gradients ----


def snapshot(model: nn.Module, reg: SpectralRegularizer) -> dict[str, Tensor]:
    """This rank's weights, gradients and state."""
    out = state_of(reg)
    for name, p in model.named_parameters():
        for what, x in (("data", p), ("grad", p.grad)):
            if x is not None:
                out[f"{what} of {name}"] = (x.to_local() if isinstance(x, DTensor) else x).detach().clone()
    return out


def bad_gradient(kind: str) -> tuple[str, str, bool, dict[str, Tensor], dict[str, Tensor]]:
    """Of one parameter of a model that has whole ones before it, one of them without a gradient."""
    model = make(Feedforward, F32)
    tensor_parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    reg = SpectralRegularizer(model, strength=0.1)
    reg(advance=False)
    p: Any = model.up.weight
    for name, other in model.named_parameters():
        other.grad = like(other, gaussian(name, *other.shape)) if name != "first.bias" else None
    if kind == "plain":
        p.grad = p.grad.full_tensor()
    elif kind == "columns":
        p.grad = p.grad.redistribute(p.device_mesh, [Shard(1)])
    elif kind == "partial":
        p.grad = DTensor.from_local(p.grad.full_tensor(), p.device_mesh, [Partial()])
    elif kind == "other mesh":
        p.grad = distribute_tensor(p.grad.full_tensor(), mesh(1, -1), [Replicate(), Shard(0)])
    before = snapshot(model, reg)
    texts = message(reg.accumulate_grad_)
    reg.attach(optimizer)
    attached = message(optimizer.step)
    return texts, attached, reg._placed is not None, before, snapshot(model, reg)


GRADIENTS = {
    "plain": ("a plain tensor", "Set it to None and run backward again"),
    "columns": ("(Shard(dim=1),)", "Write p.grad = p.grad.redistribute(p.device_mesh, p.placements) before this call"),
    "partial": ("(Partial(sum),)", "Write p.grad = p.grad.redistribute(p.device_mesh, p.placements) before this call"),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_sharded_otherwise(kind: str) -> None:
    got, remedy = GRADIENTS[kind]
    for text, attached, _, before, after in run(2, bad_gradient, kind):
        condition = "the gradient of 'up.weight' sharded as its weight, (Shard(dim=0),)"
        assert text == attached == f"RuntimeError: SpectralRegularizer: expected {condition}, got {got}. {remedy}."
        assert_same_bits(before, after)


def sharded_gradient_of_a_whole_weight() -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False))
    model[0].weight = nn.Parameter(distribute_tensor(gaussian("w", 6, 4).float(), mesh(-1), [Shard(0)]))
    reg = SpectralRegularizer(model, strength=0.1)
    model[1].weight.grad = distribute_tensor(torch.ones(4, 6), mesh(-1), [Shard(0)])
    before = snapshot(model, reg)
    return message(reg.accumulate_grad_), before, snapshot(model, reg)


def test_a_sharded_gradient_of_a_whole_weight() -> None:
    """Behind a sharded one, which is not added to either."""
    for text, before, after in run(2, sharded_gradient_of_a_whole_weight):
        assert text == (
            "TypeError: accumulate_grad_: expected the gradient of 1.weight to be a plain tensor, as its weight is, "
            "got a DTensor. Write p.grad = p.grad.full_tensor() before this call."
        )
        assert_same_bits(before, after)


# ---- ranks and groups that are gone ----


def destroyed() -> list[str]:
    model = make(Rows, F32)
    fsdp(model)
    reg = SpectralRegularizer(model, strength=0.1, rules=Rows.rules)
    reg.accumulate_grad_()
    dist.destroy_process_group()
    before = snapshot(model, reg)
    texts = [message(call) for call in (reg.accumulate_grad_, reg)] + [build(model, rules=Rows.rules)]
    after = snapshot(model, reg)
    assert_same_bits(before, after)
    return texts


def test_process_group_that_is_gone() -> None:
    world = World(2)
    try:
        for texts in world.run(destroyed):
            for text in texts:
                assert text.startswith("RuntimeError: SpectralRegularizer: expected process groups for the mesh of ")
                assert "'experts'" in text
                assert "Call init_process_group and shard the model again, or load its full weights" in text
    finally:
        world.close()


def steps(pid_after: int | None, count: int) -> str:
    model = make(Rows, F64)
    fsdp(model)
    reg = SpectralRegularizer(model, strength=0.1, rules=Rows.rules)
    for step in range(count):
        if step == 3 and dist.get_rank() == pid_after:
            os.kill(os.getpid(), signal.SIGKILL)
        text = message(reg.accumulate_grad_)
        if text != "no error":
            return f"step {step}: {text}"
    return "all steps"


def test_a_rank_that_dies() -> None:
    world = World(3)
    try:
        world.send(steps, 1, 6)
        start = time.monotonic()
        for rank in (0, 2):
            assert world.receive(rank, LIMIT.total_seconds()).startswith("step 3: RuntimeError: ")
        with pytest.raises(RuntimeError, match="rank 1 died"):
            world.receive(1)
        assert time.monotonic() - start < LIMIT.total_seconds()
    finally:
        world.close()
