"""Models with every kind of sharded layer, the ways to shard them, and short trainings to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from helpers import gaussian
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from spectral_ops import SpectralRegularizer, use_backend
from spectral_ops.rules import Rule

FORMS = ("loss", "accumulate", "attach")
STEPS = 3


class Rows(nn.Module):
    """Shard(0) cuts rows of all of its matrices, or whole ones, and leaves some ranks with nothing."""

    rules: dict[str, Rule | str] = {"gates.weight": Rule(split=(2, 0)), "experts": "matrices"}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 10)
        self.norm = nn.LayerNorm(10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)  # 30 rows: parts straddle 2 and 4 ranks
        self.gates = nn.Linear(10, 14)  # two parts of seven rows: they straddle 3 ranks, and 4
        self.experts = nn.Parameter(torch.empty(3, 4, 7))  # a fourth rank has none
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.last = nn.Linear(6, 1)  # a row for the first rank alone

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, 7)
        h = self.norm(self.first(x))
        h = self.attention(h, h, h)[0]
        a, b = self.gates(h).chunk(2, dim=-1)
        h = torch.einsum("sij,btj->bti", self.experts, torch.sigmoid(a) * b)
        return self.last(torch.tanh(self.conv(h.transpose(1, 2)).transpose(1, 2)))


class Columns(Rows):
    """Shard(0) cuts columns of some."""

    rules = {**Rows.rules, "packed": Rule(split=(3, 1), row_dim=1)}

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.ConvTranspose1d(6, 4, 3, groups=2)  # three columns of channels in each group
        self.packed = nn.Parameter(torch.empty(6, 15))  # as GPT-2's Conv1D: (in, 3 * out)


class Feedforward(nn.Module):
    """What tensor parallelism shards: up by rows, down by columns."""

    rules: dict[str, Rule | str] = {}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        return self.last(h + self.down(torch.tanh(self.up(h))))


def make(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    model = kind()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.6 * gaussian(name, *p.shape) / max(1, p.ndim - 1))
    return model.to(dtype)


# ---- ways to shard; every rank calls them ----


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """-1: all ranks that the other dimensions leave."""
    world = torch.distributed.get_world_size()
    rest = world // -int(torch.tensor(shape).prod())
    return init_device_mesh("cpu", tuple(rest if n == -1 else n for n in shape), mesh_dim_names=names)


def fsdp(model: nn.Module, **options: Any) -> None:
    options = {"mesh": mesh(-1)} | options
    for name, child in model.named_children():
        if name in ("attention", "up"):
            fully_shard(child, **options)
    fully_shard(model, **options)


def kept(model: nn.Module) -> None:
    fsdp(model, reshard_after_forward=False)


def hsdp(model: nn.Module) -> None:
    fsdp(model, mesh=mesh(2, -1, names=("replicas", "shards")))


def tensor_parallel(model: nn.Module, on: DeviceMesh | None = None) -> None:
    parallelize_module(model, on or mesh(-1), {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fsdp_and_tensor_parallel(model: nn.Module) -> None:
    whole = mesh(2, -1, names=("data", "tensor"))
    tensor_parallel(model, whole["tensor"])
    fsdp(model, mesh=whole["data"])


def hsdp_and_tensor_parallel(model: nn.Module) -> None:
    """Of eight ranks two replicas; of four, one."""
    replicas = torch.distributed.get_world_size() // 4
    whole = mesh(replicas, 2, -1, names=("replicas", "data", "tensor"))
    tensor_parallel(model, whole["tensor"])
    fsdp(model, mesh=whole["replicas", "data"])


Place = Callable[[str, nn.Parameter, int], list[Any]]


def place(model: nn.Module, on: DeviceMesh, placements: Place) -> None:
    """Every parameter by distribute_tensor; such a model is only trained by `drift`."""
    for i, (name, p) in enumerate(list(model.named_parameters())):
        owner, _, attribute = name.rpartition(".")
        placed = distribute_tensor(p.detach(), on, placements(name, p, i))
        setattr(model.get_submodule(owner), attribute, nn.Parameter(placed))


def _last(name: str, p: nn.Parameter, i: int) -> list[Any]:
    return [Shard(p.ndim - 1)]


def _in_turn(name: str, p: nn.Parameter, i: int) -> list[Any]:
    """Every dimension is cut in one parameter or another, and some are whole."""
    return [Replicate() if i % 4 == 3 else Shard(i % p.ndim)]


def _rows_and_columns(name: str, p: nn.Parameter, i: int) -> list[Any]:
    """Rows along the first dimension of the mesh, columns along the second, as in the layout of the parameter."""
    if p.ndim == 1:
        return [Shard(0), Replicate()] if i % 2 else [Replicate(), Shard(0)]
    rows = 1 if name in ("packed", "experts", "transposed.weight") else 0
    return [Shard(rows), Shard(p.ndim - 1 if rows == 0 or name == "experts" else 0)]


# These can run the model.
WITH_FORWARD = ("fsdp", "kept", "hsdp", "tensor_parallel", "fsdp_and_tensor_parallel", "hsdp_and_tensor_parallel")
SHARDINGS: dict[str, Callable[[nn.Module], None]] = {
    "fsdp": fsdp,
    "kept": kept,
    "hsdp": hsdp,
    "tensor_parallel": tensor_parallel,
    "fsdp_and_tensor_parallel": fsdp_and_tensor_parallel,
    "hsdp_and_tensor_parallel": hsdp_and_tensor_parallel,
    "first_dim": lambda model: place(model, mesh(-1), lambda name, p, i: [Shard(0)]),
    "dim_1": lambda model: place(model, mesh(-1), lambda name, p, i: [Shard(min(1, p.ndim - 1))]),
    "last_dim": lambda model: place(model, mesh(-1), _last),
    "in_turn": lambda model: place(model, mesh(-1), _in_turn),
    "replicated": lambda model: place(model, mesh(-1), lambda name, p, i: [Replicate()]),
    "twice_dim_0": lambda model: place(model, mesh(2, -1), lambda name, p, i: [Shard(0), Shard(0)]),
    "rows_and_columns": lambda model: place(model, mesh(2, -1), _rows_and_columns),
}


# ---- training ----


class Run(NamedTuple):
    """What a training left, whole tensors: all in `numbers` is compared within a tolerance."""

    numbers: dict[str, Tensor]
    state: dict[str, Tensor]
    collectives: list[int]  # of every step of the penalty alone; empty where it is a part of others


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def wholes(model: nn.Module, what: str = "data") -> dict[str, Tensor]:
    found = {name: p if what == "data" else p.grad for name, p in model.named_parameters()}
    return {f"{what} of {name}": whole(x) for name, x in found.items() if x is not None}


def like(p: Tensor, x: Tensor) -> Tensor:
    """x sharded as p."""
    x = x.to(p.dtype)
    return distribute_tensor(x, p.device_mesh, p.placements) if isinstance(p, DTensor) else x


def regularizer(model: Any) -> SpectralRegularizer:
    return SpectralRegularizer(model, strength=0.3, rules=model.rules)


def state_of(reg: SpectralRegularizer) -> dict[str, Tensor]:
    return {f"{key} of {name}": x for key, entries in reg.state_dict().items() for name, x in entries.items()}


def load_gaussian(reg: SpectralRegularizer) -> None:
    """The same vectors whoever loads them: a step moves them visibly, and no start's tolerance is measured."""
    state = reg.state_dict()
    for name, v in state["v"].items():
        v.copy_(nn.functional.normalize(gaussian("v" + name, *v.shape), dim=1))
    reg.load_state_dict(state)


