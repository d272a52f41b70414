"""csrc's table of layers, kept while shapes, strides and dtypes stay; addresses go along with every call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.checks import check_gradient
from spectral_ops.ops.layout import Layout, as_matrices, sizes, unpack
from spectral_ops.ops.snapshot import Addresses, Snapshot

if TYPE_CHECKING:
    from spectral_ops.ops.triton_table import TritonTable

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/dtypes.h: DType

# Distinct lists of layers kept for the registered ops; a program rarely has more than a handful of models.
CACHED_TABLES = 64


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
    """The table for one list of layouts; built anew where a tensor's shape, strides or dtype changed."""

    def __init__(
        self, layouts: Sequence[Layout], targets: Sequence[float], scales: Sequence[float], names: Sequence[str] = ()
    ):
        self.layouts, self.targets, self.scales = list(layouts), list(targets), list(scales)
        self.names = list(names) or [f"weights[{i}]" for i in range(len(self.layouts))]
        self._built: dict[bool, Built] = {}  # with gradients or without

    @functools.cached_property
    def triton(self) -> TritonTable:
        """The same layers for the Triton kernels."""
        from spectral_ops.ops.triton_table import TritonTable

        return TritonTable(self.layouts, self.targets, self.scales, self.names)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds a launch of it."""
        return "triton" in self.__dict__ and self.triton.captured

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
        for name, weight, gradient in zip(self.names, weights, gradients, strict=False):
            check_gradient("accumulate_grad_", name, weight, gradient)
        table = self._build(weights, gradients)
        self._built[with_gradients] = Built(Snapshot(weights), Snapshot(gradients), table)
        return Addressed(table, [w.data_ptr() for w in weights], [g.data_ptr() for g in gradients])

    def _build(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Any:
        rows = []
        v_at = u_at = index = 0
        for i, (w, layout) in enumerate(zip(weights, self.layouts, strict=True)):
            view = as_matrices(w.detach(), layout)
            gradient = gradients[i] if gradients else None
            strides = [] if gradient is None else list(as_matrices(gradient.detach(), layout).stride())
            code = 0 if gradient is None else DTYPE_CODES[gradient.dtype]
            rows.append(
                (
                    int(layout.kind),
                    DTYPE_CODES[w.dtype],
                    self.targets[i],
                    self.scales[i],
                    list(view.shape),
                    list(view.stride()),
                    code,
                    strides,
                    v_at,
                    u_at,
                    index,
                )
            )
            if layout.is_matrix:
                parts, m, n = sizes(w.shape, layout)
                v_at, u_at, index = v_at + parts * n, u_at + parts * m, index + parts
        return backends.native().Table(rows)


@functools.lru_cache(maxsize=CACHED_TABLES)
def _table(
    layouts: tuple[int, ...], targets: tuple[float, ...], scales: tuple[float, ...], looks: tuple[Any, ...]
) -> NativeTable:
    return NativeTable(unpack(layouts), targets, scales)


def native_table(
    layouts: Sequence[int], targets: Sequence[float], scales: Sequence[float], weights: Sequence[Tensor]
) -> NativeTable:
    """The table shared by all calls of a registered op with these layouts on weights of these shapes."""
    # On a device a table holds a workspace, and cutting it anew for every shape in turn would cost and sync.
    looks = () if weights[0].device.type == "cpu" else (weights[0].device, *((w.dtype, w.shape) for w in weights))
    return _table(tuple(layouts), tuple(targets), tuple(scales), looks)
