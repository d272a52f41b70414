"""The state of a sharded model's regularizer: the same whole tensors on any number of ranks; and models that change."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import F32, F64, svd
from regularizer_truth import assert_close, assert_same_bits
from sharding_models import (
    SHARDINGS,
    Columns,
    Rows,
    make,
    regularizer,
    state_of,
    wholes,
)
from sharding_run import run
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer

pytestmark = pytest.mark.slow


def sharded(sharding: str, kind: type[nn.Module], dtype: torch.dtype = F32) -> tuple[Any, SpectralRegularizer]:
    model = make(kind, dtype)
    SHARDINGS[sharding](model)
    return model, regularizer(model)


# ---- the start ----


def started(sharding: str, kind: type[nn.Module], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    _, reg = sharded(sharding, kind, dtype)
    return reg.sigmas(), state_of(reg)


@pytest.mark.parametrize(
    ("sharding", "kind", "world"), [("fsdp", Rows, 4), ("in_turn", Columns, 3), ("rows_and_columns", Columns, 4)]
)
def test_start_is_converged(sharding: str, kind: Any, world: int) -> None:
    expected = {}
    for name, p in make(kind, F64).named_parameters():
        entry = next(e for e in regularizer(make(kind, F64)).entries if e.name == name)
        if entry.layout is not None and entry.layout.is_matrix:
            from spectral_ops.ops.layout import as_matrices

            stack = as_matrices(p.detach(), entry.layout)
            expected[name] = torch.tensor([svd(w.flatten(1)).sigma for w in stack], dtype=F64)
    ranks = run(world, started, sharding, kind, F64)
    for sigmas, state in ranks:
        assert_close(sigmas, expected, 1e-5)  # START_TOL
        assert_same_bits(state, ranks[0][1])


# ---- saving, loading, copying ----


def saved(folder: str) -> dict[str, Tensor]:
    model, reg = sharded("first_dim", Columns)
    for _ in range(2):
        _pull(model, reg)
    dcp.save({"reg": reg.state_dict()}, checkpoint_id=folder)
    return state_of(reg)


def _pull(model: nn.Module, reg: SpectralRegularizer) -> None:
    model.zero_grad()
    reg.accumulate_grad_()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01 * p.grad) if p.grad is not None else None


def loaded(folder: str, sharding: str) -> dict[str, Tensor]:
    _, reg = sharded(sharding, Columns)
    pointers = [x.data_ptr() for x in _buffers(reg)]
    state = reg.state_dict()
    dcp.load({"reg": state}, checkpoint_id=folder)
    reg.load_state_dict(state)
    assert pointers == [x.data_ptr() for x in _buffers(reg)]  # in place
    return state_of(reg)


def _buffers(reg: SpectralRegularizer) -> list[Tensor]:
    return [group.v for group in reg._groups]


def test_checkpoint_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    written = run(3, saved, str(tmp_path))
    for found in run(2, loaded, str(tmp_path), "dim_1") + run(4, loaded, str(tmp_path), "rows_and_columns"):
        assert_same_bits(found, written[0])
    reg = regularizer(make(Columns, F32))  # unsharded, and without a process group
    state = reg.state_dict()
    dcp.load({"reg": state}, checkpoint_id=str(tmp_path), no_dist=True)
    reg.load_state_dict(state)
    assert_same_bits(state_of(reg), written[0])
    for found in run(2, takes_over, state):
        assert_same_bits(found, written[0])


def takes_over(state: Any) -> dict[str, Tensor]:
    _, reg = sharded("first_dim", Columns)
    reg.load_state_dict(state)
    return state_of(reg)


def bad_states() -> list[str]:
    _, reg = sharded("first_dim", Columns)
    before, texts = state_of(reg), []
    for key in ("v", "sigma"):
        state = reg.state_dict()
        state[key]["packed"] = state[key]["packed"][:2]
        try:
            reg.load_state_dict(state)
        except ValueError as refused:
            texts.append(str(refused))
    assert_same_bits(before, state_of(reg))
    return texts


def test_bad_state() -> None:
    for texts in run(2, bad_states):
        assert ["state['v']['packed'] of shape" in texts[0], "state['sigma']['packed'] of shape" in texts[1]] == [
            True
        ] * 2


def copied(how: str) -> None:
    model, reg = sharded("dim_1", Columns)  # torch pickles no model of parallelize_module or fully_shard
    _pull(model, reg)
    model.zero_grad()
    if how == "deepcopy":
        other, copy_ = copy.deepcopy((model, reg))
    else:
        file = io.BytesIO()
        torch.save((model, reg), file)
        file.seek(0)
        other, copy_ = torch.load(file, weights_only=False)
    assert_same_bits(state_of(copy_), state_of(reg))
    for one, two in ((model, reg), (other, copy_)):
        _pull(one, two)
    assert_same_bits(state_of(copy_), state_of(reg))
    assert_same_bits(wholes(other), wholes(model))
    assert not torch.equal(wholes(model)["data of packed"], make(Columns, F32).packed)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str) -> None:
    run(2, copied, how)


def shown() -> tuple[str, dict[str, Tensor]]:
    _, reg = sharded("fsdp", Rows)
    reg.accumulate_grad_()
    return str(reg), reg.sigmas()


def test_shown() -> None:
    (text, sigmas), (other, _) = run(2, shown)
    assert text == other
    alone = regularizer(make(Rows, F32))
    alone.accumulate_grad_()
    assert text.splitlines()[1:3] == str(alone).splitlines()[1:3]
    assert [line.split()[:4] for line in text.splitlines()] == [line.split()[:4] for line in str(alone).splitlines()]
    assert_close(sigmas, alone.sigmas(), 1e-5)
    assert {name: x.shape for name, x in sigmas.items()} == {name: x.shape for name, x in alone.sigmas().items()}
