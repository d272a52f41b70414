"""Where benchmarks run: the clock, the memory floor, peak memory and the description of a CPU or a CUDA device."""

from __future__ import annotations

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from spectral_ops import backends

# Read before each cold sample on CUDA: several times the L2 of any device so far (H200: 60 MB). Read, not written:
# lines left dirty would be written back within the sample.
FLUSH_BYTES = 256 << 20
CUDA_CHUNK_BYTES = 32 << 10  # csrc/floor.h: kCudaChunkBytes
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # beyond any cache
COPY_ROUNDS = 7
HOST_ROUNDS, HOST_BUDGET_S = 9, 0.5


def counted_bytes(read: Sequence[Tensor], update: Sequence[Tensor]) -> int:
    """Bytes an op must move: `read` once, `update` twice, read and written (docs/design.md, section 3)."""
    return sum(t.numel() * t.element_size() for t in read) + 2 * sum(t.numel() * t.element_size() for t in update)


class Device:
    """A CPU with so many threads, or the current CUDA device.

    Raises:
        RuntimeError: CUDA is asked for and there is none.
    """

    def __init__(self, kind: str = "cpu", threads: int = 2):
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"Device: expected kind to be cpu or cuda, got {kind!r}. Name one of these.")
        if threads < 1:
            raise ValueError(f"Device: expected threads to be at least 1, got {threads}. Leave --threads out for 2.")
        if kind == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("Device: expected a CUDA device, got none that torch can use. Use --device cpu.")
        self.kind, self.threads = kind, threads
        torch.set_num_threads(threads)
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=kind) if kind == "cuda" else None

    # ---- time ----

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def sample(self, run: Callable[[], Any], calls: int = 1) -> float:
        """Seconds per call, everything that was queued included; caches as the previous contender left them."""
        if self.kind == "cpu":
            return time_calls(run, calls)
        self.synchronize()
        # Events, not the host's clock: they leave out the ~10 us of the final synchronisation, and where the host is
        # too slow to keep the device busy they show that, since the first event waits for nothing.
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        self.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    def cold_sample(self, run: Callable[[], Any], calls: int = 1) -> float:
        """`sample` with the device's L2 full of something else; on a CPU just `sample`."""
        if self._flush is not None:
            self._flush.sum()
        return self.sample(run, calls)

    # ---- memory ----

    def floor(self, read: Sequence[Tensor], update: Sequence[Tensor]) -> tuple[Callable[[], Any], str]:
        """The fastest plain pass over this memory (`read` read, `update` read and written, unchanged), and what it is.

        Raises:
            RuntimeError: on a CPU, the compiled module is missing.
        """
        read, update = [t for t in read if t.numel()], [t for t in update if t.numel()]
        if self.kind == "cpu":
            native = backends.native()
            blocks = [[(t.data_ptr(), t.numel() * t.element_size()) for t in ts] for ts in (read, update)]
            return lambda: native.floor(*blocks, self.threads), "csrc floor"
        if backends.available()["native"] is None and hasattr(backends.native(), "floor_cuda"):
            return self._cuda_floor(read, update), "csrc floor_cuda"
        half = counted_bytes(read, update) // 2
        source, target = (torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2))
        return lambda: target.copy_(source), "device copy of as many bytes"

    def _cuda_floor(self, read: Sequence[Tensor], update: Sequence[Tensor]) -> Callable[[], None]:
        native = backends.native()
        chunks = cut(read, update, CUDA_CHUNK_BYTES).cuda()
        sink = torch.zeros(1, dtype=torch.int32, device="cuda")
        index = torch.cuda.current_device()

        def run() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            error = native.floor_cuda(chunks.data_ptr(), chunks.shape[0], sink.data_ptr(), index, stream)
            if error:
                raise RuntimeError(f"floor_cuda: {native.cuda_error_text(error)}")

        return run

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Memory that a call takes beyond what is allocated before it; None on a CPU, where torch keeps no account."""
        if self.kind == "cpu":
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, run: Callable[[], Any]) -> int | None:
        """What one call has the device do: kernels, copies and fills, as torch.profiler sees them; None on a CPU.

        Replayed from a CUDA graph they count as they do outside it, though the host starts them with one call.
        """
        if self.kind == "cpu":
            return None
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                run()
                self.synchronize()
        except RuntimeError as error:  # a column less, not a run less
            print(f"launches: the profiler failed: {error}", file=sys.stderr)
            return None
        # None rather than 0, which no call here can be: the profiler may not look at the device.
        return count_launches(profiled.events()) or None

    def host_seconds(self, run: Callable[[], Any]) -> float | None:
        """Seconds until a call returns, the device idle before and not waited for: the median; None on a CPU.

        Where the call has the device do more than its queue holds (about 1000 launches), or reads a result, part of it
        is waiting.
        """
        if self.kind == "cpu":
            return None
        times: list[float] = []
        while len(times) < HOST_ROUNDS and sum(times) < HOST_BUDGET_S:
            self.synchronize()
            times.append(time_calls(run, 1))
        self.synchronize()
        return statistics.median(times)

    def copy_rate(self) -> float:
        """Bytes per second of a large torch copy, reads and writes both counted."""
        source = torch.zeros(COPY_BYTES[self.kind], dtype=torch.uint8, device=self.kind)
        target = torch.zeros_like(source)  # written once, so that its pages exist
        times = [self.sample(lambda: target.copy_(source)) for _ in range(COPY_ROUNDS)]
        return 2 * source.numel() / sorted(times)[COPY_ROUNDS // 2]

    # ---- description ----

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.kind == "cuda" else f"{processor_name()}, {vectors()}"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        facts: dict[str, Any] = {"type": self.kind, "name": name, "cores": cores, "threads": self.threads}
        facts["slug"] = slug(name if self.kind == "cuda" else f"{name} {cores} cores")
        if self.kind == "cuda":
            p = torch.cuda.get_device_properties(torch.cuda.current_device())
            facts |= {"capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count, "memory": p.total_memory}
        return facts


def time_calls(run: Callable[[], Any], calls: int, now: Callable[[], float] = time.perf_counter) -> float:
    start = now()
    for _ in range(calls):
        run()
    return (now() - start) / calls


def count_launches(events: Iterable[Any]) -> int:
    """The events of a profile that ran on the device, but for the ranges that mark regions of code there."""
    on_device = (e for e in events if e.device_type == DeviceType.CUDA)
    return sum(not getattr(e, "is_user_annotation", False) for e in on_device)


def cut(read: Sequence[Tensor], update: Sequence[Tensor], chunk_bytes: int) -> Tensor:
    """(chunks, 3) int64: address, bytes, whether it is written; as csrc/floor.h: FloorChunk."""
    rows = []
    for tensors, write in ((read, 0), (update, 1)):
        for t in tensors:
            total = t.numel() * t.element_size()
            rows += [(t.data_ptr() + at, min(chunk_bytes, total - at), write) for at in range(0, total, chunk_bytes)]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def vectors() -> str:
    """The widest instructions that torch uses: processors of one name, as a virtual machine gives it, may differ."""
    return torch.backends.cpu.get_cpu_capability()


def processor_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A file name: 'NVIDIA H200' -> 'nvidia-h200'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
