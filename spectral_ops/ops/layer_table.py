"""A list of layers as ops know it, with each backend's own table of it, made when it is first asked for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectral_ops.ops.checks import check_gradient
from spectral_ops.ops.conv_cuda import ConvCudaTable
from spectral_ops.ops.layout import Layout, starts, unpack
from spectral_ops.ops.native_adamw import NativeAdamW
from spectral_ops.ops.native_table import NativeTable
from spectral_ops.ops.snapshot import Snapshot
from spectral_ops.ops.state import State

if TYPE_CHECKING:
    from spectral_ops.ops.triton_adamw import TritonAdamW
    from spectral_ops.ops.triton_table import TritonTable

# For tests: conv operators on CPU tensors go by the blocks of the CUDA kernels, emulated.
EMULATE_CONV = False
# Distinct lists of layers kept for the registered ops; a program rarely has more than a handful of models.
CACHED_TABLES = 64


class LayerTable:
    """Layouts, targets and shares of the strength of some parameters, and their names for messages."""

    of_one_shape = False  # whether it only ever meets weights of the same shapes

    def __init__(
        self, layouts: Sequence[Layout], targets: Sequence[float], scales: Sequence[float], names: Sequence[str] = ()
    ):
        self.layouts, self.targets, self.scales = list(layouts), list(targets), list(scales)
        self.names = list(names) or [f"weights[{i}]" for i in range(len(self.layouts))]
        self._sizes: tuple[tuple[torch.Size, ...], int, int] | None = None  # shapes, their matrices and rows
        self.has_operators = any(layout.operator is not None for layout in self.layouts)
        if self.has_operators and any(layout.operator is None for layout in self.layouts):
            message = "expected conv operators alone or none in one call, got both. Call once for each."
            raise ValueError(f"LayerTable: {message}")

    @functools.cached_property
    def native(self) -> NativeTable:
        return NativeTable(self)

    @functools.cached_property
    def native_adamw(self) -> NativeAdamW:
        return NativeAdamW(self)

    @functools.cached_property
    def triton(self) -> TritonTable:
        from spectral_ops.ops.triton_table import TritonTable  # imports triton, which may be missing

        return TritonTable(self)

    @functools.cached_property
    def triton_adamw(self) -> TritonAdamW:
        from spectral_ops.ops.triton_adamw import TritonAdamW

        return TritonAdamW(self)

    @functools.cached_property
    def conv_cuda(self) -> ConvCudaTable:
        return ConvCudaTable(self)

    def launcher(self, backend: str, device: torch.device) -> TritonTable | ConvCudaTable | None:
        """What launches a step where the backend does so: Triton's kernels, csrc's on CUDA; None for the others."""
        if backend == "triton":
            return self.triton
        by_blocks = self.has_operators and (device.type == "cuda" or EMULATE_CONV)
        return self.conv_cuda if backend == "native" and by_blocks else None

    def empty_state(self, weights: Sequence[Tensor], v: Tensor, exponents: Tensor) -> State:
        """What a step on these weights reads, and new tensors for what it writes."""
        known = self._sizes
        if known is None or not self.of_one_shape:
            shapes = tuple(w.shape for w in weights)
            if known is None or known[0] != shapes:
                end = starts(shapes, self.layouts)[-1]
                known = self._sizes = shapes, end.number, end.u
        _, matrices, rows = known
        new = torch.empty_like(v), torch.empty_like(exponents), v.new_empty(matrices), v.new_empty(rows)
        return State(v, new[0], exponents, *new[1:])

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds a launch of it."""
        made = [self.__dict__[name] for name in ("triton", "triton_adamw", "conv_cuda") if name in self.__dict__]
        return any(table.captured for table in made)

    def check_gradients(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Raises for one that is not its weight's; no gradients at all are fine."""
        for name, w, gradient in zip(self.names, weights, gradients, strict=False):
            check_gradient("accumulate_grad_", name, w, gradient)


@functools.lru_cache(maxsize=CACHED_TABLES)
def _table(
    layouts: str, targets: tuple[float, ...], scales: tuple[float, ...], looks: tuple[Any, ...]
) -> LayerTable:
    table = LayerTable(unpack(layouts), targets, scales)
    table.of_one_shape = bool(looks)
    return table


@functools.lru_cache(maxsize=CACHED_TABLES)
def _last(layouts: str, targets: tuple[float, ...], scales: tuple[float, ...]) -> list[tuple[Snapshot, LayerTable]]:
    """Of the last call with these numbers what its weights looked like, which is faster compared than hashed, and its
    table; empty before it."""
    return []


def layer_table(
    layouts: str, targets: Sequence[float], scales: Sequence[float], weights: Sequence[Tensor]
) -> LayerTable:
    """The table shared by all calls of a registered op with these layouts, on a device on weights of these shapes."""
    numbers = layouts, tuple(targets), tuple(scales)
    if weights[0].device.type == "cpu":
        return _table(*numbers, ())
    last = _last(*numbers)
    for snapshot, table in last:
        if snapshot.addresses(weights) is not None:
            return table
    # There it holds a workspace, and cutting it anew for every shape in turn would cost and sync.
    table = _table(*numbers, (weights[0].device, *((w.dtype, w.shape) for w in weights)))
    last[:] = [(Snapshot(weights), table)]
    return table
