"""What this rank holds of a sharded parameter, and the ranks that sums are formed with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from spectral_ops.ops.dtensor import local_tensor
from spectral_ops.rules import expected

Ranks: TypeAlias = tuple[int, ...]

# The placements that a parameter can be read in; by name, for the strided one is not public.
SHARDS = ("Shard", "_StridedShard")


class MeshDim(NamedTuple):
    """One dimension of a mesh as this rank sees it. Equal ranks are the same dimension, of whatever mesh."""

    ranks: Ranks
    coordinate: int


class Block(NamedTuple):
    """What this rank holds of a parameter: elements [begin, end) of every dimension."""

    ranges: tuple[tuple[int, int], ...]
    cuts: dict[Ranks, int]  # dimension of the mesh that shards it: the dimension of the parameter that it cuts

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(end - begin for begin, end in self.ranges)


def mesh_dims(name: str, mesh: Any) -> list[MeshDim]:
    """Raises where this rank is not in the mesh, or its process groups are gone."""
    import torch.distributed as dist

    try:
        coordinates = mesh.get_coordinate()
        if coordinates is None:
            remedy = "Build the regularizer from the parameters that this rank trains"
            raise RuntimeError(expected(f"parameter {name!r} on a mesh with this rank in it", mesh, remedy))
        if not dist.is_initialized():
            raise ValueError("no default process group")
        groups = [mesh.get_group(i) for i in range(mesh.ndim)]
        every = [tuple(dist.get_process_group_ranks(group)) for group in groups]
    except (ValueError, KeyError, AssertionError, AttributeError, TypeError) as error:
        remedy = "Call init_process_group and shard the model again, or load its full weights into an unsharded model"
        got = f"{mesh} without them ({error})"
        raise RuntimeError(expected(f"process groups for the mesh of parameter {name!r}", got, remedy)) from error
    return [MeshDim(ranks, c) for ranks, c in zip(every, coordinates, strict=True)]


def block_of(name: str, p: Any) -> Block:
    """Raises, naming the parameter, for a placement that its matrices cannot be read in."""
    dims = mesh_dims(name, p.device_mesh)
    sharding: dict[int, list[MeshDim]] = {}  # of each dimension of the parameter, in the order of cutting
    cuts: dict[Ranks, int] = {}
    for dim, placement in reversed(list(zip(dims, p.placements, strict=True))):
        kind = type(placement).__name__
        if kind == "Replicate" or (kind in SHARDS and len(dim.ranks) == 1):
            continue
        if kind not in SHARDS:
            remedy = f"Redistribute it to Shard or Replicate, or leave it out with exclude={name!r}"
            raise RuntimeError(expected(f"parameter {name!r} sharded or replicated", tuple(p.placements), remedy))
        at = placement.dim % p.ndim
        order = sharding.setdefault(at, [])
        order.insert(_turn(order, getattr(placement, "split_factor", 1), name, p), dim)
        cuts[dim.ranks] = at
    ranges = []
    for at, size in enumerate(p.shape):
        begin, end = 0, size
        for dim in sharding.get(at, ()):
            step = -(-(end - begin) // len(dim.ranks))  # as torch.chunk
            begin, end = min(end, begin + dim.coordinate * step), min(end, begin + (dim.coordinate + 1) * step)
        ranges.append((begin, end))
    return Block(tuple(ranges), cuts)


def check_shards(names: Sequence[str], parameters: Sequence[Any], blocks: Sequence[Block], group: Any) -> None:
    """Raises for shards that are not these blocks: on all ranks of the group for one of them, which then wait for none.

    Without a group, on this rank alone.
    """
    locals_ = [local_tensor(p) for p in parameters]
    wrong = [block.shape != tuple(local.shape) for block, local in zip(blocks, locals_, strict=True)]
    anywhere = all_reduce(torch.tensor(wrong, dtype=torch.int32, device=locals_[0].device), group).tolist()
    for name, p, block, local, here, there in zip(names, parameters, blocks, locals_, wrong, anywhere, strict=True):
        if there:
            got = f"{tuple(local.shape)}" if here else "another one on another rank"
            got = f"{got} of {tuple(p.shape)} by {tuple(p.placements)}"
            remedy = f"Shard it by distribute_tensor or fully_shard, or leave it out with exclude={name!r}"
            raise RuntimeError(expected(f"the shard of parameter {name!r} to be {block.shape}", got, remedy))


def _turn(order: Sequence[MeshDim], split_factor: int, name: str, p: Any) -> int:
    """When a dimension of the mesh cuts: before those right of it, or, strided, behind split_factor of their shards."""
    for turn in range(len(order) + 1):
        if math.prod(len(dim.ranks) for dim in order[:turn]) == split_factor:
            return turn
    remedy = f"Shard it by fully_shard after tensor parallelism, or leave it out with exclude={name!r}"
    raise RuntimeError(expected(f"parameter {name!r} in contiguous shards", tuple(p.placements), remedy))


class Mesh:
    """The mesh of a list of parameters, some of which may be sharded over a part of its dimensions only."""

    def __init__(self, names: Sequence[str], parameters: Sequence[Any]):
        widest = max(range(len(parameters)), key=lambda i: parameters[i].device_mesh.ndim)
        self._mesh = parameters[widest].device_mesh
        self.dims = mesh_dims(names[widest], self._mesh)
        known = {dim.ranks for dim in self.dims}
        for name, p in zip(names, parameters, strict=True):
            for dim in mesh_dims(name, p.device_mesh):
                if len(dim.ranks) > 1 and dim.ranks not in known:
                    condition = f"parameter {name!r} on the mesh of {names[widest]!r} or a part of it"
                    remedy = f"Slice both out of one init_device_mesh, or leave one out with exclude={name!r}"
                    raise RuntimeError(expected(condition, f"{p.device_mesh} and {self._mesh}", remedy))

    def is_first(self, among: set[Ranks], but: set[Ranks]) -> bool:
        """Whether this rank speaks for those that hold the same: first along all dimensions `among`, less `but`."""
        return all(dim.coordinate == 0 for dim in self.dims if dim.ranks in among and dim.ranks not in but)

    def group(self, over: set[Ranks]) -> Any:
        """The process group of all ranks along these dimensions; None for no dimension."""
        import torch.distributed as dist

        chosen = [i for i, dim in enumerate(self.dims) if dim.ranks in over]
        if not chosen:
            return None
        if len(chosen) == 1:
            return self._mesh.get_group(chosen[0])
        at = tuple(slice(None) if i in chosen else dim.coordinate for i, dim in enumerate(self.dims))
        ranks = tuple(sorted(self._mesh.mesh[at].flatten().tolist()))
        if len(ranks) == dist.get_world_size():
            return dist.group.WORLD
        return _joint_group(ranks, self._mesh.get_group(chosen[0]))


_joint_groups: dict[Ranks, tuple[Any, Any]] = {}  # with the default group that each was made under


def _joint_group(ranks: Ranks, like: Any) -> Any:
    """One for several dimensions, made once, with the time limit of one for a single dimension."""
    import torch.distributed as dist

    world, made = _joint_groups.get(ranks, (None, None))
    if world is not dist.group.WORLD or made is None:
        limit = getattr(getattr(like, "options", None), "_timeout", None)
        made = dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
        _joint_groups[ranks] = (dist.group.WORLD, made)
    return made


def is_gone(group: Any) -> bool:
    """Whether a process group was destroyed since: gloo would go on with it, and others fail or hang."""
    try:
        return group is not None and not torch.distributed.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return True


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum over a group, in place, on every rank the same bits; without a group x itself."""
    if group is not None:
        torch.distributed.all_reduce(x, group=group)
    return x
