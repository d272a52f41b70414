"""`spectral-ops bench`: runs the benchmarks of the checkout, prints their tables and draws the roofline.

bench/ belongs to the repository and not to the wheel. It is looked for beside the imported package, which is where an
editable install keeps it, then in the current folder and those above it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import torch
import tyro

import spectral_ops

# Together these tell this repository from another that has a bench/ of its own.
MARKS = ("bench/__main__.py", "spectral_ops/benchmark.py")


def find_checkout(places: tuple[Path, ...] | None = None) -> Path | None:
    """The checkout that holds bench/, None where there is none; places: where to look, in that order."""
    here = Path.cwd()
    places = places or (Path(spectral_ops.__file__).resolve().parents[1], here, *here.parents)
    return next((place for place in places if all((place / mark).is_file() for mark in MARKS)), None)


def command_of(name: str, without_picture: str) -> ModuleType | None:
    """The checkout's bench.__main__; None, and why on stderr, where there is no checkout or nothing to draw with.

    Args:
        name: of the subcommand that asks.
        without_picture: how the same is measured without matplotlib.
    """
    root = find_checkout()
    if root is None:
        print(
            f"spectral-ops {name}: expected a checkout of spectral_ops, whose bench/ is not part of the installed "
            f"package, got none beside {Path(spectral_ops.__file__).parent} nor above {Path.cwd()}. Clone the "
            f"repository and run spectral-ops {name} inside it.",
            file=sys.stderr,
        )
        return None
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError:  # now, not after the minutes of measuring
        print(
            f"spectral-ops {name}: expected matplotlib to be installed, got none. In the checkout: pip install "
            f"'.[continual]', or measure without a picture: {without_picture}.",
            file=sys.stderr,
        )
        return None
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # before any other package called bench; spectral_ops itself is imported already
    return importlib.import_module("bench.__main__")


def main(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    only: tuple[str, ...] = (),
    models: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    quick: bool = False,
    full: bool = False,
    minutes: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None,
    threads: int = 2,
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
) -> int:
    """Measure on this machine, print the tables, and draw GB/s over bytes under the measured roof.

    Args:
        device: auto takes CUDA where there is a device.
        only: ops, such as accumulate_grad; all of them unless given.
        models: such as vit-b; those worth it on the device unless given.
        dtypes: float32, bfloat16; both on CUDA, float32 on a CPU unless given.
        quick: small models, few rounds: that everything runs.
        full: with everything that compiles for minutes; no time limit.
        minutes: no case is begun after; the benchmark's own limit unless given.
        threads: of the CPU.
        out: folder of the results; bench/results of the checkout unless given.
    """
    command = command_of("bench", "python -m bench")
    if command is None:
        return 1
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = ["--device", device, "--threads", str(threads), "--roofline"]
    for option, values in (("--only", only), ("--models", models), ("--dtypes", dtypes)):
        arguments += [option, *values] if values else []
    arguments += ["--quick"] * quick + ["--full"] * full
    arguments += ["--minutes", str(minutes)] if minutes is not None else []
    arguments += ["--out", str(out)] if out is not None else []
    status: int = command.main(arguments)
    return status
