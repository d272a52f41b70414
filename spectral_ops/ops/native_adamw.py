"""csrc's optimizer step: its table is kept while shapes, strides and dtypes stay; addresses come with every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.adamw_lists import Lists, Masks, by_parameter, lists_of, masks_of, moved_gradients, updated
from spectral_ops.ops.adamw_state import Hyper, Options, Spectrum, Tensors, check_tensors, same_places
from spectral_ops.ops.layout import Kind, Layout, as_matrices, starts
from spectral_ops.ops.snapshot import Addresses, Snapshot

if TYPE_CHECKING:
    from spectral_ops.ops.layer_table import LayerTable


class Built(NamedTuple):
    """A table, and how the tensors that it was built for looked."""

    looks: Sequence[Snapshot]
    masks: Masks
    table: Any
    elsewhere: list[int]  # of the gradients given, those that do not lie as their weight does
    step_is_double: bytes
    updated: list[int]


class NativeAdamW:
    """Built anew where a tensor's shape, strides or dtype changed, or one came or went."""

    def __init__(self, layers: LayerTable):
        self._layers = layers
        self._built: Built | None = None

    def step(
        self,
        tensors: Tensors,
        spectrum: Spectrum,
        group_of: Sequence[int],
        hyper: Sequence[Hyper],
        options: Options,
        grad_scale: float,
    ) -> Tensor:
        """strength * R of the new weights."""
        masks, lists = masks_of(tensors), lists_of(tensors)
        built, found = self._at(tensors, lists, masks)
        moved = moved_gradients(tensors, lists, built.elsewhere)
        if moved is not None:
            found[1] = [g.data_ptr() for g in moved]
        addresses = by_parameter(found, masks, len(tensors.weights))
        return self.step_again(addresses, list(tensors.weights), spectrum, group_of, hyper, options, grad_scale)

    def step_again(
        self,
        addresses: bytes,
        weights: list[Tensor],
        spectrum: Spectrum,
        group_of: Sequence[int],
        hyper: Sequence[Hyper],
        options: Options,
        grad_scale: float,
    ) -> Tensor:
        """The same on tensors that look as those of the last step, gradients lying as their weights do.

        addresses: rows in the order of Lists, as `by_parameter` has them.
        """
        built = self._built
        assert built is not None
        value = spectrum.v.new_empty(())
        built.table.adamw(
            addresses,
            built.step_is_double,
            group_of,
            [tuple(map(float, h)) for h in hyper],
            spectrum.v.data_ptr(),
            spectrum.u.data_ptr(),
            spectrum.exponents.data_ptr(),
            spectrum.sigma.data_ptr(),
            value.data_ptr(),
            options.exponent,
            grad_scale,
            options.maximize,
            options.decoupled,
            options.stochastic_rounding,
            options.seed & 0xFFFFFFFF,
            torch.get_num_threads(),
        )
        # Written past torch: what autograd has saved of these weights, and of no others, is out of date.
        torch.autograd.graph.increment_version([weights[i] for i in built.updated])
        return value

    def _at(self, tensors: Tensors, lists: Lists, masks: Masks) -> tuple[Built, list[Addresses]]:
        built = self._built
        if built is not None and built.masks == masks:
            found = [look.addresses(x) for look, x in zip(built.looks, lists, strict=True)]
            if None not in found:
                return built, [x for x in found if x is not None]
        check_tensors(self._layers.names, tensors)
        weights = [w for w, g in zip(*tensors[:2], strict=True) if g is not None]
        self._built = Built(
            [Snapshot(x) for x in lists],
            masks,
            self._table(tensors),
            [i for i, (w, g) in enumerate(zip(weights, lists.gradients, strict=True)) if not same_places(g, w)],
            bytes(step.dtype == torch.float64 for step in tensors.steps),
            updated(tensors, self._layers.layouts),
        )
        return self._built, [[t.data_ptr() for t in x] for x in lists]

    def _table(self, tensors: Tensors) -> Any:
        from spectral_ops.ops.native_table import DTYPE_CODES

        layers = self._layers
        rows: list[tuple[Any, ...]] = []
        places = starts([w.shape for w in tensors.weights], layers.layouts)
        for i, (w, layout) in enumerate(zip(tensors.weights, layers.layouts, strict=True)):
            gradient = tensors.gradients[i]
            shape, stride = _view(w.detach(), layout)
            rows.append(
                (
                    int(layout.kind),
                    DTYPE_CODES[w.dtype],
                    layers.targets[i],
                    layers.scales[i],
                    shape,
                    stride,
                    DTYPE_CODES[w.dtype if gradient is None else gradient.dtype],
                    [],
                    *places[i],
                )
            )
        return backends.native().Table(rows)


def _view(w: Tensor, layout: Layout) -> tuple[list[int], list[int]]:
    """Shape and strides as csrc takes them: a plain parameter that fills its memory is one run, in whatever order."""
    if layout.kind == Kind.PLAIN:
        expected = 1
        for size, stride in sorted(zip(w.shape, w.stride(), strict=True), key=lambda x: x[1]):
            if size != 1 and stride != expected:
                break
            expected *= size
        else:
            return [1, w.numel()], [w.numel(), 1]
    view = as_matrices(w, layout)
    return list(view.shape), list(view.stride())
