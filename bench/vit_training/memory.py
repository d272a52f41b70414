"""Peak memory of one of several models that take turns in a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Writing 5 to the first sets the second's VmHWM back to what is resident now (proc(5)).
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Memory:
    """Of one model; `held` is what it keeps between its turns, `peak` the most in a counted turn. None: not known."""

    def __init__(self) -> None:
        self.held: int | None = None
        self.peak: int | None = None

    @contextmanager
    def building(self) -> Iterator[None]:
        yield

    @contextmanager
    def turn(self, counted: bool) -> Iterator[None]:
        yield


class CudaMemory(Memory):
    """What torch has allocated, without what the other models keep meanwhile."""

    @contextmanager
    def building(self) -> Iterator[None]:
        with self._growth():
            yield

    @contextmanager
    def turn(self, counted: bool) -> Iterator[None]:
        others = torch.cuda.memory_allocated() - (self.held or 0)
        torch.cuda.reset_peak_memory_stats()
        with self._growth():  # moments come with the first step
            yield
        if counted:
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated() - others)

    @contextmanager
    def _growth(self) -> Iterator[None]:
        before = torch.cuda.memory_allocated()
        yield
        self.held = (self.held or 0) + torch.cuda.memory_allocated() - before


class ResidentMemory(Memory):
    """The whole process as Linux sees it, with the models of the other penalties, libraries and the data in it."""

    @contextmanager
    def turn(self, counted: bool) -> Iterator[None]:
        CLEAR.write_text("5")
        yield
        if counted:
            self.peak = max(self.peak or 0, _resident_peak())


def memory_of(kind: str) -> tuple[type[Memory], str]:
    """The account for a kind of device, and what its numbers are."""
    if kind == "cuda":
        return CudaMemory, "allocated by torch on this device, the other penalties' models left out"
    if CLEAR.exists():
        return ResidentMemory, "resident in the process, the other penalties' models included"
    return Memory, "not known on this system"


def _resident_peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])
