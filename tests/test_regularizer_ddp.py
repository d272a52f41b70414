"""SpectralRegularizer under DistributedDataParallel: two gloo processes agree with each other and with one alone."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import gaussian
from regularizer_truth import Mlp, assert_close, assert_same_bits, bits, weights
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer, available, use_backend

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo, which this build lacks", allow_module_level=True)

WORLD = 2
STEPS = 4
# The penalty in the loss; added after backward, that is after the all-reduce; by the optimizer; and in the loss of the
# last of two micro-steps, the first of which is not reduced.
FORMS = ("loss", "accumulate", "attach", "no_sync")
Found = dict[tuple[str, str], dict[str, Tensor]]
BACKENDS = [name for name in ("reference", "native") if available()[name] is None]


def train(form: str, backend: str, rank: int, world: int) -> dict[str, Tensor]:
    """Weights and state after some steps on this rank's share of each batch."""
    torch.manual_seed(0)
    model = Mlp()
    whole: nn.Module = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with use_backend(backend):  # type: ignore[arg-type]
        reg = SpectralRegularizer(model, strength=0.3)
        if form == "attach":
            reg.attach(optimizer)
        for step in range(STEPS):
            x = gaussian(f"ddp{step}", 8, 6).float().chunk(world)[rank]
            optimizer.zero_grad()
            if form == "no_sync":
                with whole.no_sync() if world > 1 else nullcontext():
                    (whole(x[::2]).square().mean() / 2).backward()
                loss = whole(x[1::2]).square().mean() / 2
            else:
                loss = whole(x).square().mean()
            (loss + reg() if form in ("loss", "no_sync") else loss).backward()
            if form == "accumulate":
                reg.accumulate_grad_()
            optimizer.step()
        return {**weights(model), **bits(reg)}


class PartlyUsed(Mlp):
    """Its first layer takes no part in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(x)))


def gradient_of_unused(form: str, **arguments: bool) -> Tensor | None:
    """Of the layer that only the penalty reaches, after two steps."""
    torch.manual_seed(0)
    model = PartlyUsed()
    whole = nn.parallel.DistributedDataParallel(model, **arguments)
    reg = SpectralRegularizer(model, strength=0.3)
    for _ in range(2):
        model.zero_grad()
        loss = whole(torch.ones(2, 8)).square().mean()
        (loss + reg() if form == "loss" else loss).backward()
        if form == "accumulate":
            reg.accumulate_grad_()
    return model.first.weight.grad


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        found: Found = {(form, backend): train(form, backend, rank, WORLD) for form in FORMS for backend in BACKENDS}
        unused = {
            # The penalty makes it a part of the loss, for which plain DDP waits; the form that is no part of the loss
            # wants find_unused_parameters, with which torch refuses the other one.
            "loss": gradient_of_unused("loss"),
            "accumulate": gradient_of_unused("accumulate", find_unused_parameters=True),
        }
        found["unused", ""] = {name: g for name, g in unused.items() if g is not None}
        torch.save(found, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder: Path = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_ddp(form: str, backend: str, ranks: list[Found]) -> None:
    first, second = (found[form, backend] for found in ranks)
    assert_same_bits(first, second)
    alone = train(form, backend, 0, 1)
    # The mean of two means of four is the mean of eight but for rounding; measured 2e-7 after four steps.
    continuous = {name: x for name, x in alone.items() if x.is_floating_point()}
    assert_close({name: first[name] for name in continuous}, continuous, 1e-5)
    without = train_without_penalty()
    assert not torch.allclose(without["first.weight"], alone["first.weight"], rtol=0.01)  # the penalty is seen


@pytest.mark.slow
def test_layer_that_the_forward_pass_does_not_use(ranks: list[Found]) -> None:
    torch.manual_seed(0)
    model = PartlyUsed()
    SpectralRegularizer(model, strength=0.3)().backward()
    expected = {"loss": model.first.weight.grad, "accumulate": model.first.weight.grad}
    for found in ranks:
        assert_close(found["unused", ""], expected, 1e-5)  # type: ignore[arg-type]  # one warm step apart


def train_without_penalty() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(gaussian(f"ddp{step}", 8, 6).float()).square().mean().backward()
        optimizer.step()
    return weights(model)
