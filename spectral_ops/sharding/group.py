"""Sharded parameters that one call of the regularizer serves, as `vectors.Group` is of whole ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops import backends
from spectral_ops.layers import Entry
from spectral_ops.ops.checks import check_gradient
from spectral_ops.ops.device_number import DeviceNumber
from spectral_ops.ops.dtensor import is_dtensor, local_tensor
from spectral_ops.ops.eager_penalty import Kept
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import as_matrices, sizes, vector_dtype
from spectral_ops.ops.snapshot import Addresses, Snapshot
from spectral_ops.ops.spectral_penalty import gradients_ref, refuse_second_derivative
from spectral_ops.rules import expected
from spectral_ops.sharding.mesh import Mesh, block_of, check_shards, is_gone
from spectral_ops.sharding.pieces import Pieces, cut_into_pieces
from spectral_ops.sharding.read import Reader, State
from spectral_ops.sharding.start import converged
from spectral_ops.vectors import START_TOL, Vectors


class Shards:
    """The pieces of a list of sharded parameters on this rank, and how they are read and their gradients written."""

    def __init__(self, entries: Sequence[Entry], parameters: Sequence[nn.Parameter]):
        names = [entry.name for entry in entries]
        self.blocks = [block_of(name, p) for name, p in zip(names, parameters, strict=True)]
        self.pieces: Pieces = cut_into_pieces(entries, self.blocks)
        mesh = Mesh(names, parameters)
        targets, scales = [e.target for e in entries], [e.strength for e in entries]
        self.reader = Reader(self.pieces, mesh, names, targets, scales, local_tensor(parameters[0]).device)
        self._every = [*self.pieces.of_matrices, *self.pieces.vectors]
        reader = self.reader
        self.table = LayerTable(reader.table.layouts, reader.targets, reader.scales, reader.names)
        self._locals: list[Tensor] = []
        self._weights: list[Tensor] = []

    def views(self, parameters: Sequence[Any]) -> list[Tensor]:
        """The pieces of these parameters, or of tensors sharded as they are, in the order of the tables."""
        locals_ = [local_tensor(p) for p in parameters]
        return [piece.view(locals_[piece.place]) for piece in self._every]

    def weight_views(self, parameters: Sequence[Any]) -> list[Tensor]:
        """`views` of the weights; those of the last call where they lie in the very same tensors."""
        locals_ = [local_tensor(p) for p in parameters]
        if len(locals_) != len(self._locals) or any(x is not y for x, y in zip(locals_, self._locals, strict=True)):
            self._weights = [view.detach() for view in self.views(locals_)]
            self._locals = locals_
        return self._weights

    def write(
        self, views: Sequence[Tensor], gradients: Sequence[Tensor], kept: Kept, exponent: float, upstream: Tensor,
        accumulate: bool,
    ) -> None:
        """gradients = upstream * dR/dW, or += ; kept.v: of the columns on this rank."""
        table, views = self.table, [view.detach() for view in views]
        backend = backends.choose(kept.v.device, "spectral_penalty", kept.v.dtype)
        if backend == "triton":
            table.triton.backward(views, gradients, *kept, exponent, upstream, accumulate)
        elif backend == "reference":
            found = gradients_ref(views, *kept, table.layouts, table.targets, table.scales, exponent)
            for store, gradient, layout in zip(gradients, found, table.layouts, strict=True):
                view = as_matrices(store, layout)
                added = upstream * gradient
                view.copy_(view.to(added.dtype) + added if accumulate else added)
        else:
            work = table.native.at(views, gradients)
            pointers = (x.data_ptr() for x in kept)
            work.table.backward(
                work.weights, work.gradients, *pointers, exponent, upstream.item(), accumulate, torch.get_num_threads()
            )


class ShardedGroup:
    """Sharded parameters of one device, vector dtype and optimizer. v and sigma are whole, on every rank the same."""

    def __init__(
        self, entries: list[Entry], places: list[int], parameters: list[nn.Parameter], owner: object | None
    ):
        self.entries, self.places, self.owner = entries, places, owner
        self.shards = Shards(entries, parameters)
        self.placements = [tuple(p.placements) for p in parameters]  # type: ignore[attr-defined]
        self._checked: Snapshot | None = None
        self._factor = DeviceNumber()  # what gradients are multiplied by
        self.v = self.exponents = self.sigma = torch.empty(0)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds a launch of it."""
        return self.shards.table.captured or self.shards.reader.table.captured

    def start(self, parameters: Sequence[nn.Parameter], known: Mapping[str, Vectors]) -> dict[str, Vectors]:
        """Buffers with the known vectors, and converged ones for what is new; views of them by name, of biases too."""
        local = local_tensor(parameters[0])
        device, dtype = local.device, vector_dtype(local.dtype)
        self.v, self.exponents, self.sigma = self._converged(parameters, dtype, set(known))
        views = self._by_name()
        for name, vectors in views.items():
            if name in known:
                vectors.copy_(known[name].to(device, dtype))
        return views

    def _by_name(self) -> dict[str, Vectors]:
        out: dict[str, Vectors] = {}
        index = at = 0
        for place in dict.fromkeys(piece.place for piece in self.shards.reader.matrices):
            layout = self.entries[place].layout
            assert layout is not None
            parts, n = layout.parts, sizes(self.entries[place].shape, layout).n if layout.is_matrix else 1
            out[self.entries[place].name] = Vectors(
                self.v[at : at + parts * n].view(parts, n), self.exponents[index : index + parts],
                self.sigma[index : index + parts],
            )  # fmt: skip
            index, at = index + parts, at + parts * n
        return out

    def _converged(
        self, parameters: Sequence[nn.Parameter], dtype: torch.dtype, known: set[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        reader = self.shards.reader
        of_matrices = [e.name for e in self.entries if e.layout is not None and e.layout.is_matrix]
        resumes = all(name in known for name in of_matrices)
        # A step sends nothing more for it; what starts waits for all ranks anyhow.
        group = None if resumes else reader.group
        check_shards([e.name for e in self.entries], parameters, self.shards.blocks, group)
        if resumes:  # of a bias, v is 1 and the rest comes with the first read
            count, device = reader.n.numel(), reader.n.device
            v = torch.ones(reader.size, dtype=dtype, device=device)
            return v, torch.zeros(count, dtype=torch.int32, device=device), v.new_zeros(count)
        with torch.no_grad():
            sigma, v, exponents = converged(reader, self.shards.views(parameters), dtype, START_TOL)
        return v, exponents, sigma

    # ---- the step ----

    def check(self, parameters: Sequence[nn.Parameter]) -> None:
        """Raises for process groups that are gone, and for gradients that this call could not add to."""
        if is_gone(self.shards.reader.group):
            self.shards = Shards(self.entries, parameters)  # where there are new ones for the same mesh; or raises
        for entry, p, placements in zip(self.entries, parameters, self.placements, strict=True):
            if p.grad is not None:
                check_gradient_placements(entry.name, p, p.grad, placements)
        given = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        if self._checked is None or len(given) < len(parameters) or self._checked.addresses(given) is None:
            for entry, p in zip(self.entries, parameters, strict=True):
                if p.grad is not None:
                    check_gradient("accumulate_grad_", entry.name, local_tensor(p), local_tensor(p.grad))
            self._checked = Snapshot(given)

    def accumulate(
        self,
        parameters: list[nn.Parameter],
        exponent: float,
        strength: float | Tensor,
        grad_scale: float | Tensor | None,
        found_inf: Tensor | None,
        addresses: Addresses | None = None,
    ) -> Tensor:
        """strength * R of the group; its gradient added to every .grad, the state advanced. After `check`."""
        gradients = self._gradients(parameters)
        found_inf = None if found_inf is None else found_inf.to(self.v.device, non_blocking=True)
        views = self.shards.weight_views(parameters)
        reader, state = self.shards.reader, self._state()
        terms, vectors = reader.read(views, state, exponent, found_inf)
        upstream = self._on_device(strength if grad_scale is None else strength * grad_scale)
        kept = Kept(state.sigma, state.u, reader.local_v(state.v))
        if found_inf is not None:  # nothing is added to a gradient
            skip = found_inf != 0
            kept = kept._replace(sigma=torch.where(skip, 0.0, kept.sigma))
            upstream = torch.where(skip, 0.0, upstream)
        self.shards.write(views, gradients, kept, exponent, upstream, accumulate=True)
        # Written past torch: what autograd has saved of them is out of date.
        torch.autograd.graph.increment_version([p.grad for p in parameters if p.grad is not None])
        return (strength * (terms.sum() + vectors.sum())).to(self.v.dtype)

    def penalty(self, parameters: list[nn.Parameter], exponent: float, advance: bool) -> Tensor:
        """R of the group, differentiable; the state advanced where that is asked for."""
        if is_gone(self.shards.reader.group):
            self.shards = Shards(self.entries, parameters)
        locals_ = [p.to_local() if is_dtensor(p) else p for p in parameters]  # type: ignore[attr-defined]
        value: Tensor = _ShardedPenalty.apply(self, exponent, advance, *locals_)
        return value

    def _on_device(self, factor: float | Tensor) -> Tensor:
        if isinstance(factor, Tensor):
            return factor.to(self.v.device, non_blocking=True)
        return self._factor.at(factor, self.v.device)

    def _state(self) -> State:
        # Zeros: where a step is skipped, u stays as it is, and a gradient gets 0 times it.
        return State(self.v, self.exponents, self.sigma, self.v.new_zeros(self.shards.reader.row_count))

    def _gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Views of .grad by piece, made where there is none."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return self.shards.views([p.grad for p in parameters])


def check_gradient_placements(name: str, p: Any, gradient: Any, placements: tuple[Any, ...]) -> None:
    if not is_dtensor(gradient):
        got, remedy = "a plain tensor", "Set it to None and run backward again"
    elif tuple(gradient.placements) == placements and gradient.device_mesh == p.device_mesh:
        return
    else:
        got = f"{tuple(gradient.placements)}"
        remedy = "Write p.grad = p.grad.redistribute(p.device_mesh, p.placements) before this call"
    raise RuntimeError(expected(f"the gradient of {name!r} sharded as its weight, {placements}", got, remedy))


class _ShardedPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ShardedGroup, exponent: float, advance: bool, *locals_: Tensor) -> Tensor:
        shards = group.shards
        reader, state = shards.reader, group._state()
        new = state.clone()  # a later step overwrites the group's
        terms, vectors = reader.read(shards.views(locals_), new, exponent)
        ctx.shards, ctx.exponent = shards, exponent
        ctx.save_for_backward(*locals_, new.sigma, new.u, reader.local_v(new.v))
        if advance:
            for store, x in zip(state, new, strict=True):
                store.copy_(x)
        return (terms.sum() + vectors.sum()).to(group.v.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        locals_, kept = ctx.saved_tensors[:-3], Kept(*ctx.saved_tensors[-3:])
        return (None, None, None, *_Gradient.apply(ctx.shards, ctx.exponent, kept, upstream, *locals_))


class _Gradient(torch.autograd.Function):
    """Of the penalty, and no second one: by once_differentiable torch would take it for zero in the weights."""

    @staticmethod
    def forward(
        ctx: Any, shards: Shards, exponent: float, kept: Kept, upstream: Tensor, *locals_: Tensor
    ) -> tuple[Tensor, ...]:
        out = [torch.empty_like(x) for x in locals_]
        shards.write(shards.views(locals_), shards.views(out), kept, exponent, upstream, accumulate=False)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        refuse_second_derivative()


def make_sharded_group(
    entries: Sequence[Entry], places: list[int], known: Mapping[str, Vectors], owner: object | None
) -> tuple[ShardedGroup, dict[str, Vectors]]:
    """As vectors.make_group, of sharded parameters. All ranks of their mesh call it together."""
    parameters = [entry.parameter for entry in entries]
    group = ShardedGroup(list(entries), places, parameters, owner)
    views = group.start(parameters, known)
    return group, {e.name: views[e.name] for e in entries if e.layout is not None and e.layout.is_matrix}

