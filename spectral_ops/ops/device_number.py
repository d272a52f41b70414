"""A number that kernels read from the device."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_ops.ops.capture import capturing


class DeviceNumber:
    """Float64 on a device, written there again only when it changes."""

    def __init__(self) -> None:
        self._held: tuple[float, Tensor] | None = None

    def at(self, value: float, device: torch.device) -> Tensor:
        """0-d."""
        if capturing(device):  # the write is a node of the graph: what runs before a replay would find another number
            return torch.full((), value, dtype=torch.float64, device=device)
        if self._held is None or self._held[1].device != device:
            with torch.inference_mode(False):  # in place later, in whatever mode
                self._held = value, torch.full((), value, dtype=torch.float64, device=device)
        elif self._held[0] != value:
            self._held = value, self._held[1].fill_(value)
        return self._held[1]
