"""What the tests of bench/train_vit.py share: the smallest runs, here or under torchrun, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_fixtures import ROOT
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from bench.train_vit import main

PROGRAM = ROOT / "bench" / "train_vit.py"
STEPS = 18
LIMIT_S = 100  # of a run, which takes 7: enough for a busy machine, and nothing hangs
SMALLEST = (
    "--model vit-nano --implementation reference --image 32 --classes 4 --samples 24 --batch 12 --turn 2 --warmup 1 "
    f"--steps {STEPS} --learning-rate 2e-3 --strength 0.05 --device cpu --no-compile --timeout 60"
).split()


@contextmanager
def started(processes: int, *arguments: object, program: Path = PROGRAM) -> Iterator[subprocess.Popen[str]]:
    """torchrun, with its output in one pipe; ended with its processes if the test is done with it before it is."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    run = subprocess.Popen(
        [sys.executable, *map(str, (*launcher, program, *arguments))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield run
    finally:
        if run.poll() is None:
            run.terminate()  # which torchrun passes on
            run.wait(LIMIT_S)
        assert run.stdout is not None
        run.stdout.close()


def train(processes: int, out: Path, *options: object) -> dict[str, Any]:
    """The results of a run that must succeed; alone it needs no torchrun, and runs in this process."""
    if processes == 1:
        assert main([*SMALLEST, "--out", str(out), *map(str, options)]) == 0
        return json.loads(out.read_text())
    with started(processes, *SMALLEST, "--out", out, *options) as run:
        said, _ = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, said
    return json.loads(out.read_text())


def losses(results: dict[str, Any]) -> dict[str, list[float]]:
    return {row["penalty"]: row["losses"] for row in results["rows"]}


def saved(checkpoint: Path, folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, put together from the shards, under its path."""
    whole = folder / f"{checkpoint.parent.name}-{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, whole)
    return dict(_flat(torch.load(whole, weights_only=False), ""))


def _flat(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _flat(value, f"{name}/{key}")
