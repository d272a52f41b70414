"""What a run of bench/train_vit.py is asked to do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PENALTIES = ("none", "l2", "usual", "accumulate", "spectral-adamw")
SIZES = {  # width, blocks, heads: bench/models.py names the sources; the first is the smallest that runs
    "vit-nano": (48, 2, 3),
    "vit-ti": (192, 12, 3),
    "vit-s": (384, 12, 6),
    "vit-b": (768, 12, 12),
    "vit-l": (1024, 24, 16),
    "vit-h": (1280, 32, 16),
}
IMAGE = {"synthetic": 224, "tiny-imagenet": 64}
SHARDS = ("fsdp", "hsdp", "ddp", "none")
# What may differ between the two runs that a checkpoint joins: where and how they run, not what is trained.
FREE = ("shard", "replicas", "compile", "device", "timeout", "turn", "warmup", "out", "resume", "checkpoint",
        "checkpoint_every", "stop_at", "data_root")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """See `parser_of` for what each means."""

    model: str = "vit-l"
    implementation: str = "auto"
    penalty: tuple[str, ...] = ("none",)
    data: str = "synthetic"
    data_root: Path | None = None
    samples: int | None = None
    classes: int = 1000
    image: int | None = None
    patch: int | None = None
    batch: int = 64
    steps: int = 60
    stop_at: int | None = None
    turn: int = 5
    warmup: int = 2
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    strength: float = 1e-3
    clip: float | None = None
    precision: str = "bf16"
    compile: bool = True
    shard: str | None = None
    replicas: int | None = None
    checkpoint: Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    seed: int = 0
    device: str = "auto"
    timeout: float = 600.0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "classes", "image", "patch", "batch", "steps", "stop_at", "turn", "replicas",
                     "checkpoint_every"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise _error(f"--{name.replace('_', '-')} >= 1", value, "Change it")
        for name in ("learning_rate", "weight_decay", "strength", "clip", "timeout", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise _error(f"--{name.replace('_', '-')} finite and not negative", value, "Change it")
        if len(set(self.penalty)) < len(self.penalty):
            raise _error("every --penalty once", " ".join(self.penalty), "Leave the second one out")
        if self.replicas is not None and self.shard != "hsdp":
            raise _error("--shard hsdp with --replicas", self.shard, "Add it, or leave --replicas out")
        if self.checkpoint is None and (self.resume or self.checkpoint_every):
            which = "--resume" if self.resume else "--checkpoint-every"
            raise _error(f"--checkpoint with {which}", "none", "Name the folder of the checkpoints")

    @property
    def side(self) -> int:
        """Of an image, in pixels."""
        return self.image or IMAGE[self.data]

    @property
    def end(self) -> int:
        """The step before which this process ends; the learning rate's schedule is that of all steps."""
        return min(self.steps, self.stop_at or self.steps)

    def trained(self) -> dict[str, Any]:
        """What must be the same where a run goes on from a checkpoint."""
        shown = {name: value for name, value in self.shown().items() if name not in FREE}
        return shown | {"image": self.side}

    def shown(self) -> dict[str, Any]:
        """All of them, as JSON holds them."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        return plain | {"penalty": list(self.penalty)}


def _error(condition: str, got: object, remedy: str) -> ValueError:
    return ValueError(f"train_vit: expected {condition}, got {got}. {remedy}.")


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options of a command line.

    Raises:
        ValueError: values that cannot be.
        SystemExit: an unknown option or choice, with a message; or --help.
    """
    found = vars(parser_of().parse_args(arguments))
    return Options(**found | {"penalty": tuple(found["penalty"])})


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train_vit", description="Train a ViT, and measure what a penalty costs.")
    unset = Options()

    def add(name: str, text: str, **how: Any) -> None:
        default = getattr(unset, name.replace("-", "_"))
        how = {"default": default} | how
        parser.add_argument(f"--{name}", help=f"{text} [{default}]" if default is not None else text, **how)

    add("model", ", ".join(SIZES), choices=SIZES, metavar="MODEL")
    add("implementation", "timm's ViT, the reference trainer's, or timm's where it is installed",
        choices=("auto", "timm", "reference"))  # fmt: skip
    parser.add_argument(
        "--penalty", nargs="+", default=list(unset.penalty), choices=PENALTIES, metavar="PENALTY",
        help=f"{', '.join(PENALTIES)}; several are trained in turns, each on a copy of its own [none]",
    )  # fmt: skip
    add("data", "what the images are", choices=IMAGE)
    add("data-root", "folder of the data sets; SPECTRAL_OPS_DATA unless given", type=Path)
    add("samples", "images; of synthetic ones 1024 unless given, else all", type=int)
    add("classes", "of synthetic images", type=int)
    add("image", "side in pixels: 224 synthetic, 64 Tiny-ImageNet's own", type=int)
    add("patch", "side of a patch; 4 to images of 32, 8 to 64, else 16", type=int)
    add("batch", "images of a step, of all processes together", type=int)
    add("steps", "optimizer steps of the whole training, which the learning rate follows", type=int)
    add("stop-at", "end this process after so many of them, with a checkpoint", type=int)
    add("turn", "steps of one penalty before the next one's turn; what is timed", type=int)
    add("warmup", "first turns that are not counted: compilers and caches", type=int)
    add("learning-rate", "at its highest, after a tenth of the steps; then a cosine to zero", type=float)
    add("weight-decay", "of l2 alone: AdamW's decoupled decay", type=float)
    add("strength", "of the spectral penalties", type=float)
    add("clip", "largest norm of the task's gradient; the penalty comes after", type=float)
    add("precision", "of forward and backward; weights and optimizer are float32", choices=("bf16", "fp32"))
    add("compile", "torch.compile each block", action=argparse.BooleanOptionalAction)
    add("shard", "fsdp for several processes unless given, else none", choices=SHARDS)
    add("replicas", "of hsdp: copies of the model; one on every machine unless given", type=int)
    add("checkpoint", "folder of the checkpoints, seen by all processes", type=Path)
    add("checkpoint-every", "steps; the last one is always saved", type=int)
    add("resume", "go on from the newest checkpoint there, or begin where there is none", action="store_true")
    add("seed", "of weights, images and their order", type=int)
    add("device", "cuda where there is one", choices=("auto", "cuda", "cpu"))
    add("timeout", "seconds after which processes give up waiting for each other", type=float)
    add("out", "JSON file of the results, or the folder for one that is named by device and date", type=Path)
    return parser
