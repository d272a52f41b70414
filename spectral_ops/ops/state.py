"""What a launched step reads and writes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """The vectors of a step, in the order that launchers take them. What is written may be what is read."""

    v: Tensor
    v_out: Tensor
    exponents: Tensor
    exponents_out: Tensor
    sigma: Tensor
    u: Tensor | None
