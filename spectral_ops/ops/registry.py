"""Registration of ops with torch: the raw library interface, whose calls cost less than torch.library.custom_op's."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("spectral_ops", "DEF")

# torch.compile's own CUDA graphs (mode "reduce-overhead") leave these ops out: they keep tables and workspaces of their
# own on the device, which must not come from the pool of one graph. A graph that a user captures takes them in.
UNCAPTURED = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))

OURS = ("spectral_ops", "torch")  # between a caller and an op's implementation


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is outside autocast, which reaches into an op's implementation and rounds its products."""

    @functools.wraps(function)
    def outside(*args: Any) -> Any:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)

    return outside


def warn(message: str) -> None:
    """A RuntimeWarning at the line that called this library: at one of ours it would be shown once for all calls."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level + 1)


def define(schema: str, implementation: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """Defines spectral_ops::<name>. One implementation serves every device and chooses its backend itself.

    Schemas carry no default arguments: with a list of tensors, torch's backward fails where an argument equals its
    default.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=UNCAPTURED)
    LIBRARY.impl(name, without_autocast(implementation), "CPU")
    LIBRARY.impl(name, without_autocast(implementation), "CUDA")
    torch.library.register_fake(f"spectral_ops::{name}", fake, lib=LIBRARY)
