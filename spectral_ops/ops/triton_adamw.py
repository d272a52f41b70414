"""The optimizer step's table for the kernels: rows with moments and counts of steps, kept as the penalty's are."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_ops.kernels import table
from spectral_ops.kernels.adamw import Step, launch_adamw
from spectral_ops.kernels.adamw_elements import GROUP_FIELDS
from spectral_ops.ops import cut
from spectral_ops.ops.adamw_cut import adamw_cut
from spectral_ops.ops.adamw_lists import Masks, by_parameter, lists_of, masks_of, moved_gradients
from spectral_ops.ops.adamw_state import Hyper, Options, Spectrum, Tensors, check_tensors, same_places
from spectral_ops.ops.capture import capturing, refuse_first
from spectral_ops.ops.layout import Kind
from spectral_ops.ops.snapshot import Snapshot
from spectral_ops.ops.triton_debug import check_stopped
from spectral_ops.ops.triton_rows import TYPES, Rows, rows_of
from spectral_ops.ops.triton_table import Memory, TritonTable
from spectral_ops.ops.views import View

if TYPE_CHECKING:
    from spectral_ops.ops.layer_table import LayerTable

# Addresses of a call, one row for each, by parameter; 0 where there is none.
ADDRESSES = (
    table.WEIGHT, table.GRADIENT, table.EXP_AVG, table.EXP_AVG_SQ, table.MAX_EXP_AVG_SQ, table.MASTER, table.STEP,
)  # fmt: skip


class AdamWRows(Rows):
    """Rows of parameters that share the types of weights and gradients, all with masters or none."""

    fields = table.ADAMW_FIELDS.value

    def __init__(self, layers: LayerTable, items: Sequence[int], tensors: Tensors, group_of: Sequence[int]):
        self._tensors: Tensors | None = tensors
        self._group_of = group_of
        self.masters = has_master(tensors, items[0])
        self._places: list[int] = []  # of each row's first element in its parameter
        super().__init__(layers, items, tensors.weights, (), 1)
        gradient = next((tensors.gradients[i] for i in items if tensors.gradients[i] is not None), None)
        if gradient is not None:
            self.gradient_type = TYPES[gradient.dtype]
        g_size = tensors.weights[items[0]].element_size() if gradient is None else gradient.element_size()
        w_size = tensors.weights[items[0]].element_size()
        sizes = np.array([w_size, g_size, 4, 4, 4, 4, 0], dtype=np.int64)
        self._byte_offsets = sizes[:, None] * np.array(self._places, dtype=np.int64)
        self._tensors = None  # only while rows are made

    def _cut(self, matrices: Sequence[cut.Matrix], others: Sequence[tuple[Kind, int]], iterations: int) -> cut.Cut:
        assert self._tensors is not None
        states = 2 + (len(self._tensors.max_exp_avg_sqs) > 0) + self.masters
        # Of an element: the weight read and written, its gradient read, float32 states read and written.
        moved = [3 * x.element_size + 8 * states for x in matrices]
        return adamw_cut(matrices, moved, others, self.programs_of)

    def _rows_of(self, i: int, w: Tensor, view: View, n: int) -> cut.Rows:
        found = rows_of(w, view, n)
        return found if self._all_aligned(i) else cut.Rows(found.dense, found.by_column, False)

    def _all_aligned(self, i: int) -> bool:
        assert self._tensors is not None
        lists = [x for x in self._tensors[:4] + self._tensors[5:] if x]  # all but the counts of steps
        found = [x[i] for x in lists]
        return all(t is None or t.data_ptr() % 16 == 0 for t in found)

    def _set_more(self, row: list[int], i: int, part: int, view: View) -> None:
        assert self._tensors is not None
        place = part * view.part_stride
        self._places.append(place)
        row[table.PLACE.value], row[table.NUMBER.value], row[table.GROUP.value] = place, i, self._group_of[i]
        row[table.STEP_WIDE.value] = int(self._tensors.steps[i].dtype == torch.float64)
        row[table.COUNTS.value] = int(part == 0)
        if self.layers.layouts[i].kind == Kind.PLAIN:
            # In whatever order: every element is by itself.
            row[table.W_ORDER.value] = 0
            row[table.W_ROW.value] = int(view.dense and self._all_aligned(i))

    def addressed(self, addresses: bytes) -> Tensor:
        rows = self._numbers.copy()
        of_tensors = np.frombuffer(addresses, dtype=np.int64).reshape(len(ADDRESSES), -1)[:, self._owners]
        moved = np.where(of_tensors == 0, 0, of_tensors + self._byte_offsets)
        for field, values in zip(ADDRESSES, moved, strict=True):
            rows[:, field.value] = values
        return torch.from_numpy(rows)


class AdamWMemory(Memory):
    """With the numbers of the parameter groups."""

    _groups: Tensor | None = None
    _given: list[Tensor]  # what the kernel reads numbers from, until the next call
    _group_numbers: bytes = b""
    _spare: Tensor | None = None

    def groups(self, hyper: Sequence[Hyper]) -> Tensor:
        """int64 (groups, GROUP_FIELDS) on the device, written again only where a number or an address changed."""
        device = self.rows.device
        numbers = np.zeros((len(hyper), GROUP_FIELDS), dtype=np.int64)
        self._given = []
        for row, h in zip(numbers, hyper, strict=True):
            lr, lr_at, lr_wide = self._number("lr", h.lr)
            strength, strength_at, strength_wide = self._number("strength", h.strength)
            row[:6] = [*map(_bits, (lr, h.beta1, h.beta2, h.eps, h.weight_decay, strength))]
            row[6:] = lr_at, lr_wide, strength_at, strength_wide
        found = numbers.tobytes()
        if self._groups is None or found != self._group_numbers or self._captured is not None:
            if self._groups is None or self._groups.shape != numbers.shape:
                with torch.inference_mode(False):
                    self._groups = torch.empty(numbers.shape, dtype=torch.int64, device=device)
            staged = torch.from_numpy(numbers)
            if device.type == "cuda":
                if capturing(device):
                    # Pinning may synchronise, which a capture does not allow: one is in store for it.
                    spare, self._spare = self._spare, None
                    pinned = torch.empty_like(staged, pin_memory=True) if spare is None else spare
                    staged = pinned.copy_(staged)
                    assert self._captured is not None
                    self._captured.append((self.rows, staged))
                else:
                    staged = staged.pin_memory()
            self._groups.copy_(staged, non_blocking=True)
            self._group_numbers = found
        if self._spare is None and device.type == "cuda" and not capturing(device):
            with torch.inference_mode(False):
                self._spare = torch.empty(numbers.shape, dtype=torch.int64, pin_memory=True)
        return self._groups

    def _number(self, name: str, value: float | Tensor) -> tuple[float, int, int]:
        """(number, address, whether it is float64): of a tensor the address."""
        if not isinstance(value, Tensor):
            return float(value), 0, 0
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        kept = self.scalar(name, value)
        self._given.append(kept)
        return 0.0, kept.data_ptr(), int(kept.dtype == torch.float64)


class Kept(NamedTuple):
    """The rows for the tensors of a call, and how these looked."""

    looks: list[Snapshot]
    masks: Masks
    group_of: list[int]
    elsewhere: list[int]  # of the gradients given, those that do not lie as their weight does
    addresses: bytes
    rows: list[AdamWRows]


class TritonAdamW(TritonTable):
    """The table for one list of layouts; cut anew where a tensor's looks changed, or a gradient came or went."""

    def __init__(self, layers: LayerTable):
        super().__init__(layers)
        self._kept: Kept | None = None

    def make_memory(self, rows: Rows, captured: list[tuple[Rows, Tensor | Memory]] | None = None) -> AdamWMemory:
        return AdamWMemory(rows, captured)

    def step_adamw(
        self,
        tensors: Tensors,
        spectrum: Spectrum,
        group_of: Sequence[int],
        hyper: Sequence[Hyper],
        options: Options,
        grad_scale: float | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor:
        """strength * R of the new weights, 0-d; everything else in place."""
        with self.lock, torch.cuda.device_of(spectrum.v):
            rows, addresses, moved = self._rows_for(tensors, group_of)
            value = self._launch(rows, addresses, tensors.weights, spectrum, hyper, options, grad_scale, found_inf)
            del moved  # kept until here: the launches read it
        return value

    def step_again(
        self,
        addresses: bytes,
        weights: Sequence[Tensor],
        spectrum: Spectrum,
        hyper: Sequence[Hyper],
        options: Options,
        grad_scale: float | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor:
        """The same on tensors that look and are aligned as those of the last step, gradients lying as weights do.

        addresses: rows in the order of ADDRESSES, by parameter.
        """
        with self.lock, torch.cuda.device_of(spectrum.v):
            assert self._kept is not None
            return self._launch(self._kept.rows, addresses, weights, spectrum, hyper, options, grad_scale, found_inf)

    def _launch(
        self,
        found: Sequence[AdamWRows],
        addresses: bytes,
        weights: Sequence[Tensor],
        spectrum: Spectrum,
        hyper: Sequence[Hyper],
        options: Options,
        grad_scale: float | Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor:
        values = []
        stream = self._stream(spectrum.v)
        for rows in found:
            value = spectrum.v.new_empty(())
            values.append(value)
            memory = self._memory(rows, stream)
            assert isinstance(memory, AdamWMemory)
            work = memory.work(addresses, options.exponent)
            groups = memory.groups(hyper)
            scale = None if grad_scale is None else memory.scalar("grad_scale", grad_scale)
            step = Step(
                options.amsgrad,
                rows.masters,
                options.maximize,
                options.decoupled,
                options.stochastic_rounding and weights[rows.items[0]].dtype == torch.bfloat16,
            )
            memory.begin()
            launch_adamw(work, step, groups, *spectrum, value, _int32(options.seed), scale, found_inf)
            memory.end()
            if work.debug:
                check_stopped(work, rows, self.layers.names)
        # Written past torch: what autograd has saved of these weights, and of no others, is out of date.
        torch.autograd.graph.increment_version([weights[i] for rows in found for i in rows.items])
        if not values:
            return spectrum.v.new_zeros(())
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def _rows_for(
        self, tensors: Tensors, group_of: Sequence[int]
    ) -> tuple[list[AdamWRows], bytes, list[Tensor] | None]:
        lists, masks = lists_of(tensors), masks_of(tensors)
        kept = self._kept
        if kept is not None and kept.masks == masks and kept.group_of == list(group_of):
            found = [look.addresses(x) for look, x in zip(kept.looks, lists, strict=True)]
            if None not in found:
                moved = moved_gradients(tensors, lists, kept.elsewhere)
                if moved is not None:
                    found[1] = [g.data_ptr() for g in moved]
                addresses = by_parameter(found, masks, len(tensors.weights))
                if addresses == kept.addresses or _alignment(addresses) == _alignment(kept.addresses):
                    return kept.rows, addresses, moved
        refuse_first("a step", tensors.weights[0].device)
        check_tensors(self.layers.names, tensors)
        given = [(w, g) for w, g in zip(*tensors[:2], strict=True) if g is not None]
        elsewhere = [i for i, (w, g) in enumerate(given) if not same_places(g, w)]
        moved = moved_gradients(tensors, lists, elsewhere)
        found = [[t.data_ptr() for t in x] for x in lists]
        if moved is not None:
            found[1] = [g.data_ptr() for g in moved]
        addresses = by_parameter(found, masks, len(tensors.weights))
        rows = self._make_rows(tensors, group_of)
        self._memories = {}  # what belonged to the old rows is of no more use
        self._kept = Kept([Snapshot(x) for x in lists], masks, list(group_of), elsewhere, addresses, rows)
        return rows, addresses, moved

    def _make_rows(self, tensors: Tensors, group_of: Sequence[int]) -> list[AdamWRows]:
        """One for every kind: (dtype of weights, whether they have masters, dtype of gradients)."""
        kinds: dict[tuple[torch.dtype, bool, torch.dtype], list[int]] = {}
        waiting: dict[tuple[torch.dtype, bool], list[int]] = {}  # without a gradient: they go with any launch there is
        for i, (w, g) in enumerate(zip(*tensors[:2], strict=True)):
            if g is not None:
                kinds.setdefault((w.dtype, has_master(tensors, i), g.dtype), []).append(i)
            elif self.layers.layouts[i].kind != Kind.PLAIN:
                waiting.setdefault((w.dtype, has_master(tensors, i)), []).append(i)
        for alike, items in waiting.items():
            kind = next((kind for kind in kinds if kind[:2] == alike), (*alike, alike[0]))
            kinds.setdefault(kind, []).extend(items)
        return [AdamWRows(self.layers, items, tensors, group_of) for items in kinds.values()]


def has_master(tensors: Tensors, i: int) -> bool:
    return len(tensors.masters) > 0 and tensors.masters[i] is not None


def _alignment(addresses: bytes) -> bytes:
    """Of each address modulo 16, and which there are none of: it decides how rows are updated."""
    numbers = np.frombuffer(addresses, dtype=np.int64)
    return ((numbers & 15) + 16 * (numbers == 0)).tobytes()


def _bits(x: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def _int32(seed: int) -> int:
    return (seed & 0xFFFFFFFF) - ((seed & 0x80000000) << 1)
