"""The configuration of a run: everything that decides what is trained, and how it is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunConfig:
    """One network trained on one stream of tasks by one method."""

    stream: str = "random-labels"
    """The stream of tasks."""
    data: str = "mnist"
    """The images."""
    model: str = "mlp"
    """The network."""
    method: str = "none"
    """The method, or package.module:Class for one of your own."""
    strength: float | None = None
    """The method's strength; None: its default."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the method."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Options of the network, e.g. activation=crelu norm=layer."""
    stream_options: dict[str, Any] = field(default_factory=dict)
    """Further options of the stream."""
    optimizer: str = "adam"
    """adam or sgd; spectral-adamw, adam with the penalty of method spectral folded into its step. Weight decay is a
    method: l2, or l2-decoupled, which makes AdamW of adam."""
    lr: float = 1e-3
    """Learning rate."""
    momentum: float = 0.0
    """Of sgd."""
    seed: int = 0
    """Decides the stream, the initial weights and the method's own randomness."""
    tasks: int = 10
    """Tasks of the stream."""
    samples: int = 1200
    """Training samples of the stream; 0: all there are."""
    held_out_samples: int = 0
    """Held-out samples; 0: all there are."""
    steps: int = 1500
    """Optimizer steps per task."""
    batch: int = 16
    """Samples per step."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """Of the CPU; results on a CPU are the same bits for the same number."""
    checkpoint_seconds: float = 30.0
    """A checkpoint is written at every task's end, and within a task when the last one is so old."""
    probe_samples: int = 256
    """Samples of the task that the measures of units, features and gradients are taken on."""
    data_root: Path | None = None
    """Folder of the data sets; None: the environment variable SPECTRAL_OPS_DATA."""
