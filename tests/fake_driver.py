"""A driver for Triton that loads and runs nothing: kernels are compiled for sm_90, launches are written down.

For a process of its own, in which TRITON_INTERPRET is not set: `process`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from torch import Tensor


class Launch(NamedTuple):
    """What a launcher was handed, but for the metadata, which is made anew each time, for hooks."""

    grid: tuple[int, int, int]
    stream: int
    function: int
    packed: Any
    hooks: tuple[Any, Any]
    arguments: list[Any]  # a tensor by its address, for which launchers take it


class FakeDriver:
    """Two devices or more; `device` and `stream` are the current ones."""

    def __init__(self) -> None:
        self.device, self.stream = 0, 100
        self.launches: list[Launch] = []
        self._loaded = 0
        self.utils = self

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return self._launch

    def _launch(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any, *rest: Any
    ) -> None:
        enter, leave, *arguments = rest
        for hook in (enter, leave):  # around the launch, as a launcher calls them
            if hook is not None:
                hook(metadata)
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self.launches.append(Launch((x, y, z), stream, function, packed, (enter, leave), values))

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        self._loaded += 1
        return self._loaded, 1000 * device + self._loaded, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@functools.cache
def _driver() -> FakeDriver:
    return FakeDriver()  # one in a process: kernels keep to the driver that they were loaded by


def install() -> FakeDriver:
    from triton.runtime import driver

    fake = _driver()
    driver.set_active(fake)
    return fake


@contextmanager
def counted_launches_by_triton() -> Iterator[list[str]]:
    """A list that grows at every kernel[grid](...)."""
    from triton import JITFunction

    calls: list[str] = []
    run = JITFunction.run

    def count(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(self.fn.__name__)
        return run(self, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", count)
        yield calls


def process() -> ProcessPoolExecutor:
    """One process with Triton's compiler, whatever the tests' own has."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_compile)


def _compile() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.nice(5)
