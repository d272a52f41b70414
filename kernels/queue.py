"""The ordered queue: programs take tiles in order, publish what they have written, and wait for others'.

Tiles that a tile waits for have lower tickets, so that programs that run hold them: any grid makes progress, with no
grid-wide barrier. tests/test_queue_protocol.py tries every interleaving. debug_barrier() stands before every release
and after every acquire because Triton 3.6 has one thread do both and does not order the others' accesses by it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import COUNTERS, FIRST_COUNTER, STOPPED


@triton.jit
def row_counters(counters, row_index):
    return counters + FIRST_COUNTER + row_index * COUNTERS


@triton.jit
def stall(counters, ticket, seed):
    """For stress tests: up to ~100 us of looking at nothing, by a hash of the ticket and the seed."""
    x = ticket.to(tl.uint32) * 0x9E3779B9 + seed
    x = (x ^ (x >> 15)) * 0x846CA68B
    left = ((x >> 20) & 0x7F).to(tl.int32)
    while left > 0:
        # A ticket is never negative: the loop cannot be left out, and ends when it has looked often enough.
        left -= 1 + tl.minimum(tl.atomic_add(counters, 0, sem="acquire"), 0)


@triton.jit
def publish(counter):
    """Everything written before is seen by whoever sees the counter; returns its old value."""
    tl.debug_barrier()
    old = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return old


@triton.jit
def wait(counter, needed, counters, ticket, looks, DEBUG: tl.constexpr):
    """Until the counter has reached `needed`. A debug build gives up after `looks` and leaves word in the counters."""
    if DEBUG:
        seen = tl.atomic_add(counter, 0, sem="acquire")
        left = looks
        while (seen < needed) & (left > 0):
            seen = tl.atomic_add(counter, 0, sem="acquire")
            left -= 1
        if seen < needed:
            tl.atomic_cas(counters + STOPPED, 0, ticket + 1)
    else:
        while tl.atomic_add(counter, 0, sem="acquire") < needed:
            pass
    tl.debug_barrier()
