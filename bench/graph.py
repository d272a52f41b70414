"""A call captured in a CUDA graph: what it costs when the host starts everything at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# torch asks for some calls on the side before a capture, for libraries to allocate what they keep; compiled code
# compiles its backward in the first and may pick another kernel in the second.
WARMUP = 3


class Captured:
    """`run` as a CUDA graph, captured by `capture` or at the first call; every call then replays it.

    Args:
        run: what it reads and writes must stay where it is: state and gradients are updated in place.
    """

    def __init__(self, run: Callable[[], Any]):
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None
        self.held_bytes = 0  # device memory that the graph keeps to itself between calls

    def capture(self) -> None:
        """Runs WARMUP times, which advances whatever `run` advances, and captures once; nothing where that is done."""
        if self._graph is not None:
            return
        # One stream for both: a gradient accumulator made on another stream would tie the capture to it.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.result = self._run()
        self.held_bytes = torch.cuda.memory_reserved() - before
        self._graph = graph

    def __call__(self) -> Any:
        self.capture()
        assert self._graph is not None
        self._graph.replay()
        return self.result
