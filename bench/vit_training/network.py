"""The ViT: timm's or the reference trainer's, compiled block by block, sharded or replicated."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench.vit_training.options import SIZES, Options
from bench.vit_training.processes import Processes
from spectral_ops import Rule
from spectral_ops.continual.models import build_model
from spectral_ops.continual.models.vit import LARGE_PATCH, PATCHES


@dataclass
class Network:
    """Args: module, whole or its shards; blocks, of which each is compiled and sharded by itself; rules for what
    SpectralRegularizer cannot know of it; origin, whose it is. `forward`: images to scores, once `place` was called."""

    module: nn.Module
    blocks: list[nn.Module]
    rules: dict[Any, Rule]
    origin: str
    forward: Callable[[Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.forward = self.module


def patch_of(options: Options) -> int:
    """Side of a patch."""
    own = next((patch for limit, patch in PATCHES if options.side <= limit), LARGE_PATCH)
    patch = options.patch or own
    if options.side % patch:
        raise ValueError(f"train_vit: expected --patch to divide the image, {options.side}, got {patch}. Set --patch.")
    return patch


def build(options: Options, classes: int, processes: Processes) -> Network:
    """The whole network in float32, with the same weights in every process.

    Raises:
        ValueError: timm is asked for and not installed, or sizes that cannot be.
    """
    origin = options.implementation
    if origin == "auto":
        origin = "timm" if importlib.util.find_spec("timm") else "reference"
    width, depth, heads = SIZES[options.model]
    devices = [processes.device] if processes.kind == "cuda" else []
    with torch.random.fork_rng(devices), processes.device:
        torch.manual_seed(options.seed)
        if origin == "reference":
            module: nn.Module = build_model(
                "vit-tiny", (3, options.side, options.side), classes,
                patch=patch_of(options), depth=depth, width=width, heads=heads,
            )  # fmt: skip
            return Network(module, list(module.blocks.children()), {}, origin)  # type: ignore[union-attr]
        try:
            timm = importlib.import_module("timm.models.vision_transformer")
        except ImportError as error:
            raise ValueError(
                f"train_vit: expected timm for --implementation timm, got {error}. Install it, or leave the option out."
            ) from error
        module = timm.VisionTransformer(
            img_size=options.side, patch_size=patch_of(options), num_classes=classes, embed_dim=width, depth=depth,
            num_heads=heads,
        )  # fmt: skip
    # A Linear called qkv is three matrices.
    return Network(module, list(module.blocks.children()), {"*.qkv.weight": Rule(split=(3, 0))}, origin)


def place(network: Network, options: Options, processes: Processes) -> None:
    """Compiles, shards and sets `forward`; names of modules and parameters stay."""
    if options.compile:
        for block in network.blocks:
            # The method, not the module: FSDP's hooks stay outside, and what is inside is one graph for all blocks.
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    kind, half = shard_of(options, processes), options.precision == "bf16"
    if kind in ("fsdp", "hsdp"):
        # Weights are gathered and multiplied in bfloat16; gradients are summed, and the optimizer steps, in float32.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        replicas = None if kind == "fsdp" else options.replicas or processes.world // processes.local_world
        mesh = processes.mesh(replicas)
        for block in network.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network.module, mesh=mesh, mp_policy=policy)
        network.forward = network.module
        return
    wrapped = DistributedDataParallel(network.module) if kind == "ddp" else network.module

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(processes.kind, torch.bfloat16) if half else nullcontext():
            return wrapped(images)

    network.forward = forward


def shard_of(options: Options, processes: Processes) -> str:
    """How the model lies on the processes.

    Raises:
        ValueError: several processes and none, which would train apart.
    """
    kind = options.shard or ("fsdp" if processes.world > 1 else "none")
    if kind == "none" and processes.world > 1:
        raise ValueError(
            f"train_vit: expected one process for --shard none, got {processes.world}. Use fsdp, hsdp or ddp."
        )
    return kind
