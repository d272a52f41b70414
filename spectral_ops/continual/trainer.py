"""The trainer: one network, one stream of tasks, one method; a log of every task, and checkpoints to go on from."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_ops.continual.checkpoint import load_checkpoint
from spectral_ops.continual.choices import check_options, choose
from spectral_ops.continual.config import RANGES, RunConfig, check_types, spelled
from spectral_ops.continual.data import load_dataset
from spectral_ops.continual.journal import Journal
from spectral_ops.continual.lock import locked
from spectral_ops.continual.measures import probe
from spectral_ops.continual.methods import find_method
from spectral_ops.continual.methods.method import Context
from spectral_ops.continual.methods.spectral import spectral_adamw
from spectral_ops.continual.models import Model, build_model
from spectral_ops.continual.online import Online
from spectral_ops.continual.run_folder import Record, check_folder, plain, read_run
from spectral_ops.continual.steps import Progress, Stepper, Stopped
from spectral_ops.continual.streams import STREAMS, Stream, Task, build_stream
from spectral_ops.continual.streams.stream import stream_generator, task_batches

_ROWS = 1024  # samples that are evaluated together
FOLDED = "spectral-adamw"  # the optimizer that takes the penalty of method spectral into its step
_OF_PROBE = ("loss", "accuracy")  # measured here, on all samples


class Trainer(Stepper[list[Tensor], float]):
    """A run in memory. `run` is what to call; this is for those who want to look inside between tasks.

    It gives what `run` gives, by `train_task` for each of `config.tasks`, but leaves to its user what `run` does around
    them: the number of threads, and a seed of torch's global random state, which none of the package's own models and
    methods draws from in a step.

    Args:
        config: the whole run, as for `run`.

    Raises:
        ValueError, TypeError: a configuration that cannot be.

    Example:
        trainer = Trainer(RunConfig(data="digits", method="spectral", strength=1e-3, tasks=3, samples=200, steps=100))
        while trainer.task < trainer.config.tasks:
            record = trainer.train_task()
            weights = trainer.model.state_dict()    # as this task left them
    """

    def __init__(self, config: RunConfig):
        check(config)
        self.config, self.device = config, torch.device(config.device)
        self.stream = make_stream(config)
        self.kind = find_method(config.method)
        self.model = model = self._fresh(0).to(self.device)
        self.optimizer = make_optimizer(config, model)
        self.generator = generator = stream_generator(config.seed, 0, f"method {config.method}")
        context = Context(model, self.optimizer, model.units(), model.output, generator, self._initial_state)
        self.method = self.kind(context, **self.method_options())
        self.online = Online(config.batch, self.stream.classes)
        self.task, self.step = 0, 0
        self._task: Task | None = None
        self._x, self._y = torch.empty(0), torch.empty(0)
        self._batches = torch.empty(0)
        self.seconds = [0.0, 0.0]

    def train_task(
        self,
        checkpoint: Callable[[], None] = lambda: None,
        progress: Progress = lambda task, step: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Record:
        """From the next step to the end of its task; the task's record, as `run` gives it but for what is not finite.

        Args:
            checkpoint: called several times a second between two steps, a moment to keep `state_dict()`; by default
                nothing is kept.
            progress: called with (task, step) as often, and with (task + 1, 0) at the end.
            stop: whether to stop here, asked before each checkpoint; by default the task is finished.

        Raises:
            Stopped: stop said so. The next call goes on from there.
        """
        self.begin_task()
        record = self.finish_task(self.train_steps(checkpoint, progress, stop))
        progress(self.task, 0)
        return record

    def begin_task(self) -> None:
        """The task's samples and batches; where it was begun before a checkpoint, only these."""
        if self._task is None or self.step == 0:
            # Of the network as it was trained, whatever the method then makes of it.
            self._task = self.stream.task(self.task, self.model)
        if self.step == 0 and self.task > 0:
            self.method.on_task_boundary(self.task)
        self._x, self._y = self._task.x.to(self.device), self._task.y.to(self.device)
        config = self.config
        self._batches = task_batches(config.seed, self.task, len(self._y), config.steps, config.batch).to(self.device)
        self.model.train()

    def finish_task(self, ratio: float | None) -> Record:
        """The record of the task whose steps are done; the next step is the first of the next task."""
        record = self._record(ratio)
        self.task, self.step = self.task + 1, 0
        self.online.reset()
        self.seconds = [0.0, 0.0]
        return record

    @property
    def samples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and labels of the task that was begun, and the rows of every step, (steps, batch)."""
        return self._x, self._y, self._batches

    def method_options(self) -> dict[str, Any]:
        """Of the method: its strength among them."""
        return method_options(self.config)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """All that going on from here needs, of types that `torch.load(weights_only=True)` reads."""
        state = {
            "task": self.task,
            "step": self.step,
            "seconds": list(self.seconds),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "online": self.online.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        if self.stream.reads_model and self.step > 0:
            assert self._task is not None
            state["labels"] = self._task.y  # they came from a model that is no more
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict` of a trainer of the same configuration, with the same bits on a CPU.

        torch's global random state, which a checkpoint holds too, becomes what it was then.
        """
        self.task, self.step, self.seconds = state["task"], state["step"], list(state["seconds"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.online.load_state_dict(state["online"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self._task = None
        if "labels" in state:
            self._task = Task(self.stream.x, state["labels"])

    # ---- inside ----

    def _fresh(self, task: int) -> Model:
        """A freshly initialised model, a function of (seed, task) alone."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_generator(config.seed, task, "weights").initial_seed())
            model = build_model(config.model, self.stream.input_shape, self.stream.classes, **config.model_options)
            self.kind.prepare(model)
        return model

    def _initial_state(self, task: int) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self._fresh(task).state_dict().items()}

    def _backward(self, rows: Tensor) -> None:
        x, y = self._x[rows], self._y[rows]
        scores = self.model(x)
        self.optimizer.zero_grad()
        F.cross_entropy(scores, y).backward()
        self.online.add(scores.detach(), y)

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.model.parameters()]

    def _ratio(self, before: list[Tensor]) -> float:
        task = torch.stack(torch._foreach_norm(before)).norm().item()
        for old, p in zip(before, self.model.parameters(), strict=True):
            if p.grad is not None:
                old.sub_(p.grad)
        return torch.stack(torch._foreach_norm(before)).norm().item() / task if task > 0 else math.nan

    def _record(self, ratio: float | None) -> Record:
        assert self._task is not None
        accuracy, loss = self._evaluate(self._x, self._y)
        held_out: tuple[float | None, float | None] = (None, None)
        if self._task.held_out_x is not None and self._task.held_out_y is not None:
            held_out = self._evaluate(self._task.held_out_x.to(self.device), self._task.held_out_y.to(self.device))
        some = slice(self.config.probe_samples)
        self.model.eval()  # as for accuracy and loss: under BatchNorm samples could not be told apart
        measures = probe(self.model, (self._x[some], self._y[some]), units=self.method.context.units)
        self.model.train()
        steps = self.config.steps
        return {
            "kind": "task",
            "task": self.task,
            "accuracy": accuracy,
            **self.online.means(),
            "held_out_accuracy": held_out[0],
            "loss": loss,
            "held_out_loss": held_out[1],
            **{name: value for name, value in measures.items() if name not in _OF_PROBE},
            "penalty_ratio": ratio,
            "step_seconds": self.seconds[0] / steps,
            # On CUDA the method's part is queued with the rest, and the host's clock sees the queueing.
            "method_seconds": None if self.device.type == "cuda" else self.seconds[1] / steps,
        }

    @torch.no_grad()
    def _evaluate(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Accuracy and mean loss, in evaluation mode."""
        self.model.eval()
        correct, loss = 0, 0.0
        for rows, labels in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            scores = self.model(rows)
            correct += int((scores.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(scores.double(), labels, reduction="sum"))
        self.model.train()
        return correct / len(y), loss / len(y)


def run(
    config: RunConfig,
    folder: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> list[Record]:
    """Trains on the whole stream; the records of its tasks, each as in the log.

    With a folder, every task is in its log.jsonl as soon as it has ended, and the run goes on after a crash: at any
    moment, with the same bits on a CPU. A finished run is read, not run again.

    Args:
        folder: made if need be; None: nothing is written.
        resume: go on with an unfinished run of the same configuration in the folder.
        progress: called with (task, step) several times a second.
        stop: once set, the run writes a checkpoint and raises Stopped.

    Raises:
        ValueError, TypeError: a configuration that cannot be; a folder with something else in it.
        OSError: the folder cannot be written, or another run is writing to it.
        Stopped: see stop.

    Example:
        records = run(RunConfig(data="digits", method="spectral", strength=1e-3, tasks=3, samples=200, steps=100))
    """
    path, stop = None if folder is None else Path(folder), stop or threading.Event()
    check(config)
    if path is not None and check_folder(path, config, resume=resume) and (there := read_run(path)).finished:
        return there.tasks
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)  # before anything is summed
    random = torch.get_rng_state()
    try:
        torch.manual_seed(stream_generator(config.seed, 0, "training").initial_seed())
        trainer = Trainer(config)
        with contextlib.nullcontext() if path is None else locked(path, stop):
            # Again: what had the folder until now may have written a run into it, and may have ended it.
            if path is not None and check_folder(path, config, resume=resume) and (there := read_run(path)).finished:
                return there.tasks
            return _run(trainer, path, progress or (lambda task, step: None), stop)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def _run(trainer: Trainer, folder: Path | None, progress: Progress, stop: threading.Event) -> list[Record]:
    records: list[Record] = []
    state = None if folder is None else load_checkpoint(folder)
    journal = None if folder is None else Journal(folder, trainer.config, state)
    saved = time.monotonic()
    if state is not None and folder is not None:
        trainer.load_state_dict(state["trainer"])
        records = read_run(folder).tasks

    def save() -> None:
        nonlocal saved
        if journal is not None:
            journal.save(trainer.state_dict())
        saved = time.monotonic()

    def save_if_old() -> None:
        if stop.is_set() or time.monotonic() - saved > trainer.config.checkpoint_seconds:
            save()

    with contextlib.closing(journal) if journal is not None else contextlib.nullcontext():
        while trainer.task < trainer.stream.tasks:
            records.append(plain(trainer.train_task(save_if_old, progress, stop.is_set)))
            if journal is not None:
                journal.log.write(records[-1])
            save()
            if stop.is_set() and trainer.task < trainer.stream.tasks:  # tasks may be shorter than our patience
                raise Stopped
        if journal is not None:
            journal.end(records)
    return records


def check(config: RunConfig) -> None:
    """Refuses types and numbers that make no run. Names and options are refused where they are looked up."""
    check_types(config)
    for name, (low, high) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"run: expected {name} from {low:g} to {high:g}, got {value}. Change {spelled(name)}.")
    if config.device not in ("cpu", "cuda"):
        raise ValueError(f"run: expected device to be cpu or cuda, got {config.device!r}. Change {spelled('device')}.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "run: expected a CUDA device for device='cuda' (--device), got none that torch can use. Use 'cpu'."
        )
    if config.momentum and config.optimizer != "sgd":
        raise ValueError(
            f"run: expected momentum 0 with {config.optimizer}, got {config.momentum}. Drop {spelled('momentum')}, "
            f"or use sgd as {spelled('optimizer')}."
        )
    if config.optimizer == FOLDED and config.method != "spectral":
        raise ValueError(
            f"run: expected method spectral with optimizer {FOLDED}, got {config.method!r}. Its step takes that "
            f"method's penalty in: use spectral as {spelled('method')}, or adam as {spelled('optimizer')}."
        )
    operator = config.method == "spectral" and config.options.get("conv") == "operator" and config.optimizer != FOLDED
    if operator and config.options.get("input_size") is None:
        # The regularizer would say so, too, but not where the option goes, and in a comparison when others have run.
        raise ValueError(
            "run: expected an option input_size with conv='operator' of method spectral, got none. Give the "
            "size of an image, of mnist RunConfig(options={'conv': 'operator', 'input_size': (1, 28, 28)}), "
            "on the command line --options conv=operator input_size=1,28,28."
        )
    if config.strength is not None and "strength" in config.options:
        raise ValueError(
            f"run: expected one strength, got {config.strength} and {config.options['strength']!r}. Drop "
            f"{spelled('strength')} or 'strength' among the {spelled('options')}."
        )


def make_stream(config: RunConfig) -> Stream:
    train = load_dataset(config.data, config.data_root, samples=config.samples or None)
    held_out, held_out_samples = train, None
    if choose("stream", config.stream, STREAMS).holds_out:  # else those files may well be missing
        held_out_samples = config.held_out_samples or None
        held_out = load_dataset(config.data, config.data_root, split="test", samples=held_out_samples)
    return build_stream(
        config.stream,
        train,
        held_out,
        options=config.stream_options,
        seed=config.seed,
        tasks=config.tasks,
        samples=config.samples or None,
        held_out_samples=held_out_samples,
    )


def method_options(config: RunConfig) -> dict[str, Any]:
    options = dict(config.options)
    if config.strength is not None:
        options["strength"] = config.strength
    return check_options(f"method {config.method}", find_method(config.method), options)


def make_optimizer(
    config: RunConfig, model: nn.Module, parameters: Iterable[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """`parameters`: what adam and sgd step in place of the model's own."""
    makers = {
        "adam": lambda p: torch.optim.Adam(p, lr=config.lr, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=config.lr, momentum=config.momentum, fused=True),
        FOLDED: lambda p: spectral_adamw(model, config.lr, **method_options(config)),
    }
    return choose("optimizer", config.optimizer, makers)(model.parameters() if parameters is None else parameters)
