"""Streams of tasks by name. A new one is a file with a subclass of Stream and a line here."""

from __future__ import annotations

from typing import Any

from spectral_ops.continual.choices import check_options, choose
from spectral_ops.continual.data import Dataset
from spectral_ops.continual.streams.adversarial import LeastLikelyLabel, NextLabel
from spectral_ops.continual.streams.class_incremental import ClassIncremental
from spectral_ops.continual.streams.data_incremental import DataIncremental
from spectral_ops.continual.streams.label_flipping import LabelFlipping
from spectral_ops.continual.streams.permuted_pixels import PermutedPixels
from spectral_ops.continual.streams.random_labels import RandomLabels
from spectral_ops.continual.streams.stream import Stream, Task

STREAMS: dict[str, type[Stream]] = {
    "random-labels": RandomLabels,
    "permuted-pixels": PermutedPixels,
    "label-flipping": LabelFlipping,
    "class-incremental": ClassIncremental,
    "data-incremental": DataIncremental,
    "next-label": NextLabel,
    "least-likely-label": LeastLikelyLabel,
}
COMMON = ("seed", "tasks", "samples", "held_out_samples")

__all__ = ["STREAMS", "Stream", "Task", "build_stream"]


def build_stream(name: str, train: Dataset, held_out: Dataset, *, options: dict[str, Any], **common: Any) -> Stream:
    """The stream of that name; `common`: seed, tasks, samples, held_out_samples. ValueError for what it refuses."""
    kind = choose("stream", name, STREAMS)
    for option in COMMON:
        if option in options:
            flag = option.replace("_", "-")
            raise ValueError(f"stream {name}: expected {option} outside of its options, got both. Use --{flag}.")
    return kind(train, held_out, **common, **check_options(f"stream {name}", kind, options, set_elsewhere=COMMON))
