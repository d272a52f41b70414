"""Runs of several seeds for the tests of run_together, and what is compared of them."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from spectral_ops.continual.checkpoint import load_checkpoint
from spectral_ops.continual.config import RunConfig

SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}
ADAM = {"optimizer": "adam", "lr": 1e-2, "momentum": 0.0}
FOLDED = {"optimizer": "spectral-adamw", "lr": 1e-2, "momentum": 0.0, "method": "spectral", "strength": 0.05}
SMALL = RunConfig(
    data="digits",
    model_options={"hidden": (12, 9)},
    tasks=2,
    samples=60,
    held_out_samples=40,
    steps=9,
    batch=8,
    probe_samples=20,
    checkpoint_seconds=0.0,
    **SGD,
)
SEEDS = (3, 0)
TIMES = ("step_seconds", "method_seconds")
MODELS = {
    "mlp": {"hidden": (9, 7), "activation": "crelu", "norm": "layer"},
    "conv": {"channels": (4, 5), "hidden": (6,), "activation": "crelu", "norm": "layer"},
    "vit-tiny": {"depth": 2, "width": 8, "heads": 2},
}
# Of weights up to 1.2 after 18 steps: 4e-7 at most, a few roundings. A method that is none moves them by 1e-3 and more.
TOLERANCE = 2e-6


def with_seeds(config, seeds=SEEDS):
    return [replace(config, seed=seed) for seed in seeds]


def folders(path, configs):
    return [path / f"seed-{config.seed}" for config in configs]


def weights(folder):
    return load_checkpoint(folder)["trainer"]["model"]


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


def without_times(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def stop_at(point):
    """Arguments of a run that is stopped after this step."""
    stop = threading.Event()
    return {"stop": stop, "progress": lambda task, step: stop.set() if (task, step) == point else None}
