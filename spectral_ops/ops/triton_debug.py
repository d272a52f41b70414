"""SPECTRAL_OPS_DEBUG=1: every wait of the kernel ends after so many looks, and says which tile waited for which.

SPECTRAL_OPS_DELAYS=seed, beside it, stalls programs at random before each tile: the results must not change.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from spectral_ops.backends import getenv
from spectral_ops.kernels import table
from spectral_ops.ops.triton_rows import Rows

# Looks at a counter before a wait gives up: about a second on a GPU. The interpreter looks a thousand times a second.
LOOKS, LOOKS_INTERPRETED = 1 << 20, 100


NONE: dict[str, Any] = {}


def debug_settings() -> dict[str, Any]:
    """The debug fields of the kernel's Work."""
    if getenv("SPECTRAL_OPS_DEBUG") != "1":
        return NONE
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    looks = LOOKS_INTERPRETED if interpreted else LOOKS
    return {"debug": True, "looks": looks, "delays": int(os.environ.get("SPECTRAL_OPS_DELAYS", "0"))}


def check_stopped(work: Any, rows: Rows, names: Sequence[str]) -> None:
    """Raises RuntimeError where a tile of the last launch waited in vain; syncs with the device.

    The counters are set back, so that the next launch starts afresh.
    """
    ticket = int(work.counters[table.STOPPED.value].item()) - 1
    if ticket < 0:
        return
    what, row, part, iteration = work.tiles[ticket].tolist()
    own = table.FIRST_COUNTER.value + table.COUNTERS.value * row
    counters = work.counters[own : own + table.COUNTERS.value].tolist()
    reads, combined, finished = (counters[i.value] for i in (table.READS, table.COMBINED, table.FINISHED))
    strips, blocks = (int(rows.template[row, i.value]) for i in (table.STRIPS, table.BLOCKS))
    name = names[rows.items[rows.owner[row]]]
    if what == table.COMBINE_TILE.value:
        tile, awaited = f"combining block {part}", f"{strips * (iteration + 1)} strips read, found {reads}"
    elif what >= table.GRADIENT_TILE.value:
        tile, awaited = f"the gradient of strip {part}", f"{iteration} iterations finished, found {finished}"
    else:
        tile, awaited = f"reading strip {part}", f"{iteration} iterations finished, found {finished}"
    work.counters.zero_()
    work.space.zero_()
    raise RuntimeError(
        f"spectral_ops: expected every wait of the kernel to end, got ticket {ticket}, {tile} of {name} (row {row}, "
        f"iteration {iteration}), that waited for {awaited} ({combined} of {blocks} blocks combined). "
        "This is a defect of the kernel or its table: please report it; SPECTRAL_OPS_BACKEND=reference goes without."
    )
