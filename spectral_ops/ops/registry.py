"""Registration of ops with torch: the raw library interface, whose calls cost less than torch.library.custom_op's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("spectral_ops", "DEF")


def define(schema: str, implementation: Callable[..., Any], *, fake: Callable[..., Any]) -> None:
    """Defines spectral_ops::<name>. One implementation serves every device and chooses its backend itself.

    Schemas carry no default arguments: with a list of tensors, torch's backward fails where an argument equals its
    default.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CPU")
    LIBRARY.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"spectral_ops::{name}", fake, lib=LIBRARY)
