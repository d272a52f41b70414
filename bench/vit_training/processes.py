"""The processes that train together: torchrun's, or this one alone; the few collectives that the loop needs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bench.vit_training.options import Options

# A thread of gloo's frees the last collective's tensor, for which it waits for the interpreter, up to 5 ms while the
# main thread runs. An interpreter that ends meanwhile aborts (torch 2.13; 7 of 17 runs on two cores).
GIL_S = 0.2


@dataclass(frozen=True)
class Processes:
    """Args: kind of device; rank, of world processes; local_world of them on this machine."""

    kind: str
    rank: int
    world: int
    local_world: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, torch.cuda.current_device()) if self.kind == "cuda" else torch.device("cpu")

    def mesh(self, replicas: int | None) -> DeviceMesh:
        """(world,) to shard over, or with replicas (replicas, world / replicas), sharded within a replica."""
        if replicas is None:
            return init_device_mesh(self.kind, (self.world,), mesh_dim_names=("shard",))
        if self.world % replicas:
            raise ValueError(
                f"train_vit: expected --replicas to divide the {self.world} processes, got {replicas}. Change it."
            )
        return init_device_mesh(
            self.kind, (replicas, self.world // replicas), mesh_dim_names=("replicate", "shard")
        )

    def mean(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM) / self.world

    def largest(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.to(self.device, copy=True)
        if dist.is_initialized():
            dist.all_reduce(x, op)
        return x

    def barrier(self) -> None:
        if dist.is_initialized():
            self._reduce(torch.zeros(1), dist.ReduceOp.SUM).sum().item()  # a host's wait on CUDA, too


@contextmanager
def processes(options: Options) -> Iterator[Processes]:
    """Joins the others and, at the end, leaves.

    Raises:
        ValueError: CUDA is asked for and there is none; or sharding, by a process that torchrun did not start.
    """
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("train_vit: expected a CUDA device, got none that torch can use. Use --device cpu.")
    rank, world, local_rank, local_world = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    grouped = "RANK" in os.environ
    if not grouped and options.shard not in (None, "none"):
        raise ValueError(
            f"train_vit: expected torchrun for --shard {options.shard}, got one process without it. "
            "Start it with torchrun --nproc-per-node N bench/train_vit.py."
        )
    if grouped:
        # gloo beside nccl: torch.distributed.checkpoint plans with objects on the CPU.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=options.timeout))
    try:
        yield Processes(kind, rank, world, local_world)
        if grouped:  # not after an error, which others may not have had: they would be waited for
            dist.destroy_process_group()
    finally:
        if grouped:
            time.sleep(GIL_S)
