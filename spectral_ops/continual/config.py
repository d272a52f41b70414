"""The configuration of a run: everything that decides what is trained, and how it is written down."""

from __future__ import annotations

import inspect
import math
import textwrap
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from spectral_ops.continual.field_texts import field_texts

# What numbers are taken: of a field from and to. `trainer.check` refuses others, and help() says so.
RANGES: dict[str, tuple[float, float]] = {
    "tasks": (1, math.inf),
    "samples": (0, math.inf),
    "held_out_samples": (0, math.inf),
    "steps": (1, math.inf),
    "batch": (1, math.inf),
    "threads": (1, 1024),
    "probe_samples": (2, math.inf),
    "lr": (0, 100),
    "momentum": (0, 1),
    "checkpoint_seconds": (0, math.inf),
    "strength": (0, math.inf),
}
Class = TypeVar("Class")
_WIDTH = 116  # of a line of the docstring, in which help() indents it by four


def _shown_by_help(kind: type[Class]) -> type[Class]:
    """The class with a docstring that has, of every field, its type, default, range and the text under it.

    help() ignores those texts, and written into the docstring as well they would be there twice.
    """
    kind.__doc__ = inspect.cleandoc(kind.__doc__ or "")
    try:
        texts = field_texts(kind)
    except OSError:  # installed without its source
        return kind
    lines = ["", "", "Args:"]
    for one in fields(kind):  # type: ignore[arg-type]
        default = one.default if one.default_factory is MISSING else one.default_factory()
        text = " ".join(texts[one.name].split())
        if one.name in RANGES:
            low, high = RANGES[one.name]
            text += f" At least {low:g}." if high == math.inf else f" From {low:g} to {high:g}."
        entry = f"{one.name} ({one.type}, default {default!r}): {text}"
        lines += textwrap.wrap(entry, _WIDTH, initial_indent="    ", subsequent_indent="        ")
    kind.__doc__ += "\n".join(lines) + "\n"
    return kind


@_shown_by_help
@dataclass(frozen=True)
class RunConfig:
    """One network trained on one stream of tasks by one method."""

    stream: str = "random-labels"
    """The stream of tasks: random-labels, permuted-pixels, label-flipping, class-incremental, data-incremental,
    next-label or least-likely-label."""
    data: str = "mnist"
    """The images: digits, mnist, fashion-mnist, cifar-10, cifar-100, cifar-100-coarse, svhn or tiny-imagenet."""
    model: str = "mlp"
    """The network: mlp, conv, resnet18, vit-tiny, vit-small or vit-base."""
    method: str = "none"
    """The method: none, l2, l2-decoupled, l2-init, wasserstein, parseval, spectral, spectral-norm, weight-clipping,
    shrink-and-perturb, redo, continual-backprop, fire, optimizer-reset or reset; or package.module:Class for one of
    your own."""
    strength: float | None = None
    """The method's strength, its option of that name; None: its default."""
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
    """Of sgd; 0 with another optimizer."""
    seed: int = 0
    """Decides the stream, the initial weights and the method's own randomness."""
    tasks: int = 10
    """Tasks of the stream."""
    samples: int = 1200
    """Training samples of the stream; 0: all there are."""
    held_out_samples: int = 0
    """Held-out samples; 0: all there are. A stream that holds nothing out, as random-labels, does not look at it."""
    steps: int = 1500
    """Optimizer steps per task."""
    batch: int = 16
    """Samples per step: the next ones in passes over all of the task, each pass in an order of its own. More than the
    task has, and some count several times in a step."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """Threads of the CPU; results on a CPU are the same bits for the same number."""
    checkpoint_seconds: float = 30.0
    """Seconds: a checkpoint is written at every task's end, and within a task when the last one is so old."""
    probe_samples: int = 256
    """Samples of the task that the measures of units, features and gradients are taken on."""
    data_root: Path | None = None
    """Folder of the data sets; None: the environment variable SPECTRAL_OPS_DATA."""


def check_types(config: RunConfig, operation: str = "run") -> None:
    """TypeError for what is no RunConfig, or one with a value of another type; an int is taken for a float."""
    if not isinstance(config, RunConfig):
        raise TypeError(
            f"{operation}: expected a RunConfig, got {config!r} of type {type(config).__name__}. "
            "Make one: RunConfig(data='digits', tasks=5)."
        )
    for name, hint in typing.get_type_hints(RunConfig).items():
        value, kinds = getattr(config, name), _classes(hint)
        taken = kinds + (int,) * (float in kinds) + (str,) * (Path in kinds)
        if not isinstance(value, taken) or isinstance(value, bool):  # no field is yes or no
            listed = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
            default = getattr(RunConfig, name, {})  # a table has none that all would share
            raise TypeError(
                f"{operation}: expected {name} to be {listed}, got {value!r} of type {type(value).__name__}. "
                f"Change {spelled(name)}, for instance to {default!r}."
            )


def spelled(name: str) -> str:
    """A field as Python and the command line write it."""
    return f"{name} (--{name.replace('_', '-')})"


def _classes(hint: Any) -> tuple[type, ...]:
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(typing.get_origin(kind) or kind for kind in alternatives)
