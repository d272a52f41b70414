"""The warm step of sharded matrices: every rank reads its own rows once, and one sum over all ranks makes it the step.

    y_r = W_r v              rows on rank r: local
    z   = sum_r W_r' y_r     one all-reduce, together with ||y||^2 = sum_r ||y_r||^2 and what vectors give to R

Where columns are shared out, y = sum_c W_c v_c is summed first and W read a second time for z_c = W_c'y. That is two
all-reduces, whatever the number of layers and dimensions of the mesh.

The local read is the step of an unsharded model on the shard, by the same kernels: it gives u_r = y_r / ||y_r||,
s_r = ||W_r'u_r|| and v_r = W_r'y_r / ||W_r'y_r||. From these y_r and W_r'y_r are made again, by
||y_r|| = s_r (v . v_r). Sums are formed in float64, scaled by the exponent of the last sigma, so that no weight of 16
or 32 bits can leave their range.

Bytes over the network: 8 for every column of every matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.eager_penalty import Kept, WarmStep, take
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Layout, as_matrices
from spectral_ops.ops.power_iteration import exponents_of, lowbias32
from spectral_ops.ops.spectral_penalty import penalty_ref
from spectral_ops.rules import expected
from spectral_ops.sharding.mesh import Mesh, all_reduce
from spectral_ops.sharding.pieces import Piece, Pieces

if TYPE_CHECKING:
    from spectral_ops.sharding.sums import CompiledSums


class Products(NamedTuple):
    """Of all matrices, in float64, in units of 2^exponent for each W in them; u_norm and u are this rank's own."""

    z: Tensor  # W'W v, flat
    squares: Tensor  # ||W v||^2
    u_norm: Tensor
    u: Tensor  # this rank's rows of W v, over u_norm, flat, in the vector dtype
    vectors: Tensor  # what vectors give to R, in one number or, of an optimizer, one for each group


class State(NamedTuple):
    """Of all matrices, flat; the same on every rank but u, of which each has its own rows. Updated in place."""

    v: Tensor
    exponents: Tensor
    sigma: Tensor
    u: Tensor

    def clone(self) -> State:
        return State(*(x.clone() for x in self))


