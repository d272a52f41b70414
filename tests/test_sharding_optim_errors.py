"""SpectralAdamW on sharded models: what is refused, and that nothing has changed then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import F32
from sharding_models import SHARDINGS, Columns, Rows, like, make, whole, wholes
from sharding_optim_runs import moments_of, optimizer_of, pull, trained, vectors_of
from sharding_run import World, run

from spectral_ops.ops.dtensor import local_tensor

pytestmark = pytest.mark.slow

ROWS = ("fsdp", Rows)


def refuse_gradient(sharding: str, kind: Any) -> tuple[str, bool]:
    model = make(kind, F32)
    SHARDINGS[sharding](model)
    optimizer = optimizer_of(model)
    trained(model, optimizer, range(1))
    before = wholes(model) | vectors_of(optimizer) | moments_of(model, optimizer)
    pull(model, 1)
    p = dict(model.named_parameters())["last.weight"]
    p.grad = like(torch.zeros(()), whole(p))  # whole, where the weight is sharded
    try:
        optimizer.step()
    except RuntimeError as error:
        after = wholes(model) | vectors_of(optimizer) | moments_of(model, optimizer)
        return str(error), all(torch.equal(before[key], after[key]) for key in before)
    return "", False


def test_gradient_sharded_otherwise() -> None:
    for message, unchanged in run(2, refuse_gradient, "first_dim", Columns):
        assert message.startswith("SpectralAdamW: expected the gradient of 'last.weight' sharded as its weight")
        assert unchanged


def refuse_state(sharding: str, kind: Any) -> str:
    model = make(kind, F32)
    SHARDINGS[sharding](model)
    optimizer = optimizer_of(model)
    trained(model, optimizer, range(1))
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["exp_avg"] = whole(entry["exp_avg"])
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def test_plain_state_for_sharded_weights() -> None:
    for message in run(2, refuse_state, *ROWS):
        assert "the exp_avg of" in message and "set_optimizer_state_dict" in message


def refuse_penalty_gradients(sharding: str, kind: Any) -> str:
    model = make(kind, F32)
    SHARDINGS[sharding](model)
    try:
        optimizer_of(model).penalty_gradients()
    except NotImplementedError as error:
        return str(error)
    return ""


def test_penalty_gradients_of_sharded_weights() -> None:
    for message in run(2, refuse_penalty_gradients, *ROWS):
        assert message.startswith("SpectralAdamW: expected whole parameters in penalty_gradients(), got sharded ones")


def without_group(kind: Any) -> tuple[str, bool]:
    model = make(kind, F32)
    SHARDINGS["fsdp"](model)
    optimizer = optimizer_of(model)
    trained(model, optimizer, range(2))
    pull(model, 2)
    before = [local_tensor(p).detach().clone() for p in model.parameters()]
    torch.distributed.destroy_process_group()
    try:
        optimizer.step()
    except RuntimeError as error:
        after = [local_tensor(p) for p in model.parameters()]
        return str(error), all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    return "", False


def test_process_group_that_is_gone() -> None:
    world = World(2)
    try:
        for message, unchanged in world.run(without_group, Rows):
            assert message.startswith("SpectralAdamW: expected process groups for the mesh of parameter") and unchanged
    finally:
        world.close()
