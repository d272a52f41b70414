"""`spectral-ops scale`: what the penalty costs on vision transformers from S to 22B, measured where they fit.

The code is bench/scale.py of a checkout, found as `spectral-ops bench` finds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from spectral_ops.benchmark import command_of


def main(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    models: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    ranks: tuple[int, ...] = (),
    images: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None,
    quick: bool = False,
    threads: int = 2,
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
) -> int:
    """Measure the ladder on this machine, and predict it on H200s and for every number of ranks.

    Args:
        device: auto takes CUDA where there is a device.
        models: such as vit-b or vit-22b; all of them unless given, of which a CPU measures those up to vit-l.
        dtypes: to measure: float32, bfloat16; both on CUDA, float32 on a CPU unless given. Both are predicted.
        ranks: to predict for, whole nodes of 8 beyond 8; 1 8 64 256 1024 unless given.
        images: of one rank in a training step, which the penalty's share is of; 64 unless given.
        quick: one narrow block, few rounds: that everything runs.
        threads: of the CPU.
        out: folder of the results; bench/results of the checkout unless given.
    """
    command = command_of("scale", "python -m bench scale")
    if command is None:
        return 1
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = ["scale", "--device", device, "--threads", str(threads)]
    for option, values in (("--models", models), ("--dtypes", dtypes), ("--ranks", ranks)):
        arguments += [option, *map(str, values)] if values else []
    arguments += ["--quick"] * quick
    arguments += ["--images", str(images)] if images is not None else []
    arguments += ["--out", str(out)] if out is not None else []
    status: int = command.main(arguments)
    return status
