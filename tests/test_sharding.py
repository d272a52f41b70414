"""SpectralRegularizer on sharded models: sigma, penalty, gradients, trajectory of the unsharded one, on every rank."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from helpers import F32, F64
from regularizer_truth import assert_close, assert_same_bits
from sharding_models import FORMS, WITH_FORWARD, Columns, Feedforward, Rows, Run, train
from sharding_run import run
from torch import nn

from spectral_ops import available

BACKENDS = [name for name in ("reference", "native") if available()[name] is None]
KINDS: dict[str, type[nn.Module]] = {"rows": Rows, "columns": Columns, "feedforward": Feedforward}
# Sums over ranks round otherwise; three steps of training amplify that. Measured 4e-7 and 2e-15.
TOLERANCE = {F32: 1e-5, F64: 1e-13}

# (sharding, model, ranks)
CASES = [
    *(("fsdp", "rows", world) for world in (1, 2, 3, 4)),
    *(("kept", "rows", world) for world in (2, 3)),
    ("hsdp", "rows", 2),  # two replicas, each on one rank
    ("hsdp", "rows", 4),
    *(("tensor_parallel", "feedforward", world) for world in (1, 2, 4)),
    ("fsdp_and_tensor_parallel", "feedforward", 4),
    ("hsdp_and_tensor_parallel", "feedforward", 4),
    ("hsdp_and_tensor_parallel", "feedforward", 8),  # two dimensions of three are summed over: a group of its own
    *(("first_dim", "columns", world) for world in (1, 2, 3, 4)),
    *(("dim_1", "columns", world) for world in (2, 3, 4)),
    *(("last_dim", "columns", world) for world in (2, 3, 4)),
    *(("in_turn", "columns", world) for world in (2, 3, 4)),
    ("replicated", "columns", 2),
    ("twice_dim_0", "columns", 4),
    ("rows_and_columns", "columns", 4),
]


@functools.cache
def alone(model: str, form: str, backend: str, dtype: torch.dtype, forward: bool) -> Run:
    return train(None, KINDS[model], form, backend, dtype, forward)


def trains(sharding: str, model: str, form: str, backend: str, dtype: torch.dtype) -> Run:
    return train(sharding, KINDS[model], form, backend, dtype, sharding in WITH_FORWARD)


def check(sharding: str, model: str, world: int, form: str, backend: str, dtype: torch.dtype = F64) -> None:
    ranks = run(world, trains, sharding, model, form, backend, dtype)
    truth = alone(model, form, backend, dtype, sharding in WITH_FORWARD)
    for found in ranks:
        assert_close(found.numbers, truth.numbers, TOLERANCE[dtype])
        assert_same_bits(found.state, ranks[0].state)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "model", "world"), CASES, ids=str)
def test_as_unsharded(sharding: str, model: str, world: int) -> None:
    check(sharding, model, world, "accumulate", BACKENDS[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ("loss", "attach"))
@pytest.mark.parametrize(
    ("sharding", "model", "world"),
    [("fsdp", "rows", 3), ("kept", "rows", 2), ("fsdp_and_tensor_parallel", "feedforward", 4), ("dim_1", "columns", 3)],
    ids=str,
)
def test_other_forms(sharding: str, model: str, world: int, form: str) -> None:
    check(sharding, model, world, form, BACKENDS[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("sharding", "model", "world"),
    [("fsdp", "rows", 4), ("in_turn", "columns", 3), ("rows_and_columns", "columns", 4)],
    ids=str,
)
def test_reference(sharding: str, model: str, world: int, form: str) -> None:
    check(sharding, model, world, form, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "tensor_parallel"])
def test_interpreted(sharding: str) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or available()["triton"] is not None:
        pytest.skip("needs triton and TRITON_INTERPRET=1")
    check(sharding, "feedforward", 2, "accumulate", "triton", F32)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(backend: str) -> None:
    check("fsdp", "rows", 3, "accumulate", backend, F32)
    check("in_turn", "columns", 4, "loss", backend, F32)
