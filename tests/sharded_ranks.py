"""Ranks of a sharded model played one after another in one process: each reads its rows, sums are formed here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from helpers import gaussian
from torch import Tensor

from spectral_ops.layers import Entry
from spectral_ops.ops.layout import Kind, Layout
from spectral_ops.sharding.mesh import Block
from spectral_ops.sharding.pieces import cut_into_pieces
from spectral_ops.sharding.read import Reader, State

ALONG = (0, 1)  # the dimension of the mesh that shares out rows


class OneRank:
    """A mesh without process groups: nothing is summed."""

    def group(self, over: set[Any]) -> None:
        return None

    def is_first(self, among: set[Any], but: set[Any]) -> bool:
        return True


class Rank(NamedTuple):
    reader: Reader
    views: list[Tensor]


def rank(weights: dict[str, Tensor], layouts: dict[str, Layout], begin: float, end: float) -> Rank:
    """One that holds the rows from begin to end, as shares of all, of every weight."""
    entries, blocks, locals_ = [], [], []
    for name, w in weights.items():
        entry = Entry(name, None, "", None, layouts[name], tuple(w.shape), "", target=1.0, strength=0.5)
        low, high = round(begin * w.shape[0]), round(end * w.shape[0])
        entries.append(entry)
        blocks.append(Block(((low, high), *((0, n) for n in w.shape[1:])), {ALONG: 0}))
        locals_.append(w[low:high])
    pieces = cut_into_pieces(entries, blocks)
    targets, scales = [e.target for e in entries], [e.strength for e in entries]
    mesh: Any = OneRank()
    reader = Reader(pieces, mesh, list(weights), targets, scales, locals_[0].device)
    every = [*pieces.of_matrices, *pieces.vectors]
    return Rank(reader, [piece.view(locals_[piece.place]) for piece in every])


def zoo(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    weights = {
        "plain": gaussian("sums", 12, 7),
        "packed": gaussian("packed", 15, 6),  # three parts, which straddle two ranks and three
        "small": gaussian("small", 9, 5) * 1e-30,
        "large": gaussian("large", 8, 5) * 1e15,
        "zero": torch.zeros(6, 5),
        "column": gaussian("column", 10, 1),
        "row": gaussian("row", 1, 9),
        "empty": torch.zeros(0, 4),
        "bias": gaussian("bias", 11),
        "scale": 1 + gaussian("scale", 11),
    }
    layouts = dict.fromkeys(weights, Layout()) | {
        "packed": Layout(parts=3),
        "bias": Layout(Kind.BIAS),
        "scale": Layout(Kind.SCALE),
    }
    return {name: w.to(dtype) for name, w in weights.items()}, layouts


def start(reader: Reader, dtype: torch.dtype) -> State:
    pieces = [gaussian(f"v{i}", n) for i, n in enumerate(reader.n.tolist())]
    v = torch.cat([x / x.norm() for x in pieces]).to(reader.n.device, dtype)
    count = reader.n.numel()
    exponents = torch.zeros(count, dtype=torch.int32, device=v.device)
    return State(v, exponents, v.new_zeros(count), v.new_zeros(reader.row_count))


def step(ranks: list[Rank], state: State, exponent: float) -> tuple[Tensor, State, list[Tensor]]:
    """R, the next state and every rank's u: the sums of all formed here."""
    every = [r.reader.products(r.views, state.v, state.exponents, exponent) for r in ranks]
    z, squares, vectors = (sum(getattr(p, key) for p in every) for key in ("z", "squares", "vectors"))
    us = []
    for r, products in zip(ranks, every, strict=True):
        new = State(*(x.clone() for x in state[:3]), state.v.new_zeros(r.reader.row_count))
        summed = products._replace(z=z, squares=squares, vectors=vectors)
        terms, of_vectors = r.reader.finish(summed, new, exponent)
        us.append(new.u)
    return terms.sum() + of_vectors.sum(), new, us


def by_part(weights: dict[str, Tensor], layouts: dict[str, Layout]) -> list[Tensor]:
    """In the order of the pieces."""
    matrices = [x for name, w in weights.items() if layouts[name].is_matrix for x in w.chunk(layouts[name].parts)]
    return [*matrices, weights["bias"][:, None]]
