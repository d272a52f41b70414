"""The optimizer of a run, and what its penalty adds between backward and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bench.baselines import usual_penalty
from bench.vit_training.network import Network
from bench.vit_training.options import Options
from spectral_ops import SpectralAdamW, SpectralRegularizer
from spectral_ops.layers import Entry
from spectral_ops.ops.layout import as_matrices

NOTES = {
    "none": "AdamW without weight decay",
    "l2": "AdamW with decoupled weight decay of all parameters",
    "usual": "the usual code after backward, on whole weights, gathered layer by layer where they are sharded",
    "accumulate": "SpectralRegularizer.accumulate_grad_() after backward",
    "spectral-adamw": "SpectralAdamW",
}
Vectors = dict[str, Any]  # tensors by name, nested: the same in every process


@dataclass
class Penalised:
    """Args: optimizer; add, called after backward and clipping; vectors and load_vectors: what else a checkpoint
    holds."""

    optimizer: torch.optim.Optimizer
    add: Callable[[], object] = lambda: None
    vectors: Callable[[], Vectors] = dict
    load_vectors: Callable[[Vectors], object] = lambda vectors: None


def penalise(name: str, network: Network, options: Options, place: Callable[[], None]) -> Penalised:
    """The penalty of that name and an optimizer; calls `place` where the network may be sharded.

    The usual code reads what the parameters are, and where its vectors start, from the whole network: it knows no
    shards. All penalties treat the same parameters: weights and biases, without norms, which the usual code leaves out.
    """
    reading: dict[str, Any] = {"norms": False, "rules": network.rules or None}
    entries, start = read_whole(network.module, reading) if name == "usual" else ([], {})
    place()
    parameters = list(network.module.parameters())
    common: dict[str, Any] = {"lr": options.learning_rate, "fused": parameters[0].device.type == "cuda" or None}
    if name == "spectral-adamw":
        optimizer = SpectralAdamW(
            parameters, weight_decay=0.0, model=network.module, strength=options.strength, **reading, **common
        )
        return Penalised(
            optimizer,
            vectors=optimizer.spectral_state_dict,
            load_vectors=optimizer.load_spectral_state_dict,
        )
    plain = torch.optim.AdamW(parameters, weight_decay=options.weight_decay if name == "l2" else 0.0, **common)
    if name == "accumulate":
        reg = SpectralRegularizer(network.module, strength=options.strength, **reading)
        return Penalised(plain, reg.accumulate_grad_, reg.state_dict, reg.load_state_dict)
    if name == "usual":
        usual = UsualPenalty(entries, start, options.strength)
        return Penalised(plain, usual.accumulate_grad_, usual.state_dict, usual.load_state_dict)
    return Penalised(plain)


def read_whole(model: nn.Module, reading: dict[str, Any]) -> tuple[list[Entry], dict[str, Tensor]]:
    """What is treated, and the v of its matrices, converged."""
    reg = SpectralRegularizer(model, strength=1.0, **reading)
    return [entry for entry in reg.entries if entry.layout is not None], reg.state_dict()["v"]


class UsualPenalty:
    """The usual code on whole weights, each process the same.

    Sharded, a layer's weights are gathered, and its gradient computed and cut to the shard, before the next layer's
    turn: no more than one layer is ever whole. Otherwise all layers are one term.

    Args:
        entries: what is treated.
        start: the v of its matrices, (parts, n) by parameter name.
        strength: the coefficient.
    """

    def __init__(self, entries: list[Entry], start: dict[str, Tensor], strength: float):
        self.v, self._strength = start, strength
        # Held as they are now, sharded: between forward and backward the modules may have whole ones.
        held = [(entry.parameter, entry) for entry in entries]
        sharded = any(isinstance(parameter, DTensor) for parameter, _ in held)
        self._terms: dict[object, list[tuple[nn.Parameter, Entry]]] = {}
        for parameter, entry in held:
            self._terms.setdefault(entry.module if sharded else None, []).append((parameter, entry))

    def accumulate_grad_(self) -> None:
        for members in self._terms.values():
            weights: dict[str, Sequence[Tensor]] = {}
            biases: list[Tensor] = []
            for parameter, entry in members:
                assert entry.layout is not None
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                parts = as_matrices(whole, entry.layout).unbind()
                if entry.layout.is_matrix:
                    weights[entry.name] = parts
                else:
                    biases += parts
            v = [x for name in weights for x in self.v[name]]
            value, v = usual_penalty([w for parts in weights.values() for w in parts], biases, v)
            (self._strength * value).backward()
            for name, parts in weights.items():
                self.v[name] = torch.stack(v[: len(parts)])
                v = v[len(parts) :]

    def state_dict(self) -> Vectors:
        return {"v": dict(self.v)}

    def load_state_dict(self, vectors: Vectors) -> None:
        self.v = dict(vectors["v"])
