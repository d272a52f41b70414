"""What a network is like at one moment: its loss, weights, units and gradients."""

from __future__ import annotations

from spectral_ops.continual.measures.probe import probe

__all__ = ["probe"]
