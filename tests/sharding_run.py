"""Worlds of gloo processes that run one function after another, started once: starting costs seconds.

    found = run(3, function, *arguments)    # function(*arguments) on each of three ranks; what each returned

The functions are of the test modules, since they travel by name. A rank that raises or hangs fails the test and ends
its world; the next test gets a new one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo, which this build lacks", allow_module_level=True)

# Of a collective: of one that a dead or raising rank does not join, and with it of all that may hang.
LIMIT = timedelta(seconds=60)
# Processes are forked from one that has imported all that takes time.
PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "spectral_ops", "sharding_run"]


class World:
    """`size` ranks with a process group."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory()
        self.processes = []
        self._pipes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._folder.name, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self._pipes.append(here)

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))

    def receive(self, rank: int, seconds: float = 2 * LIMIT.total_seconds()) -> Any:
        """What the rank returned; RuntimeError with its traceback where it raised, is dead, or takes longer."""
        pipe = self._pipes[rank]
        try:
            if not pipe.poll(seconds):
                raise RuntimeError(f"rank {rank} gave no answer in {seconds} s")
            returned, value = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"rank {rank} died") from error
        if not returned:
            raise RuntimeError(f"rank {rank}: {value}")
        return value

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self.send(function, *arguments)
        end = time.monotonic() + 2 * LIMIT.total_seconds()
        return [self.receive(rank, max(0.0, end - time.monotonic())) for rank in range(len(self.processes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._folder.cleanup()


_worlds: dict[int, World] = {}


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    if world not in _worlds:
        _worlds[world] = World(world)
    try:
        return _worlds[world].run(function, *arguments)
    except BaseException:
        _worlds.pop(world).close()
        raise


@atexit.register
def close() -> None:
    """Ends all worlds; called behind every module, by conftest.py."""
    for world in _worlds.values():
        world.close()
    _worlds.clear()


def _serve(rank: int, size: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=LIMIT)
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # nobody is left to ask
            return
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
