"""Networks, or methods on them, that cannot take their steps together."""

from __future__ import annotations

REMEDY = "Give each seed a process of its own: compare with workers."


class CannotShare(ValueError):
    """The runs are right, each by itself."""
