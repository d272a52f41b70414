"""The kernels' table of layers: cut once for a set of shapes, uploaded again only where an address changed.

Counters, workspace and uploaded rows belong to one stream, or to one capture of a CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime import driver

from spectral_ops.kernels import table
from spectral_ops.kernels.penalty import Work, launch_penalty
from spectral_ops.kernels.penalty_backward import launch_penalty_backward
from spectral_ops.ops.capture import refuse_first
from spectral_ops.ops.snapshot import Addresses, Snapshot, as_bytes
from spectral_ops.ops.state import State
from spectral_ops.ops.triton_debug import check_stopped, debug_settings
from spectral_ops.ops.triton_rows import Rows

if TYPE_CHECKING:
    from spectral_ops.ops.layer_table import LayerTable

# Whether partial sums are combined in a fixed order. It should cost under 3 % (docs/performance.md); with False they go
# through relaxed atomics, unless torch.use_deterministic_algorithms(True) asks for the same bits every time.
FIXED_ORDER = True


class Cuts(NamedTuple):
    """The rows for a list of tensors, and how these looked."""

    weights: Snapshot
    gradients: Snapshot
    addresses: bytes
    rows: list[Rows]


class TritonTable:
    """The table for one list of layouts; cut anew where a tensor's shape, strides, dtype or device changed."""

    def __init__(self, layers: LayerTable):
        self.layers = layers
        self._cuts: dict[tuple[bool, int], Cuts] = {}  # (with gradients or without, iterations)
        self._memories: dict[tuple[int, int], Memory] = {}  # (rows, stream)
        # What CUDA graphs use at every replay, kept with the table: rows, and what they were uploaded from or a memory.
        self._captured: list[tuple[Rows, Tensor | Memory]] = []
        self._last_stream: Any = None
        # Two threads with the same layouts share a table: addresses and launch must stay together.
        self.lock = threading.RLock()

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds a launch of it."""
        return len(self._captured) > 0

    def make_memory(self, rows: Rows, captured: list[tuple[Rows, Tensor | Memory]] | None = None) -> Memory:
        return Memory(rows, captured)

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: State,
        exponent: float,
        strength: float | Tensor = 1.0,
        grad_scale: float | Tensor | None = None,
        found_inf: Tensor | None = None,
        iterations: int = 1,
        addresses: Addresses | None = None,
        sigma_state: Tensor | None = None,
    ) -> Tensor:
        """strength * R (0-d) and the next state; gradients, where given, += strength * grad_scale * dR/dW.

        sigma_state: given, it receives sigma, and v the next v, beside what is kept for a backward in state.
        addresses: of the weights, where the caller has just compared them with the ones of the last call.
        """
        values = []
        with self.lock, torch.cuda.device_of(state.v):
            found, both = self._cut(weights, gradients, iterations, addresses)
            stream = self._stream(state.v)
            for rows in found:
                value = state.v.new_empty(())  # float32, as all vectors of these kernels are
                values.append(value)
                memory = self._memory(rows, stream)
                work = memory.work(both, exponent)
                factor = memory.scalar("strength", strength)
                scale = None if grad_scale is None else memory.scalar("grad_scale", grad_scale)
                memory.begin()
                launch_penalty(work, *state, value, factor, scale, found_inf, iterations, sigma_state)
                memory.end()
                if work.debug:
                    check_stopped(work, rows, self.layers.names)
        return values[0] if len(values) == 1 else torch.stack(values).sum()

    def backward(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        exponent: float,
        upstream: Tensor,
        accumulate: bool = False,
    ) -> None:
        """gradients = upstream * dR/dW, or += where accumulate is set, from what a step returned."""
        with self.lock, torch.cuda.device_of(v):
            found, addresses = self._cut(weights, gradients, 1)
            stream = self._stream(v)
            for rows in found:
                work = self._memory(rows, stream).work(addresses, exponent)
                launch_penalty_backward(work._replace(tiles=rows.gradient_tiles), sigma, u, v, upstream, accumulate)

    def works(self, weights: Sequence[Tensor], exponent: float) -> list[tuple[Memory, Work]]:
        """Of each dtype, for launches on the current stream and device that make other use of the rows than a step."""
        found, addresses = self._cut(weights, (), 1)
        stream = self._stream(weights[0])
        memories = [self._memory(rows, stream) for rows in found]
        return [(memory, memory.work(addresses, exponent)) for memory in memories]

    def _cut(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        iterations: int,
        known_weights: Addresses | None = None,
    ) -> tuple[list[Rows], bytes]:
        """One set of rows for every pair of dtypes, and the addresses of all weights, then of all gradients."""
        key = (len(gradients) > 0, iterations)
        known = self._cuts.get(key)
        if known is not None:
            w = known_weights if known_weights is not None else known.weights.addresses(weights)
            g = known.gradients.addresses(gradients)
            if w is not None and g is not None:
                addresses = as_bytes(w) + as_bytes(g)
                if addresses == known.addresses or _alignment(addresses) == _alignment(known.addresses):
                    return known.rows, addresses
        refuse_first("a step", weights[0].device)
        self.layers.check_gradients(weights, gradients)
        addresses = as_bytes([t.data_ptr() for t in (*weights, *gradients)])
        rows = self._rows(weights, gradients, iterations)
        if known is not None:  # what belonged to them is of no more use
            old = {id(x) for x in known.rows}
            self._memories = {place: memory for place, memory in self._memories.items() if place[0] not in old}
        self._cuts[key] = Cuts(Snapshot(weights), Snapshot(gradients), addresses, rows)
        return rows, addresses

    def _rows(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], iterations: int) -> list[Rows]:
        pairs: dict[Any, list[int]] = {}
        for i, w in enumerate(weights):
            pairs.setdefault((w.dtype, gradients[i].dtype if gradients else w.dtype), []).append(i)
        return [Rows(self.layers, items, weights, gradients, iterations) for items in pairs.values()]

    def _stream(self, t: Tensor) -> torch.cuda.Stream | None:
        """The current one, made to wait for the last launch, whose vectors are read. None on a CPU or under capture."""
        if not t.is_cuda or torch.cuda.is_current_stream_capturing():
            return None
        index, last = t.get_device(), self._last_stream
        handle = driver.active.get_current_stream(index)  # a number: an object of it costs ten times that
        if last is not None and last.cuda_stream == handle and last.device_index == index:
            return last
        stream = torch.cuda.current_stream(index)
        if last is not None:
            stream.wait_stream(last)
        self._last_stream = stream
        return stream

    def _memory(self, rows: Rows, stream: torch.cuda.Stream | None) -> Memory:
        if stream is None and rows.device.type == "cuda":
            return self._memory_of_graph(rows)
        place = (id(rows), 0 if stream is None else stream.cuda_stream)
        memory = self._memories.get(place)
        if memory is None:
            memory = self._memories[place] = self.make_memory(rows)
            if stream is not None:
                rows.used_on(stream)
        rows.stock()
        return memory

    def _memory_of_graph(self, rows: Rows) -> Memory:
        """One of its own, so that replays and later launches do not share a workspace.

        The first graph gets the one that stands ready, filled by the warm-up: its launch is then a single node. Others
        get one of their pool, in which the memory may be used again once the launch has ended, and fill it at every
        replay, by six more nodes.
        """
        handed = any(held is rows and isinstance(what, Memory) for held, what in self._captured)
        ready = next((place for place in self._memories if place[0] == id(rows)), None)
        if handed or ready is None:
            return self.make_memory(rows, self._captured)
        memory = self._memories.pop(ready)
        memory.belongs_to_graph(self._captured)
        self._captured.append((rows, memory))
        return memory


class Memory:
    """What the launches of one stream on one set of rows share: uploaded rows, counters, workspace, scalars."""

    @torch.inference_mode(False)  # in place later, in whatever mode
    def __init__(self, rows: Rows, captured: list[tuple[Rows, Tensor | Memory]] | None = None):
        self.rows = rows
        self._captured = captured
        device = rows.device
        count = table.FIRST_COUNTER.value + table.COUNTERS.value * len(rows.template)
        self._counters = torch.zeros(count, dtype=torch.int32, device=device)
        self._space = torch.zeros(rows.space_size, dtype=torch.float32, device=device)
        self._sums = torch.zeros(rows.sums_size, dtype=torch.float64, device=device)
        self._uploaded = torch.empty_like(rows.template, device=device)
        self._addresses = b""
        self._work: Work | None = None
        self._settings: tuple[float, bool, dict[str, Any]] | None = None
        self._scalars: dict[str, tuple[float, Tensor]] = {}
        self._running = False

    def work(self, addresses: bytes, exponent: float) -> Work:
        """The kernel's Work, with these addresses in its rows."""
        rows = self.rows
        if addresses != self._addresses:
            staged = rows.stage(addresses)  # torch keeps it until the copy has read it
            if self._captured is not None:
                self._captured.append((rows, staged))
            self._uploaded.copy_(staged, non_blocking=True)
            self._addresses = addresses
        settings = (exponent, FIXED_ORDER or torch.are_deterministic_algorithms_enabled(), debug_settings())
        if self._work is None or self._settings != settings:
            self._settings = settings
            self._work = Work(
                self._uploaded,
                rows.tiles,
                self._counters,
                self._space,
                self._sums,
                self.scalar("exponent", exponent),
                rows.weight_type,
                rows.gradient_type,
                rows.cut.read_variants,
                rows.cut.gradient_variants,
                exponent == 2.0,
                rows.cut.shape.warps,
                rows.cut.shape.registers,
                rows.programs,
                settings[1],
                **settings[2],
            )
        return self._work

    def scalar(self, name: str, value: float | Tensor) -> Tensor:
        """On the device: a tensor as it is, a number in float64, written again only when it changes."""
        if isinstance(value, Tensor):
            if self._captured is not None and value.device != self.rows.device:
                raise RuntimeError(
                    f"spectral_ops: expected {name} on {self.rows.device} while a CUDA graph is captured, got a tensor "
                    f"on {value.device}. Make it there: torch.tensor(1e-3, device={str(self.rows.device)!r})."
                )
            return value if value.device == self.rows.device else value.to(self.rows.device, non_blocking=True)
        held = self._scalars.get(name)
        if held is None:
            with torch.inference_mode(False):
                held = (value, torch.full((1,), value, dtype=torch.float64, device=self.rows.device))
        elif held[0] != value:
            held = (value, held[1].fill_(value))
        self._scalars[name] = held
        return held[1]

    def belongs_to_graph(self, captured: list[tuple[Rows, Tensor | Memory]]) -> None:
        """From now on, as of one made under capture: what is uploaded to it must outlive the graph, in `captured`."""
        self._captured = captured

    def begin(self) -> None:
        if self._running:  # the last launch was not made: what it would have left is unknown
            self._counters.zero_()
            self._space.zero_()
        self._running = True

    def end(self) -> None:
        self._running = False


def _alignment(addresses: bytes) -> bytes:
    """Of each address modulo 16: it decides between variants of the kernel."""
    return (np.frombuffer(addresses, dtype=np.int64) & 15).tobytes()
