"""Which elements of which matrix a rank holds: block ranges and pieces, rank by rank in one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_ops.layers import discover
from spectral_ops.ops.layout import as_matrices
from spectral_ops.rules import Rule
from spectral_ops.sharding import mesh
from spectral_ops.sharding.mesh import Block, MeshDim, block_of, check_shards
from spectral_ops.sharding.pieces import cut_into_pieces


class Placement:
    """As torch's, which is known by the name of its class alone."""

    def __init__(self, dim: int = 0, split_factor: int = 1):
        self.dim, self.split_factor = dim, split_factor


class Shard(Placement):
    pass


class _StridedShard(Placement):
    pass


class Replicate(Placement):
    pass


class Partial(Placement):
    pass


# (placements, the order in which dimensions of the mesh cut)
ORDERS = [
    ([Shard(0)], [0]),
    ([Shard(-1)], [0]),
    ([Shard(0), Shard(0)], [0, 1]),  # distribute_tensor, left to right
    ([_StridedShard(0, 2), Shard(0)], [1, 0]),  # FSDP over tensor parallelism of two ranks
    ([Replicate(), _StridedShard(0, 2), Shard(0)], [2, 1]),
    ([Shard(0), Replicate(), Shard(1)], [0, 2]),
    ([_StridedShard(0, 6), Shard(0), Shard(0)], [1, 2, 0]),
    ([_StridedShard(0, 2), _StridedShard(0, 3), Shard(0)], None),  # 3 is a product of no shards right of it
]


def ranks(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, sizes))


def sharded(patch: pytest.MonkeyPatch, shape: tuple[int, ...], placements: list[Any], sizes: Any, at: Any) -> Any:
    """A parameter as one rank sees it; equal sizes are told apart as dimensions are, by their ranks."""
    dims = [MeshDim(tuple(range(100 * i, 100 * i + n)), c) for i, (n, c) in enumerate(zip(sizes, at, strict=True))]
    patch.setattr(mesh, "mesh_dims", lambda name, of: dims)
    return SimpleNamespace(device_mesh=None, placements=placements, shape=torch.Size(shape), ndim=len(shape))


@pytest.mark.parametrize("rows", [0, 1, 5, 7, 12, 24])
@pytest.mark.parametrize(("placements", "order"), ORDERS, ids=lambda x: "")
def test_blocks(placements: list[Any], order: list[int] | None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {1: (4,), 2: (3, 2), 3: (2, 3, 2)}[len(placements)]
    numbers = torch.arange(rows * 5).view(rows, 5)
    for at in ranks(sizes):
        p = sharded(monkeypatch, (rows, 5), placements, sizes, at)
        if order is None:
            with pytest.raises(RuntimeError, match="expected parameter 'w' in contiguous shards, got .* after tensor"):
                block_of("w", p)
            continue
        block, expected = block_of("w", p), numbers
        for i in order:
            chunks = expected.chunk(sizes[i], placements[i].dim)  # torch leaves empty ones out
            empty = expected.narrow(placements[i].dim, 0, 0)
            expected = chunks[at[i]] if at[i] < len(chunks) else empty
        (a, b), (c, d) = block.ranges
        assert torch.equal(numbers[a:b, c:d].flatten(), expected.flatten())
        assert block.shape == tuple(numbers[a:b, c:d].shape)


def test_a_mesh_dimension_of_one_rank_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    block = block_of("w", sharded(monkeypatch, (4, 5), [Shard(1), Shard(0)], (1, 2), (0, 1)))
    assert block.ranges == ((2, 4), (0, 5)) and list(block.cuts.values()) == [0]


def test_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="expected parameter 'w' sharded or replicated, .* exclude='w'"):
        block_of("w", sharded(monkeypatch, (4, 5), [Partial()], (2,), (0,)))


def test_a_shard_of_another_size() -> None:
    p = SimpleNamespace(device_mesh=None, placements=[Shard(0)], shape=(4, 5), _local_tensor=torch.zeros(3, 5))
    block = Block(((0, 2), (0, 5)), {(0, 1): 0})
    with pytest.raises(RuntimeError, match=r"the shard of parameter 'w' to be \(2, 5\), got \(3, 5\) of \(4, 5\)"):
        check_shards(["w"], [p], [block], None)


# ---- pieces ----

