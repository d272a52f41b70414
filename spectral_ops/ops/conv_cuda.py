"""csrc's blocks for conv operators on CUDA: a table on the device, a workspace for every stream, three launches a step.

Addresses of weights and gradients go along as arguments of the launches, so that nothing is uploaded at a step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.capture import capturing, refuse_first
from spectral_ops.ops.native_table import DTYPE_CODES
from spectral_ops.ops.snapshot import Addresses, Snapshot

if TYPE_CHECKING:
    from spectral_ops.ops.layer_table import LayerTable

# For tests: CPU tensors by the same blocks, emulated (csrc/conv_emulated.cpp), as if on this many multiprocessors.
EMULATED_MULTIPROCESSORS = 3
NO_NUMBER = (1.0, 0, 0)


class Built(NamedTuple):
    """The blocks of a table, where they were uploaded, and the tensors that they were made for."""

    weights: Snapshot
    gradients: Snapshot
    blocks: Any
    uploaded: Tensor


class ConvCudaTable:
    """Built anew where a tensor's shape, strides or dtype changed; the first call must not be under capture."""

    seed = 0  # of the order of emulated blocks

    def __init__(self, layers: LayerTable):
        self.layers = layers
        self._built: dict[bool, Built] = {}  # with gradients or without
        self._workspaces: dict[Any, Tensor] = {}  # of a build and stream
        self._captured: list[tuple[Built, Tensor]] = []  # used at every replay of a CUDA graph: kept with the table
        self._last_stream: Any = None
        self._running = False
        # Two threads with the same layouts share a table, and a stream: one's launches must not come between another's.
        self._lock = threading.RLock()

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds a launch of it."""
        return len(self._captured) > 0

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: Any,
        exponent: float,
        strength: float | Tensor = 1.0,
        grad_scale: float | Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        iterations: int = 1,
        sigma_state: Tensor | None = None,
        addresses: Addresses | None = None,
    ) -> Tensor:
        """strength * R (0-d) and the next state, as TritonTable.step."""
        v, v_new, exponents, exponents_new, sigma, u = state
        value = v.new_empty(())
        with self._lock, _on(v.device):
            built, w, g = self._at(weights, gradients, addresses)
            factor, scale = self._number("strength", strength, v), self._number("grad_scale", grad_scale, v)
            skip, skip_type = (0, 0) if found_inf is None else (found_inf.data_ptr(), DTYPE_CODES[found_inf.dtype])
            for i in range(iterations):  # several without gradients only
                self._launch(
                    built,
                    w,
                    g,
                    v.data_ptr(),
                    v_new.data_ptr(),
                    exponents.data_ptr(),
                    exponents_new.data_ptr(),
                    sigma.data_ptr(),
                    0 if u is None or i + 1 < iterations else u.data_ptr(),
                    value.data_ptr(),
                    exponent,
                    factor,
                    scale,
                    skip,
                    skip_type,
                    None,
                    device=v.device,
                )
                v, exponents = v_new, exponents_new
        if sigma_state is not None:
            sigma_state.copy_(sigma)
            state.v.copy_(v_new)
        return value

    def backward(
        self,
        weights: Sequence[Tensor],
        out: Sequence[Tensor],
        sigma: Tensor,
        u: Tensor,
        v: Tensor,
        exponent: float,
        upstream: Tensor,
    ) -> None:
        """Overwrites `out` with upstream * dR/dW, from what a step returned."""
        with self._lock, _on(v.device):
            built, w, g = self._at(weights, out, None)
            given = (sigma.data_ptr(), u.data_ptr(), v.data_ptr())
            factor = self._number("upstream", upstream, v)
            self._launch(
                built, w, g, 0, 0, 0, 0, 0, 0, 0, exponent, factor, NO_NUMBER, 0, 0, given, device=v.device
            )  # fmt: skip

    def _number(self, name: str, value: float | Tensor | None, like: Tensor) -> tuple[float, int, int]:
        if value is None:
            return NO_NUMBER
        if not isinstance(value, Tensor):
            return float(value), 0, 0
        if value.device != like.device:
            if capturing(like.device):
                raise RuntimeError(
                    f"spectral_ops: expected {name} on {like.device} while a CUDA graph is captured, got a tensor on "
                    f"{value.device}. Make it there: torch.tensor(1e-3, device={str(like.device)!r})."
                )
            return value.item(), 0, 0  # of the CPU: waits for nothing
        return 1.0, value.data_ptr(), DTYPE_CODES[value.dtype]

    def _at(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], addresses: Addresses | None
    ) -> tuple[Built, Addresses, Addresses]:
        key = len(gradients) > 0
        built = self._built.get(key)
        if built is not None:
            w = addresses if addresses is not None else built.weights.addresses(weights)
            g = built.gradients.addresses(gradients)
            if w is not None and g is not None:
                return built, w, g
        self.layers.check_gradients(weights, gradients)
        device = weights[0].device
        refuse_first("a step of conv operators", device)
        for name, weight in zip(self.layers.names, weights, strict=True):
            if weight.numel() == 0:
                got = f"shape {tuple(weight.shape)}"
                raise ValueError(f"spectral_ops: expected {name} to have channels, got {got}. Exclude it.")
        multiprocessors = EMULATED_MULTIPROCESSORS
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        blocks = self.layers.native.table(weights, gradients).blocks(multiprocessors)
        uploaded = torch.frombuffer(bytearray(blocks.bytes), dtype=torch.uint8).to(device)
        built = Built(Snapshot(weights), Snapshot(gradients), blocks, uploaded)
        old = self._built.get(key)
        if old is not None:
            self._workspaces = {place: x for place, x in self._workspaces.items() if place[0] != id(old.blocks)}
        self._built[key] = built
        return built, [w.data_ptr() for w in weights], [g.data_ptr() for g in gradients]

    def _launch(self, built: Built, *numbers: Any, device: torch.device) -> None:
        stream = None
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            in_graph = capturing(device)
            if not in_graph and self._last_stream is not None and self._last_stream != stream:
                stream.wait_stream(self._last_stream)
            self._last_stream = self._last_stream if in_graph else stream
        workspace = self._workspace(built, stream, device)
        if self._running:  # the last launch was not made: what it would have left is unknown
            workspace.zero_()
        self._running = True
        place = (-1, self.seed) if stream is None else (stream.device_index, stream.cuda_stream)
        error = built.blocks.step(built.uploaded.data_ptr(), workspace.data_ptr(), *numbers, *place)
        if error:
            text = backends.native().cuda_error_text(error)
            raise RuntimeError(f"spectral_ops: expected the launch of conv operators to succeed, got {text}.")
        self._running = False

    def _workspace(self, built: Built, stream: torch.cuda.Stream | None, device: torch.device) -> Tensor:
        if capturing(device):
            # Of its own, from the graph's pool, so that replays and later steps share none.
            workspace = torch.zeros(built.blocks.workspace_bytes, dtype=torch.uint8, device=device)
            self._captured.append((built, workspace))
            return workspace
        place = (id(built.blocks), 0 if stream is None else stream.cuda_stream)
        found = self._workspaces.get(place)
        if found is None:
            with torch.inference_mode(False):  # of whatever kind the tensors of a later call are
                found = torch.zeros(built.blocks.workspace_bytes, dtype=torch.uint8, device=device)
            self._workspaces[place] = found
            if stream is not None:  # which reads it past the time when another stream may hand it back
                built.uploaded.record_stream(stream)
        return found


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
