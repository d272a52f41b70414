"""A small network with its optimizer and a method, trained as the trainer does."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_ops.continual.methods import Context, Method, find_method
from spectral_ops.continual.models import build_model

SHAPE, CLASSES, BATCH = (1, 8, 8), 3, 12
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"hidden": (9, 7)}),
    "linear": ("mlp", {"hidden": ()}),
    "mlp-crelu-layer": ("mlp", {"hidden": (6, 5), "activation": "crelu", "norm": "layer"}),
    "conv": ("conv", {"channels": (4, 5), "hidden": (6,)}),
    "conv-crelu": ("conv", {"channels": (3, 4), "hidden": (6,), "activation": "crelu", "norm": "layer"}),
    "resnet18": ("resnet18", {"width": 2}),
    "vit-tiny": ("vit-tiny", {"depth": 2, "width": 8, "heads": 2}),
}
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """On tensors so small several threads only wait for each other, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Sample(NamedTuple):
    model: nn.Module
    optimizer: Optimizer
    method: Method
    context: Context

    @one_thread()
    def train(self, steps: Iterable[int], *, boundary: int | None = None) -> None:
        """Steps by their numbers, which decide their batches; before step `boundary` task 1 begins."""
        self.model.train()
        for step in steps:
            if step == boundary:
                self.method.on_task_boundary(1)
            x, y = batch(step, self.dtype)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            if (penalty := self.method.penalty()) is not None:
                penalty.backward()
            self.method.after_backward()
            self.optimizer.step()
            self.method.after_step()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def copy(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def saved(self) -> io.BytesIO:
        """All that resuming needs, as a checkpoint holds it."""
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "method": self.method}
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "generator": self.context.generator.get_state()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file, weights_only=True)
        for part, name in ((self.model, "model"), (self.optimizer, "optimizer"), (self.method, "method")):
            part.load_state_dict(state[name])
        self.context.generator.set_state(state["generator"])


@one_thread()
def make(
    method: str, model: str = "mlp", *, optimizer: str = "adam", dtype: torch.dtype = torch.float32, **options: Any
) -> Sample:
    kind = find_method(method)
    name, model_options = MODELS[model]

    def build(task: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + task)
            made = build_model(name, SHAPE, CLASSES, **model_options).to(dtype)
            kind.prepare(made)
        return made

    network = build(0)
    made = OPTIMIZERS[optimizer](network.parameters())
    generator = torch.Generator().manual_seed(5)
    context = Context(network, made, network.units(), network.output, generator, lambda task: build(task).state_dict())
    return Sample(network, made, kind(context, **options), context)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, *SHAPE, generator=generator)
    return x.to(dtype), torch.randint(CLASSES, (BATCH,), generator=generator)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def disturb(model: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Parameters away from where they began, so that nothing holds by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator).to(p)
