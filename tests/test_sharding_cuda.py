"""Sharded weights on a device: the Triton sums against plain torch, and FSDP2 on one rank against no sharding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from regularizer_truth import Mlp, weights
from sharded_ranks import rank, start, step, zoo
from torch import Tensor, nn

from spectral_ops import SpectralAdamW, SpectralRegularizer, use_backend

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

STEPS = 5


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("exponent", [2.0, 3.0])
@pytest.mark.parametrize("count", [1, 3])
def test_sums_of_ranks_are_those_of_plain_torch(count: int, exponent: float) -> None:
    on_cpu, layouts = zoo()
    on_cpu.pop("large")
    on_device = {name: w.cuda() for name, w in on_cpu.items()}
    ranks = [rank(on_device, layouts, i / count, (i + 1) / count) for i in range(count)]
    first = start(ranks[0].reader, torch.float32)
    found = {}
    for backend in ("reference", "triton"):
        with use_backend(backend):  # type: ignore[arg-type]
            value, state, us = step(ranks, first, exponent)
        found[backend] = [value.double(), state.v, state.sigma, *us]
    for a, b in zip(found["triton"], found["reference"], strict=True):
        # Both read in float32, each in its own order: y and z are rounded to some 2^-24.
        assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}


def train(model: nn.Module, form: str) -> tuple[dict[str, Tensor], Tensor]:
    if form == "SpectralAdamW":
        optimizer: torch.optim.Optimizer = SpectralAdamW(model.parameters(), lr=0.01, model=model, strength=0.3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        reg = SpectralRegularizer(model, strength=0.3)
    value = torch.zeros(())
    for i in range(STEPS):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i)).cuda()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if form == "loss":
            value = reg()
            loss = loss + value
        loss.backward()
        if form == "accumulate":
            value = reg.accumulate_grad_()
        optimizer.step()
        if isinstance(optimizer, SpectralAdamW):
            assert optimizer.penalty is not None
            value = optimizer.penalty
    return whole(model), value


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("form", ["loss", "accumulate", "SpectralAdamW"])
def test_fsdp_on_one_rank(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mlp().cuda()
    state = {name: w.clone() for name, w in weights(model).items()}
    expected, value = train(model, form)
    other = Mlp().cuda()
    other.load_state_dict(state)
    found, other_value = train(sharded(other), form)
    for name, w in expected.items():
        # Both are float32 steps, each rounded on its own way; measured on the CPU 2e-7 after five.
        assert torch.allclose(found[name], w, rtol=1e-4, atol=1e-5), name
    assert torch.allclose(other_value, value, rtol=1e-4)