LAYERS: dict[str, tuple[nn.Module, dict[str, Rule | str]]] = {
    "linear": (nn.Linear(5, 7), {}),
    "qkv": (nn.Linear(4, 15), {"weight": Rule(split=(3, 0))}),
    "two parts": (nn.Linear(3, 2), {"weight": Rule(split=(2, 0))}),
    "conv": (nn.Conv2d(4, 6, (3, 2), groups=2), {}),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), {}),
    "transposed": (nn.ConvTranspose1d(6, 4, 3, groups=2), {}),
    "depthwise transposed": (nn.ConvTranspose1d(4, 4, 3, groups=4), {}),
    "packed in columns": (nn.Linear(15, 4), {"weight": Rule(split=(3, 1))}),
    "packed, turned": (nn.Linear(15, 4, bias=False), {"weight": Rule(split=(3, 1), row_dim=1)}),
    "stack": (nn.Bilinear(4, 5, 3), {"weight": "matrices"}),
    "norm": (nn.LayerNorm(5), {}),
}


def _cut(n: int, world: int, rank: int) -> tuple[int, int]:
    step = -(-n // world)
    return min(n, rank * step), min(n, (rank + 1) * step)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("layer", LAYERS)
def test_pieces_make_up_every_matrix(layer: str, world: int) -> None:
    """Of every dimension cut, and of every two; each element lies on one rank, where its piece says."""
    model, rules = LAYERS[layer]
    entries = [entry for entry in discover(model, rules=rules) if entry.layout is not None]
    for place, entry in enumerate(entries):
        w = torch.arange(math.prod(entry.shape)).view(entry.shape).double() + 1
        dims = range(len(entry.shape))
        for cut in [(dim,) for dim in dims] + list(itertools.permutations(dims, 2)):
            _check(entries, place, w, cut, world)


def _check(entries: Any, place: int, w: Tensor, cut: tuple[int, ...], world: int) -> None:
    entry = entries[place]
    sizes = (world,) if len(cut) == 1 else (2, world)
    names = [tuple(range(100 * i, 100 * i + n)) for i, n in enumerate(sizes)]
    assert entry.layout is not None
    whole = as_matrices(w, entry.layout)
    truth = [x.flatten(1) if entry.layout.is_matrix else x.flatten()[:, None] for x in whole]
    found = [torch.zeros_like(x) for x in truth]
    for at in ranks(sizes):
        ranges = [(0, n) for n in w.shape]
        for dim, n, c in zip(cut, sizes, at, strict=True):
            ranges[dim] = _cut(w.shape[dim], n, c)
        block = Block(tuple(ranges), dict(zip(names, cut, strict=True)))
        local = w[tuple(slice(*r) for r in ranges)]
        pieces = cut_into_pieces([entry], [block])
        if pieces.vectors:
            (piece,) = pieces.vectors
            found[0][slice(*ranges[0]), 0] += piece.view(local)
            assert piece.n == local.numel() and piece.row_cuts == {names[0]}
            continue
        assert len(pieces.of_matrices) == len(truth)  # each part has a piece, empty or not
        for piece, total, x in zip(pieces.of_matrices, found, truth, strict=True):
            view = as_matrices(piece.view(local), piece.layout)[0].flatten(1)
            assert view.shape == (piece.rows, piece.columns) and piece.n == x.shape[1]
            columns = torch.arange(piece.n) if piece.places is None else piece.places
            total[piece.row_at : piece.row_at + piece.rows, columns] += view
            # A part that several ranks share is cut by rows or by columns along every dimension of the mesh.
            assert piece.row_cuts | piece.column_cuts == set(names) and not piece.row_cuts & piece.column_cuts
            assert not piece.is_empty_matrix
            if not piece.column_cuts and view.numel():
                assert piece.places is None
    for total, x in zip(found, truth, strict=True):
        assert torch.equal(total, x)


def test_operators_are_refused() -> None:
    model = nn.Conv2d(2, 4, 3)
    entries = discover(model, conv="operator", input_size=(2, 5, 5), exclude="bias")[:1]
    with pytest.raises(NotImplementedError, match="expected conv operator 'weight' on one rank, got a sharded weight"):
        cut_into_pieces(entries, [Block(((0, 2), (0, 2), (0, 3), (0, 3)), {(0, 1): 0})])
