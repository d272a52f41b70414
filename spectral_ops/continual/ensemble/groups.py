"""How many runs share their steps: as many as stay in the processor's cache from one step to the next."""

from __future__ import annotations

from pathlib import Path

_COPIES = 4  # of a network's parameters, which a step reads and writes: weights, gradients, two moments
_SHARE = 2 / 3  # of the cache; the rest is for batches, activations and others on this processor
_CACHE = 16 << 20  # bytes, where the system does not say
_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux


def runs_at_once(parameter_bytes: int, threads: int) -> int:
    """Of runs with so many bytes of parameters each, on a CPU.

    At least 2, since sharing is what was asked for; a multiple of the threads if as many fit: products of several
    networks are handed out to threads network by network, and one too many leaves a thread waiting.
    """
    fit = int(_SHARE * cache_bytes() / (_COPIES * parameter_bytes))
    return max(2, fit if fit < threads else fit // threads * threads)


def cache_bytes(folder: Path = _SYSTEM) -> int:
    """Of the largest cache that the system names, which several processors may share."""
    try:
        sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    except OSError:
        sizes = []
    return max((int(size[:-1]) << 10 for size in sizes if size[:-1].isdigit() and size.endswith("K")), default=_CACHE)
