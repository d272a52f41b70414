"""The ranges of options."""

from __future__ import annotations


def require_range(method: str, name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low <= value <= high; NaN is refused."""
    if not low <= value <= high:
        raise ValueError(f"{method}: expected {name} from {low:g} to {high:g}, got {value}. Set {name}.")
