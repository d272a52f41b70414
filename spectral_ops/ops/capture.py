"""What the capture of a CUDA graph forbids, and what must be there before it."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is launched on this device now goes into a graph and does not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_first(what: str, device: torch.device) -> None:
    """Raises under capture: tables made there would be filled by a replay alone, and not for steps that run before.

    Args:
        what: the step that has no table yet for the tensors it was given.
    """
    if capturing(device):
        raise RuntimeError(
            f"spectral_ops: expected {what} before a CUDA graph of it is captured, got none with these weights and "
            "gradients. Run a step or two first, as torch asks for warm-up anyway."
        )
