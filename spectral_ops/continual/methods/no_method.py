"""none: the task's loss alone."""

from __future__ import annotations

from spectral_ops.continual.methods.method import Method


class NoMethod(Method):
    """Nothing is added and nothing changed; what the other methods are compared with."""
