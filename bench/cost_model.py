"""What a step must take, from bytes, launches and one all-reduce: a prediction that is made without measuring ours.

    seconds = launches + bytes of one rank / rate of its memory + all-reduce

Rates are those of plain passes over one model's memory on the device (the floor), not of our kernels: where these fall
short of it the prediction is too low, and by how much is what a measurement beside it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bench.vit_shapes import ViT

# What is predicted, by the names the tables show.
VALUE, GRADIENT, OURS, TORCH = "value", "with gradient", "SpectralAdamW", "AdamW"
OPS = (VALUE, GRADIENT, OURS, TORCH)

ITEM = {"float32": 4, "bfloat16": 2}
MOMENT = 4  # ours are float32 for every dtype of weights; torch's have the weights' dtype

# The flat buffer of a step on sharded weights: z and, at most, two sums of every part, in float64
# (spectral_ops/sharding/read.py sends one).
REDUCED_ITEM, REDUCED_SUMS = 8, 2

# torch's fused AdamW: 320 blocks of 65,536 elements a launch, and one for the step counts (aten, multi_tensor_apply
# and FusedAdam; the H200's profiles show 6 launches for ViT-B and 16 for ViT-L).
TORCH_LAUNCH_ELEMENTS = 320 * 65536


@dataclass(frozen=True)
class Memory:
    """Of one device.

    Args:
        rates: bytes a second by op, reads and writes both counted; an optimizer step's, under `OURS`, is torch's too.
            One for each, since what a device takes for a byte depends on the mix of reads and writes.
        launch_s: of each launch.
        pass_s: beginning and end of each pass over the model.
    """

    rates: Mapping[str, float]
    launch_s: float
    pass_s: float


@dataclass(frozen=True)
class Network:
    """Of nodes with `per_node` devices, each with a network card of its own.

    Args:
        node_rate, network_rate: bytes a second of one device in each direction, within a node and between nodes.
        base_s, node_s, network_s: latency of a collective, of a hop within a node, of a hop between nodes.
    """

    per_node: int
    node_rate: float
    network_rate: float
    base_s: float
    node_s: float
    network_s: float


# The floors of ViT-L in float32 less launch and measurement: what `memory_from_floors` makes of
# bench/results/nvidia-h200-2026-11-28-steps.json (a test). A launch replayed from a graph, and fill and chain of a
# pass: docs/performance.md, "The model behind the predictions".
H200_MEMORY = Memory({VALUE: 4.17e12, GRADIENT: 3.99e12, OURS: 3.90e12}, launch_s=2e-6, pass_s=8e-6)
# What the two events of a measurement add to what lies between them, in the floor's time as in ours: the same page.
CUDA_MEASURING_S = 25e-6
# Python and dispatch of a call (bench/results/amd-epyc-2-cores-2026-11-25-penalty.md), and no launches.
CPU_PASS_S = 2e-5

# NVLink 4 is 450 GB/s in each direction, of which NCCL reaches 370 (NVIDIA/nccl-tests issue 212, a maintainer's word).
# NDR InfiniBand is 400 Gbit/s a card, 50 GB/s, of which the same share is taken: an assumption. Latencies: NCCL's own
# model of a tree with LL128 (NVIDIA/nccl, src/graph/tuning.cc: baseLat, hwLat), as in `all_reduce_seconds`.
H200_NETWORK = Network(
    per_node=8, node_rate=370e9, network_rate=41e9, base_s=4.4e-6, node_s=1.2e-6, network_s=8.5e-6
)

# Dense bfloat16 of an H200 and an H100 alike (NVIDIA's data sheets).
H200_FLOPS = 989e12
H200_BYTES = 141e9  # the same sheet
# Of these a training step reaches: an assumption. ViT-B took 93.5 ms for 256 images, 29 % (training_step/vit-b in
# ...-28-steps.json); better code makes the step shorter and the penalty's share larger, so half is the careful figure.
UTILISATION = 0.5
# Of one rank and step: an assumption. ViT-22B was trained with a batch of 65k on 1,024 chips (Dehghani et al. 2023).
IMAGES_PER_RANK = 64


def moved_bytes(op: str, parameters: int, dtype: str) -> int:
    """Least work of an op on so many parameters, gradients of their dtype: reads and writes both counted.

    Raises:
        ValueError: no such op or dtype.
    """
    if op not in OPS:
        raise ValueError(f"moved_bytes: expected op to be one of {', '.join(OPS)}, got {op!r}. Name one of these.")
    if dtype not in ITEM:
        known = ", ".join(ITEM)
        raise ValueError(f"moved_bytes: expected dtype to be one of {known}, got {dtype!r}. Name one of these.")
    item = ITEM[dtype]
    moment = MOMENT if op == OURS else item
    # The weight read; the gradient read and written; the gradient read, weight and both moments read and written.
    each = {VALUE: item, GRADIENT: item + 2 * item}.get(op, item + 2 * item + 4 * moment)
    return each * parameters


def held_bytes(op: str, parameters: int, dtype: str) -> int:
    """Memory of weights, gradients and moments that an op works on; vectors are next to nothing beside them."""
    item = ITEM[dtype]
    each = {VALUE: item, GRADIENT: 2 * item, OURS: 2 * item + 2 * MOMENT, TORCH: 4 * item}
    return each[op] * parameters


def check_ranks(ranks: int, per_node: int) -> None:
    """ValueError unless they are one node or less, or whole nodes."""
    if ranks < 1:
        raise ValueError(f"check_ranks: expected ranks to be at least 1, got {ranks}. Use 1 for a single device.")
    if ranks > per_node and ranks % per_node:
        raise ValueError(
            f"check_ranks: expected ranks to be at most {per_node} or a multiple of it, got {ranks}. "
            f"Use whole nodes, such as {per_node * math.ceil(ranks / per_node)}."
        )


def collective_bytes(shape: ViT) -> int:
    """Of the one all-reduce of a step, for all layers."""
    return REDUCED_ITEM * (shape.columns + REDUCED_SUMS * len(shape.parts) * shape.depth)


def all_reduce_seconds(size: float, ranks: int, network: Network) -> float:
    """Of `size` bytes on every rank: reduce-scatter in the node, all-reduce of a share between nodes, all-gather.

    The bytes of a ring at each level, 2 (k - 1) / k of what it holds, and the latency of a tree between nodes.

    Raises:
        ValueError: see `check_ranks`.
    """
    check_ranks(ranks, network.per_node)
    if ranks == 1:
        return 0.0
    local = min(ranks, network.per_node)
    nodes = ranks // local
    moved = 2 * (local - 1) / local * size / network.node_rate
    moved += 2 * (nodes - 1) / nodes * size / local / network.network_rate
    hops = (local - 1) * network.node_s + math.ceil(math.log2(nodes)) * network.network_s
    return network.base_s + 2 * hops + moved


def launches(op: str, parameters: int, ranks: int = 1) -> int:
    """Of one rank. Ours is one; on sharded weights another one follows the all-reduce."""
    if op == TORCH:
        return math.ceil(parameters / ranks / TORCH_LAUNCH_ELEMENTS) + 1
    return 1 if ranks == 1 else 2


def pass_seconds(op: str, parameters: int, dtype: str, memory: Memory, ranks: int = 1) -> float:
    """Of launches and memory, on one of the ranks that share the rows out.

    Raises:
        ValueError: see `moved_bytes`.
    """
    moved = moved_bytes(op, parameters, dtype) / ranks
    started = launches(op, parameters, ranks)
    passes = 1 if op == TORCH else started
    return started * memory.launch_s + passes * memory.pass_s + moved / memory.rates[OURS if op == TORCH else op]


def step_seconds(
    op: str, shape: ViT, dtype: str, memory: Memory, ranks: int = 1, network: Network | None = None
) -> float:
    """Of an op on a model whose rows are shared out over so many ranks; without a network, on one.

    Raises:
        ValueError: see `moved_bytes` and `check_ranks`; several ranks without a network.
    """
    collective = 0.0
    if network is not None:
        check_ranks(ranks, network.per_node)
        collective = 0.0 if op == TORCH else all_reduce_seconds(collective_bytes(shape), ranks, network)
    elif ranks != 1:
        raise ValueError(f"step_seconds: expected ranks to be 1 without a network, got {ranks}. Give a Network.")
    return pass_seconds(op, shape.parameters, dtype, memory, ranks) + collective


def training_seconds(
    shape: ViT, images: int = IMAGES_PER_RANK, flops: float = H200_FLOPS, utilisation: float = UTILISATION
) -> float:
    """Of forward and backward of a rank's own images, whatever is exchanged hidden behind them: assumed, not measured.

    The rank count does not enter: each rank computes the whole model on images of its own.
    """
    return images * shape.flops_per_image / (flops * utilisation)


def added_seconds(
    op: str, shape: ViT, dtype: str, memory: Memory, ranks: int = 1, network: Network | None = None
) -> float:
    """What the penalty adds to a step: its own pass, or what SpectralAdamW takes beyond AdamW, 0 where that is less."""
    seconds = step_seconds(op, shape, dtype, memory, ranks, network)
    if op != OURS:
        return seconds
    return max(0.0, seconds - step_seconds(TORCH, shape, dtype, memory, ranks, network))


def memory_from_floors(
    floors: Mapping[str, tuple[float, float]], *, launch_s: float, pass_s: float, measuring_s: float = 0.0
) -> Memory:
    """The rates that measured floors show.

    Args:
        floors: by op, its bytes and the seconds of a plain pass over the same memory.
        launch_s, pass_s: as in `Memory`; a floor takes one launch.
        measuring_s: what measuring adds to each.

    Raises:
        ValueError: a time that leaves nothing for the bytes.
    """
    rates = {}
    for op, (size, seconds) in floors.items():
        left = seconds - measuring_s - launch_s
        if not left > 0:
            raise ValueError(
                f"memory_from_floors: expected the floor of {op!r} to take longer than a launch and its measurement, "
                f"got {seconds:g} s. Measure a larger model."
            )
        rates[op] = size / left
    return Memory(rates, launch_s, pass_s)
