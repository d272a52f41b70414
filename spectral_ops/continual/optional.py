"""Packages that only some commands need: imported when they are needed, and their absence is a readable error."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, operation: str) -> Any:
    """The module `module`, for `operation`; its absence is an error that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # The whole error is shown: a module that is there but broken fails here too.
        raise RuntimeError(
            f"{operation}: expected {module} to be importable, got {type(error).__name__}: {error}. "
            "Install it from a checkout of spectral_ops: pip install '.[continual]'."
        ) from error
