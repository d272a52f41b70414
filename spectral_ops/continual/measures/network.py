"""A model to be looked at without leaving a trace."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spectral_ops.conv_sizes import unchanged


class Network(nn.Module):
    """A model as functions of its parameters: whatever runs in here finds copies of the buffers in their place."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.model, self.substitutes = model, parameters

    def call(self, function: Callable[[], Any], parameters: Mapping[str, Tensor] | None = None) -> Any:
        """function(), which may use the model."""
        held = {**(self.substitutes if parameters is None else parameters)}
        held |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self, {f"model.{name}": tensor for name, tensor in held.items()}, (function,))

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


@contextlib.contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Eager, with gradients, and all that `unchanged` puts back: modes, random states, what modules hold."""
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(unchanged(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap's, of attention
        yield


def usable(tensor: Tensor) -> Tensor:
    """Without a graph, and in one: tensors made under inference_mode cannot be."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
