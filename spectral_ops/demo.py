"""The demo: loss of plasticity on real images, and what keeps a network trainable.

A network learns one task after another. Every task has the same images with freshly drawn random labels, so all tasks
are equally hard, and accuracy that falls over the stream is lost plasticity. Four methods see the same streams:

    none      the task's loss alone
    l2        + strength * sum ||theta||_2^2 over weights and biases, as Adam's coupled weight_decay = 2 * strength
    spectral  + strength * R(theta), by SpectralRegularizer.accumulate_grad_
    reset     a freshly initialised network and optimizer per task, no penalty: what can be learned with nothing carried

The accuracy of a task is the training accuracy on its samples after its last step; network and Adam's moments are
carried from task to task. Every process computes with one thread, so the results depend on the seeds and on the
processor's vectors alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import pairwise
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer
from spectral_ops.continual.data import load_images
from spectral_ops.continual.described import described
from spectral_ops.continual.optional import require
from spectral_ops.continual.streams.stream import stream_generator, stream_inputs, task_batches, task_labels
from spectral_ops.plots import best_strengths, draw_results, read_results, summary_table, sweep_table

Records = Generator[dict[str, Any], None, None]

METHODS = ("none", "l2", "spectral", "reset")
SWEEP_SEEDS = (0, 1, 2)
SWEEP_STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # the same trials for l2 and for spectral
RESET_TASKS = 5  # per seed; tasks are alike, so a few give the level

# The stream of each data set, long enough for `none` to stop learning.
STREAMS: dict[str, dict[str, int]] = {
    "digits": {"tasks": 25, "samples": 1000, "steps": 800, "batch": 32},
    "mnist": {"tasks": 20, "samples": 1200, "steps": 1500, "batch": 16},
    "fashion-mnist": {"tasks": 20, "samples": 1200, "steps": 1500, "batch": 16},
}
QUICK = {"tasks": 4, "steps": 300}

# Mean accuracy over all tasks and the seeds 0, 1, 2 by strength: `spectral-ops demo --tune --data <name>`, 2026-11-23,
# torch 2.13.0 (CPU). Another order of summation in the penalty moves the spectral figures by about 0.005.
SWEEPS: dict[tuple[str, str], tuple[float, ...]] = {
    ("digits", "l2"): (0.4567, 0.5474, 0.6599, 0.5375, 0.1181, 0.1159, 0.1159),
    ("digits", "spectral"): (0.6374, 0.7201, 0.7730, 0.7573, 0.6717, 0.5684, 0.4741),
    ("mnist", "l2"): (0.4896, 0.6517, 0.9043, 0.9657, 0.9448, 0.1143, 0.1143),
    ("mnist", "spectral"): (0.6879, 0.8649, 0.9766, 0.9923, 0.9891, 0.9827, 0.9674),
}
SWEEP_OF = {"digits": "digits", "mnist": "mnist", "fashion-mnist": "mnist"}  # fashion-mnist has no sweep of its own yet

SIGMA_COLUMNS = "sigma 0, 2, ...: sigma_max of the first, second, ... Linear layer by its place among layers and ReLUs."


@dataclass(frozen=True)
@described()
class DemoConfig:
    """Train on a stream of tasks with random labels, with and without spectral regularization."""

    data: Literal["digits", "mnist", "fashion-mnist"] = "digits"
    """Images: digits ships with scikit-learn, the others are read from the data root."""
    data_root: Path | None = None
    """Folder that holds MNIST/raw and FashionMNIST/raw; None: the environment variable SPECTRAL_OPS_DATA."""
    out: Path = Path("runs/demo")
    """Folder for results.jsonl, table.txt and demo.png (and sweep.json); those of an earlier run are replaced."""
    seeds: tuple[int, ...] = (10, 11, 12)
    """Seeds to report; the strengths were chosen on others (0, 1, 2)."""
    quick: bool = False
    """A smoke test of seconds: 4 tasks of 300 steps, the first seed only. Too short to show the effect."""
    tune: bool = False
    """First choose the strengths by a sweep on seeds 0, 1, 2 with equal trials per method, and write sweep.json."""
    tasks: int | None = None
    """Tasks per stream; None: 25 for digits, 20 for the others."""
    samples: int | None = None
    """Images per task; None: 1000 for digits, 1200 for the others."""
    steps: int | None = None
    """Optimizer steps per task; None: 800 for digits, 1500 for the others."""
    batch: int | None = None
    """Samples per step; None: 32 for digits, 16 for the others."""
    hidden: tuple[int, ...] = (100, 100)
    """Widths of the hidden layers."""
    lr: float = 1e-3
    """Learning rate of Adam, the same for all methods."""
    l2: float | None = None
    """Strength of l2; None: the best of the sweep on the default stream."""
    spectral: float | None = None
    """Strength of spectral; None: the best of the sweep on the default stream."""
    workers: int = 2
    """Processes with one thread each; 1 trains in this process. The results do not depend on it."""


class WorkerError(RuntimeError):
    """A worker process raised an error or died."""


class Job(NamedTuple):
    """One stream to train on: a method with its strength, and a seed."""

    method: str
    strength: float
    seed: int


class Learner:
    """A network with its optimizer and penalty; initial weights depend on (seed, task) alone."""

    def __init__(self, config: DemoConfig, job: Job, pixels: int, task: int = 0) -> None:
        widths = (pixels, *config.hidden, 10)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_generator(job.seed, task, "weights").initial_seed())
            layers = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.ReLU())]
        self.model = nn.Sequential(*layers[:-1])
        decay = 2 * job.strength if job.method == "l2" else 0.0
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, weight_decay=decay, fused=True)
        self.penalty = SpectralRegularizer(self.model, strength=job.strength) if job.method == "spectral" else None

    def train(self, x: Tensor, labels: Tensor, batches: Tensor) -> float:
        """Take one step per row of `batches`; returns seconds per step."""
        start = time.perf_counter()
        for rows in batches:
            loss = F.cross_entropy(self.model(x[rows]), labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            if self.penalty is not None:
                self.penalty.accumulate_grad_()
            self.optimizer.step()
        return (time.perf_counter() - start) / len(batches)

    @torch.no_grad()
    def measure(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
        """Accuracy, loss and the exact sigma_max of every layer; None for what is not finite."""
        scores = self.model(x)
        weights = {name: w for name, w in self.model.named_parameters() if w.ndim == 2}
        sigma = {
            name: float(torch.linalg.matrix_norm(w, 2)) if w.isfinite().all() else None for name, w in weights.items()
        }
        loss = float(F.cross_entropy(scores, labels))
        accuracy = float((scores.argmax(1) == labels).double().mean())
        return {"accuracy": accuracy, "loss": loss if math.isfinite(loss) else None, "sigma": sigma}


def train_stream(config: DemoConfig, job: Job, images: Tensor) -> Records:
    """Train one job; one record per task, as it ends. `config` is a filled one (see `fill`)."""
    assert config.samples and config.steps and config.batch
    x = stream_inputs(images, job.seed, config.samples)
    for task in range(tasks_of(config, job)):
        if task == 0 or job.method == "reset":
            learner = Learner(config, job, x.shape[1], task)
        labels = task_labels(job.seed, task, config.samples)
        batches = task_batches(job.seed, task, config.samples, config.steps, config.batch)
        seconds = learner.train(x, labels, batches)
        yield {**job._asdict(), "task": task, **learner.measure(x, labels), "step_seconds": seconds}


def tasks_of(config: DemoConfig, job: Job) -> int:
    assert config.tasks is not None
    return min(config.tasks, RESET_TASKS) if job.method == "reset" else config.tasks


def time_steps(config: DemoConfig, strengths: dict[str, float], rounds: int = 9, steps: int = 60) -> dict[str, float]:
    """Median seconds per step of each method: interleaved, in one thread, while no worker runs."""
    jobs = [Job(method, strengths[method], seed) for seed in range(rounds + 1) for method in METHODS[:3]]
    seconds = [r["step_seconds"] for r in run_share(replace(config, tasks=1, steps=steps), jobs)]
    return {m: statistics.median(seconds[i::3][1:]) for i, m in enumerate(METHODS[:3])}  # the first round warms up


def run_jobs(config: DemoConfig, jobs: list[Job]) -> Records:
    """The records of all jobs, each as its task ends; the order between workers is not fixed.

    Raises:
        WorkerError: a worker raised (it has printed its traceback) or was killed.
    """
    if config.workers == 1:
        yield from run_share(config, jobs)
        return
    context = get_context("spawn")  # fork is not safe once torch has started threads
    workers: dict[Any, Any] = {}
    try:
        # Ctrl-C reaches every process of the terminal. The workers inherit the blocked signal; their parent ends them.
        resource_tracker.ensure_running()  # spawn's helper: it unblocks the signal when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for first in range(min(config.workers, len(jobs))):
            ours, theirs = context.Pipe(duplex=False)
            share = jobs[first :: config.workers]
            process = context.Process(target=_work, args=(config, share, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a worker's death is the end of its pipe
            workers[ours] = process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        running = list(workers)
        while running:
            ready: list[Any] = wait(running)
            for connection in ready:
                try:
                    record = connection.recv()
                except (EOFError, OSError):  # the worker has ended
                    running.remove(connection)
                    workers[connection].join()
                    if code := workers[connection].exitcode:
                        raise WorkerError(
                            f"demo: expected every worker to finish, got exit code {code}. Its traceback is above, "
                            "unless it was killed; --workers 1 trains without workers."
                        ) from None
                else:
                    yield record
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for process in workers.values():
            process.terminate()
            process.join()


def run_share(config: DemoConfig, jobs: list[Job]) -> Records:
    """The records of the jobs, one job after another, with one thread: faster here, and sums in one fixed order."""
    images, threads = load_images(config.data, config.data_root), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            yield from train_stream(config, job, images)
    finally:
        torch.set_num_threads(threads)


def _work(config: DemoConfig, jobs: list[Job], connection: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent has gone
        for record in run_share(config, jobs):
            connection.send(record)


def fill(config: DemoConfig, images: int) -> DemoConfig:
    """The configuration with the defaults of its data set filled in; ValueError if a value is out of its range."""
    defaults = STREAMS[config.data] | (QUICK if config.quick else {})
    given = {key: value for key in defaults if (value := getattr(config, key)) is not None}
    full = replace(config, **(defaults | given), seeds=config.seeds[:1] if config.quick else config.seeds)
    ranges: dict[str, tuple[float, Any]] = {"tasks": (1, math.inf), "steps": (1, math.inf), "samples": (2, images)}
    ranges |= {"batch": (1, full.samples), "workers": (1, 1024), "lr": (1e-8, 1), "l2": (0, 1e3), "spectral": (0, 1e3)}
    for name, (low, high) in ranges.items():
        value = getattr(full, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"demo: expected {name} from {low:g} to {high:g}, got {value}. Change --{name}.")
    if min(full.hidden, default=1) < 1:
        raise ValueError(f"demo: expected hidden widths >= 1, got {full.hidden}. Change --hidden.")
    if not full.seeds or len(set(full.seeds)) < len(full.seeds):
        raise ValueError(f"demo: expected seeds to be distinct and at least one, got {full.seeds}. Change --seeds.")
    return full


def describe(config: DemoConfig) -> dict[str, Any]:
    """Configuration, versions and machine, as they are written into the results."""
    versions = {"python": platform.python_version()}
    for name in ("spectral_ops", "torch", "numpy", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
        "versions": versions,
        "machine": f"{platform.platform()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
    }


def record_jobs(config: DemoConfig, jobs: list[Job], path: Path, header: dict[str, Any], title: str) -> None:
    """Run the jobs with a progress bar; every line is in the file as soon as its task has ended."""
    tqdm = require("tqdm", "demo").tqdm
    total = sum(tasks_of(config, job) for job in jobs)
    with (
        path.open("w") as file,
        contextlib.closing(run_jobs(config, jobs)) as records,
        tqdm(total=total, desc=title, unit="task", mininterval=0.5 if sys.stderr.isatty() else 10) as bar,
    ):
        print(json.dumps({"kind": "header", **header}), file=file, flush=True)
        for record in records:
            print(json.dumps({"kind": "task", **record}, allow_nan=False), file=file, flush=True)
            bar.update()


def run_sweep(config: DemoConfig) -> dict[str, dict[float, float]]:
    """Mean accuracy over all tasks and SWEEP_SEEDS by method and strength; written to sweep.jsonl and sweep.json."""
    jobs = [Job(m, strength, seed) for m in ("l2", "spectral") for strength in SWEEP_STRENGTHS for seed in SWEEP_SEEDS]
    record_jobs(config, jobs, config.out / "sweep.jsonl", describe(config), "sweep")
    records = read_results(config.out / "sweep.jsonl")[1]
    sweep: dict[str, dict[float, float]] = {"l2": {}, "spectral": {}}
    for method, strength, _ in jobs:
        trial = [r["accuracy"] for r in records if (r["method"], r["strength"]) == (method, strength)]
        sweep[method][strength] = round(statistics.fmean(trial), 4)
    content = {**describe(config), "seeds": SWEEP_SEEDS, "mean_accuracy": sweep, "chosen": best_strengths(sweep)}
    (config.out / "sweep.json").write_text(json.dumps(content, indent=2) + "\n")
    return sweep


def run_demo(config: DemoConfig) -> None:
    """Train, then print the table and draw the picture; `config` is a filled one."""
    started = time.perf_counter()
    swept = SWEEP_OF[config.data]
    known = {m: dict(zip(SWEEP_STRENGTHS, SWEEPS[swept, m], strict=True)) for m in ("l2", "spectral")}
    sweep = run_sweep(config) if config.tune else known
    strengths = {"none": 0.0, "reset": 0.0, **best_strengths(sweep)}
    strengths |= {m: s for m, s in (("l2", config.l2), ("spectral", config.spectral)) if s is not None}
    mlp = "-".join(map(str, ("pixels", *config.hidden, 10)))
    print(f"{config.data}: {config.tasks} tasks, each new random labels for the same {config.samples} images and")
    print(f"{config.steps} steps of batch {config.batch}; MLP {mlp}, Adam {config.lr:g}.")
    print(sweep_table(sweep, strengths, "this" if config.tune else f"the full {swept}", SWEEP_SEEDS, config.seeds))
    jobs = [Job(method, strengths[method], seed) for seed in config.seeds for method in METHODS[:3]]
    jobs += [Job("reset", 0.0, seed) for seed in config.seeds]
    results = config.out / "results.jsonl"
    header = {**describe(config), "strengths": strengths, "sweep": sweep, "sweep_seeds": SWEEP_SEEDS}
    record_jobs(config, jobs, results, header, "demo")
    timing = time_steps(config, strengths)
    with results.open("a") as file:
        print(json.dumps({"kind": "timing", "step_seconds": timing}), file=file)
    table = f"{summary_table(results)}\n{SIGMA_COLUMNS}"
    print(table)
    (config.out / "table.txt").write_text(table + "\n")
    draw_results(results, config.out / "demo.png")
    written = f"{results}, {config.out / 'table.txt'} and {config.out / 'demo.png'}"
    print(f"{written} written in {time.perf_counter() - started:.0f} s.")


def main(config: DemoConfig) -> int:
    """Show how a network loses plasticity on real images, and what prevents it."""
    try:
        for module in ("tqdm", "matplotlib"):
            require(module, "demo")  # now, not after a minute of training
        config = fill(config, len(load_images(config.data, config.data_root)))
        config.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        run_demo(config)
    except WorkerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted. The tasks that were done are in {config.out}.", file=sys.stderr)
        return 130
    return 0