class Reader:
    """Of the pieces of a list of parameters; made again where these change."""

    def __init__(
        self, pieces: Pieces, mesh: Mesh, names: Sequence[str], targets: Sequence[float], scales: Sequence[float],
        device: torch.device,
    ):  # fmt: skip
        self.matrices = pieces.of_matrices
        every = [*self.matrices, *pieces.vectors]
        cut = set().union(*(piece.row_cuts | piece.column_cuts for piece in every))
        across = set().union(*(piece.column_cuts for piece in every))
        self.group = mesh.group(cut)
        layouts = [piece.layout for piece in every]
        self.targets = [0.0 if piece.is_bias else targets[piece.place] for piece in every]
        self.scales = [scales[piece.place] for piece in every]
        self.names = [names[piece.place] for piece in every]
        # What is replicated along a dimension that others are cut along is counted by its first rank alone.
        self.counts_of_vectors = [mesh.is_first(cut, set(p.row_cuts)) for p in pieces.vectors]
        counted = zip(pieces.vectors, self.counts_of_vectors, strict=True)
        of_vectors = [scales[p.place] if here else 0.0 for p, here in counted]
        self.table = LayerTable(layouts, self.targets, [0.0] * len(self.matrices) + of_vectors, self.names)

        def numbers(values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.n, self.rows = numbers([p.n for p in self.matrices]), numbers([p.rows for p in self.matrices])
        self.columns = numbers([p.columns for p in self.matrices])
        self.size = sum(p.n for p in self.matrices)
        self.row_count, self._column_count = sum(p.rows for p in self.matrices), sum(p.columns for p in self.matrices)
        self._targets = numbers(self.targets[: len(self.matrices)], torch.float64)
        self._empty = numbers([p.is_empty_matrix for p in self.matrices], torch.bool)
        self._scales = numbers([scales[p.place] for p in self.matrices], torch.float64)
        # Which sums this rank's pieces enter: of what several ranks hold, the first speaks.
        self.counts_of_z = [mesh.is_first(cut, set(p.row_cuts | p.column_cuts)) for p in self.matrices]
        self.counts_of_y = [mesh.is_first(cut, set(p.row_cuts)) for p in self.matrices]
        of_z, of_y = self.counts_of_z, self.counts_of_y
        self._first_z = None if all(of_z) else self.over_n(numbers(of_z, torch.float64))
        self._first_y = None if all(of_y) else numbers(of_y, torch.float64)
        self._local = self._local_columns(device)
        self._across = _Across(self.matrices, self.names, mesh, across, self._local, device) if across else None

    def over_n(self, x: Tensor) -> Tensor:
        """Of every matrix one number, for each of its columns."""
        return x.repeat_interleave(self.n, output_size=self.size)

    def over_rows(self, x: Tensor) -> Tensor:
        """The same for each of its rows on this rank."""
        return x.repeat_interleave(self.rows, output_size=self.row_count)

    def _local_columns(self, device: torch.device) -> Tensor | None:
        """Where the columns of the pieces lie in v; None where all of them are here."""
        if all(piece.places is None for piece in self.matrices):
            return None
        out, at = [], 0
        for piece in self.matrices:
            out.append(at + (torch.arange(piece.n) if piece.places is None else piece.places))
            at += piece.n
        return torch.cat(out).to(device)

    def local_v(self, v: Tensor) -> Tensor:
        """v of the columns on this rank."""
        return v if self._local is None else v[self._local]

    # ---- the step ----

    def read(
        self, views: Sequence[Tensor], state: State, exponent: float, found_inf: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One warm step of all pieces, whose `views` are given in their order: `finish` of `products`."""
        return self.finish(self.products(views, state.v, state.exponents, exponent), state, exponent, found_inf)

    def products(self, views: Sequence[Tensor], v: Tensor, exponents: Tensor, exponent: float = 2.0) -> Products:
        mine = self.local_v(v)
        value, local = read_here(self.table, self.row_count, views, mine, exponents, exponent)
        return self.exchange(views, mine, local, exponents, value)

    def exchange(
        self, views: Sequence[Tensor], v: Tensor, local: Kept, exponents: Tensor, vectors: Tensor
    ) -> Products:
        """The sums over all ranks of a local read of v (on this rank's columns). vectors: what these give to R."""
        backend = self._backend(v)
        if backend != "reference":
            return self._sums.exchange(backend, v, local, exponents, vectors.reshape(-1), self.group)
        scale = torch.ldexp(torch.ones_like(local.sigma, dtype=torch.float64), -exponents)
        y_norm = _norm_of_y(local, v, self.columns) * scale
        z_norm = y_norm * local.sigma.double() * scale
        u = local.u
        z = local.v.double() * z_norm.repeat_interleave(self.columns, output_size=self._column_count)
        if self._across is not None:
            u, y_norm, z = self._across.second_read(views, u, y_norm, z, exponents, scale)
        if self._local is not None:
            z = z.new_zeros(self.size).index_copy_(0, self._local, z)
        squares = y_norm.square()
        if self._first_z is not None:
            z = z * self._first_z
        if self._first_y is not None:
            squares = squares * self._first_y
        vectors = vectors.double().reshape(-1)
        summed = all_reduce(torch.cat([z, squares, vectors]), self.group)
        z, squares, vectors = summed.split([self.size, squares.numel(), vectors.numel()])
        return Products(z, squares, y_norm, u, vectors)

    def finish(
        self, products: Products, state: State, exponent: float, found_inf: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The step from what was summed, in `state`, but where found_inf is not 0; without another sum.

        Returns the terms of R, by matrix, each times its share of the strength, and what vectors give to it; float64.
        """
        backend = self._backend(state.v)
        if backend != "reference":
            if backend == "native" and found_inf is not None and found_inf.item() != 0:
                return self.terms(state.sigma, exponent), products.vectors
            return self._sums.finish(backend, products, state, exponent, found_inf), products.vectors
        v, exponents = state.v, state.exponents
        y_norm = products.squares.sqrt()
        seen = y_norm > 0
        z = products.z / self.over_n(torch.where(seen, y_norm, 1.0))
        scaled = segment_sums(z.square(), self.n).sqrt()
        finite = y_norm.isfinite() & scaled.isfinite()
        live = seen & (scaled > 0)
        sigma = torch.ldexp(scaled, exponents)
        sigma = torch.where(finite, torch.where(live, sigma, 0.0), float("nan")).to(v.dtype)
        next_v = (z / self.over_n(torch.where(live, scaled, 1.0))).to(v.dtype)
        if v.is_cuda or not bool((finite & live).all()):  # where a device knows, nobody waits to hear it
            # Zero biases, which are usual, are of one column.
            others = self._other_vectors(v) if v.is_cuda or not bool((live | (self.n == 1)).all()) else -v
            next_v = torch.where(self.over_n(live), next_v, others)
            next_v = torch.where(self.over_n(finite & ~self._empty), next_v, v)
        share = torch.where(live, products.u_norm / torch.where(live, y_norm, 1.0), 0.0)
        u = products.u.double() * self.over_rows(torch.where(finite, share, float("nan")))
        terms = self.terms(sigma, exponent)
        for store, new in zip(state, (next_v, exponents_of(sigma, exponents), sigma, u), strict=True):
            store.copy_(new if found_inf is None else torch.where(found_inf.to(store.device) != 0, store, new))
        return terms, products.vectors

    def _backend(self, v: Tensor) -> str:
        """What packs and finishes the sums: in plain torch where columns are shared out."""
        if self._across is not None or self._local is not None:
            return "reference"
        return backends.choose(v.device, "spectral_penalty", v.dtype)

    @functools.cached_property
    def _sums(self) -> CompiledSums:
        from spectral_ops.sharding.sums import CompiledSums  # which imports this file

        return CompiledSums(self.matrices, self.counts_of_z, self.counts_of_y, self._targets, self._scales)

    def terms(self, sigma: Tensor, exponent: float) -> Tensor:
        """Of R, by matrix, each times its share of the strength; float64."""
        terms = (sigma.double() ** exponent - self._targets**exponent).square()
        return self._scales * torch.where(self._empty, 0.0, terms)  # an empty matrix counts for nothing

    def _other_vectors(self, v: Tensor) -> Tensor:
        """ops/power_iteration.py: another_unit_vector, of matrices of several widths."""
        starts = self.n.cumsum(0) - self.n
        column = torch.arange(self.size, device=v.device) - self.over_n(starts)
        first = v[starts.clamp(max=max(self.size - 1, 0))] if self.size else v.new_zeros(self.n.numel())
        seed = self.over_n(first.float().view(torch.int32).to(torch.int64))
        x = lowbias32((column * 0x9E3779B9 + seed) & 0xFFFFFFFF)
        out = (x >> 8).to(torch.float64) * 2.0**-23 - 1.0
        norm = segment_sums(out.square(), self.n).sqrt()
        return torch.where(self.over_n(self.n == 1), -v, (out / self.over_n(norm)).to(v.dtype))


class _Across:
    """Matrices whose columns are shared out: y summed over those ranks, and the second read."""

    def __init__(
        self, matrices: Sequence[Piece], names: Sequence[str], mesh: Mesh, across: set[Any], local: Tensor | None,
        device: torch.device,
    ):
        self._group = mesh.group(across)
        self._which = [i for i, piece in enumerate(matrices) if piece.column_cuts]
        pieces = [matrices[i] for i in self._which]
        by_columns = {ranks: names[i] for i in self._which for ranks in matrices[i].column_cuts}
        for i in self._which:
            for other in (by_columns[ranks] for ranks in matrices[i].row_cuts & by_columns.keys()):
                condition = "parameters cut along two dimensions of the mesh to be cut by rows along the same one"
                got = f"rows of {names[i]!r} and columns of {other!r} along one"
                remedy = f"Exchange the placements of one of them, or leave it out with exclude={names[i]!r}"
                raise RuntimeError(expected(condition, got, remedy))
        self._rows = [piece.rows for piece in pieces]
        self.row_counts = torch.tensor(self._rows, device=device)
        self._matrices = torch.tensor(self._which, device=device)
        firsts = [float(mesh.is_first(across, set(piece.column_cuts))) for piece in pieces]
        self._first = None if all(firsts) else torch.tensor(firsts, dtype=torch.float64, device=device)
        rows, columns, row_at, column_at = [], [], 0, 0
        for i, piece in enumerate(matrices):
            if i in self._which:
                rows.append(torch.arange(row_at, row_at + piece.rows))
                columns.append(torch.arange(column_at, column_at + piece.columns))
            row_at, column_at = row_at + piece.rows, column_at + piece.columns
        self._row_places, self._column_places = torch.cat(rows).to(device), torch.cat(columns).to(device)
        self._column_counts = torch.tensor([piece.columns for piece in pieces], device=device)
        self._layouts = [piece.layout for piece in pieces]
        count = len(pieces)
        self._table = LayerTable([Layout()] * count, [0.0] * count, [0.0] * count)

    def second_read(
        self, views: Sequence[Tensor], u: Tensor, y_norm: Tensor, z: Tensor, exponents: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u, ||y|| on this rank's rows and z with those of these matrices made whole."""
        here = self._matrices
        y = u[self._row_places].double() * self._over_rows(y_norm[here])
        if self._first is not None:
            y = y * self._over_rows(self._first)
        y = all_reduce(y, self._group)
        norm = segment_sums(y.square(), self.row_counts).sqrt()
        unit = (y / self._over_rows(torch.where(norm > 0, norm, 1.0))).to(u.dtype)
        transposed = [
            as_matrices(views[i].detach(), layout)[0].flatten(1).t()
            for i, layout in zip(self._which, self._layouts, strict=True)
        ]
        rows = self._column_places.numel()  # of the transposed ones
        _, local = read_here(self._table, rows, transposed, unit, exponents[here], 2.0)
        size = _norm_of_y(local, unit, self.row_counts) * norm * scale[here]
        part = local.u.double() * size.repeat_interleave(self._column_counts, output_size=rows)
        z = z.index_copy(0, self._column_places, part)
        return u.index_copy(0, self._row_places, unit), y_norm.index_copy(0, here, norm), z

    def _over_rows(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.row_counts, output_size=sum(self._rows))


def read_here(
    table: LayerTable, rows: int, views: Sequence[Tensor], v: Tensor, exponents: Tensor, exponent: float
) -> tuple[Tensor, Kept]:
    """R and the step of tensors on this rank alone; rows: of all of them."""
    backend = backends.choose(v.device, "spectral_penalty", v.dtype)
    views = [view.detach() for view in views]
    if backend == "reference":
        numbers = table.layouts, table.targets, table.scales, exponent
        value, sigma, u, v_new, _ = penalty_ref(views, v, exponents, *numbers)
        return value, Kept(sigma, u, v_new)
    sigma = v.new_empty(exponents.numel())
    return take(WarmStep(backend, table, v, exponents, sigma, rows, exponent, False), views)


def _norm_of_y(local: Kept, v: Tensor, lengths: Tensor) -> Tensor:
    """||W v|| of a local read, float64: W'W v = ||y|| s v_next, v'W'W v = ||y||^2. By rounding it may be negative."""
    cosine = segment_sums(v.double() * local.v.double(), lengths)
    return (local.sigma.double() * cosine).abs()


def segment_sums(x: Tensor, lengths: Tensor) -> Tensor:
    """Of consecutive runs of x, in a fixed order."""
    if lengths.numel() == 0:
        return x.new_zeros(0)
    return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True, initial=0)