def train(
    sharding: str | None,
    kind: type[nn.Module],
    form: str,
    backend: str,
    dtype: torch.dtype,
    forward: bool,
    **arguments: Any,
) -> Run:
    """Of a loss of the model, or without its forward pass, with gradients out of thin air."""
    model = make(kind, dtype)
    if sharding is not None:
        SHARDINGS[sharding](model)
    # for each tensor apart: foreach refuses plain tensors and DTensors in one list
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, foreach=False)
    collectives, numbers = [], {}
    with use_backend("reference"):  # a start by interpreted kernels takes many seconds, and its vectors are not used
        reg = regularizer(model)
        load_gaussian(reg)
    with use_backend(backend):  # type: ignore[arg-type]
        handle = reg.attach(optimizer) if form == "attach" else None
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = _loss(model, step, dtype) if forward else _drift(model, step)
            if form == "loss":
                value = reg()
                (loss + value).backward()
            else:
                loss.backward() if forward else None
            if form == "accumulate":
                with CommDebugMode() as counter:
                    value = reg.accumulate_grad_()
                collectives.append(counter.get_total_counts())
            if form != "attach":
                numbers |= {f"{name}, step {step}": x for name, x in wholes(model, "grad").items()}
            optimizer.step()
            value = value if handle is None else handle.penalty  # type: ignore[assignment]
            numbers[f"penalty, step {step}"] = value.detach().clone()
            numbers |= {f"sigma of {name}, step {step}": x for name, x in reg.sigmas().items()}
    return Run(numbers | wholes(model), state_of(reg), collectives)


def _loss(model: nn.Module, step: int, dtype: torch.dtype) -> Tensor:
    return model(gaussian(f"x{step}", 3, 5, 7).to(dtype)).square().mean()


def _drift(model: nn.Module, step: int) -> Tensor:
    for name, p in model.named_parameters():
        if not name.startswith("norm"):  # these have no gradient before the penalty
            p.grad = like(p, 0.1 * gaussian(f"{name}{step}", *p.shape))
    return torch.zeros(())
