"""csrc's table of layers, kept while shapes, strides and dtypes stay; addresses go along with every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.layout import Layout, as_matrices, starts
from spectral_ops.ops.snapshot import Addresses, Snapshot

if TYPE_CHECKING:
    from spectral_ops.ops.layer_table import LayerTable

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/dtypes.h: DType


class Addressed(NamedTuple):
    """A table with the addresses of this call's tensors."""

    table: Any
    weights: Addresses
    gradients: Addresses


class Built(NamedTuple):
    """A table, and the tensors that it was built for."""

    weights: Snapshot
    gradients: Snapshot
    table: Any


class NativeTable:
    """Built anew where a tensor's shape, strides or dtype changed."""

    def __init__(self, layers: LayerTable):
        self._layers = layers
        self._built: dict[bool, Built] = {}  # with gradients or without

    def at(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor] = (), addresses: Addresses | None = None
    ) -> Addressed:
        """The table with the addresses of these very tensors: an earlier address may have been reused for another.

        addresses: of the weights, where the caller has just compared them with the ones of the last call.
        """
        with_gradients = len(gradients) > 0
        built = self._built.get(with_gradients)
        if built is not None:
            w = addresses if addresses is not None else built.weights.addresses(weights)
            g = built.gradients.addresses(gradients)
            if w is not None and g is not None:
                return Addressed(built.table, w, g)
        self._layers.check_gradients(weights, gradients)
        table = self.table(weights, gradients)
        self._built[with_gradients] = Built(Snapshot(weights), Snapshot(gradients), table)
        return Addressed(table, [w.data_ptr() for w in weights], [g.data_ptr() for g in gradients])

    def table(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Any:
        """csrc's table of tensors that look like these."""
        layers = self._layers
        if layers.has_operators:
            return self._build_operators(weights, gradients)
        rows = []
        places = starts([w.shape for w in weights], layers.layouts)
        for i, (w, layout) in enumerate(zip(weights, layers.layouts, strict=True)):
            view = as_matrices(w.detach(), layout)
            gradient = gradients[i] if gradients else None
            strides = [] if gradient is None else list(as_matrices(gradient.detach(), layout).stride())
            code = 0 if gradient is None else DTYPE_CODES[gradient.dtype]
            rows.append(
                (
                    int(layout.kind),
                    DTYPE_CODES[w.dtype],
                    layers.targets[i],
                    layers.scales[i],
                    list(view.shape),
                    list(view.stride()),
                    code,
                    strides,
                    *places[i],
                )
            )
        return backends.native().Table(rows)

    def _build_operators(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Any:
        rows = []
        layers = self._layers
        places = starts([w.shape for w in weights], layers.layouts)
        for i, (w, layout) in enumerate(zip(weights, layers.layouts, strict=True)):
            operator = layout.operator
            assert operator is not None
            view = _by_part(w, layout)
            gradient = gradients[i] if gradients else None
            coarse, fine = operator.grids(w.shape[2:])
            rows.append(
                (
                    DTYPE_CODES[w.dtype],
                    layers.targets[i],
                    layers.scales[i],
                    list(view.shape),
                    list(view.stride()),
                    0 if gradient is None else DTYPE_CODES[gradient.dtype],
                    [] if gradient is None else list(_by_part(gradient, layout).stride()),
                    *places[i],
                    list(coarse),
                    list(fine),
                    list(operator.stride),
                    list(operator.dilation),
                    list(operator.before),
                    operator.circular,
                    operator.transposed,
                )
            )
        return backends.native().ConvTable(rows)


def _by_part(w: Tensor, layout: Layout) -> Tensor:
    """(parts, coarse channels, fine channels, *kernel)."""
    return w.detach().unflatten(0, (layout.parts, w.shape[0] // layout.parts))
