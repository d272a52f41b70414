"""Networks of one kind side by side: their parameters in one tensor each, all of those in one memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectral_ops.continual.ensemble.flat import Flat
from spectral_ops.continual.ensemble.passes import AutogradPass, WrittenPass
from spectral_ops.continual.ensemble.refused import CannotShare
from spectral_ops.continual.models import Model


class Stack:
    """S networks whose parameters lie in one tensor for each name, one network's below the other's.

    A parameter (m, ...) becomes (S * m, ...), so that whatever acts on single entries or on rows acts on the stack as
    it is, and a weight of S matrices is what a packed layer has. The networks are used as before: their parameters are
    views of the stack.

    Args:
        networks: of one class and of the same shapes, on one device; their parameters are given another storage.

    Raises:
        CannotShare: a network with BatchNorm.
    """

    def __init__(self, networks: Sequence[Model]):
        for name, module in networks[0].named_modules():
            if isinstance(module, _BatchNorm):
                raise CannotShare(
                    f"run_together: expected a model without batch statistics, got BatchNorm in {name!r}. Choose "
                    "another norm, e.g. --model-options norm=group, or compare with workers."
                )
        self.networks = list(networks)
        self.model = model = copy.deepcopy(networks[0])
        """Carries the stacked parameters under a network's names, for methods and optimizer; it is not called."""
        stacked = {
            name: torch.cat([network.get_parameter(name).detach() for network in networks])
            for name, _ in model.named_parameters()
        }
        trained = {name: stacked[name] for name, p in model.named_parameters() if p.requires_grad}
        self.layout = layout = Flat(trained)
        """Of the memory that the trained parameters lie in, and of their gradients where the chain rule is written."""
        memory = layout.zeros()
        for name, place in layout.views(memory).items():
            stacked[name] = place.copy_(stacked[name])
        for name, whole in stacked.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(whole, name in trained))
            for network, part in zip(networks, whole.chunk(len(networks)), strict=True):
                network.get_parameter(name).data = part
        gradients = layout.zeros()
        rule = model.stacked(self._split(stacked), self._split(layout.views(gradients)))
        self._pass: AutogradPass | WrittenPass
        self.flat: nn.Parameter | None = None
        """All trained parameters as one, where the gradients are one tensor, too: for optimizers that treat every entry
        alike. Six small calls fewer in every step of an MLP."""
        if rule is None:
            self._pass = AutogradPass(model, self._split(stacked))
        else:
            self._pass = WrittenPass(rule)
            for name, gradient in layout.views(gradients).items():
                model.get_parameter(name).grad = gradient
            self.flat = nn.Parameter(memory)
            self.flat.grad = gradients

    def __len__(self) -> int:
        return len(self.networks)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """A batch of every network: its scores, (S, B, classes), and the gradients of the loss, the sum over networks
        of each one's mean cross-entropy, in place of those that the stacked parameters had.

        Args:
            x: (S, B, ...).
            y: (S, B), classes.
        """
        return self._pass(x, y)

    def split(self, stacked: Tensor) -> Tensor:
        """(S * m, ...) as (S, m, ...)."""
        return stacked.unflatten(0, (len(self), -1))

    def _split(self, stacked: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.split(tensor) for name, tensor in stacked.items()}
