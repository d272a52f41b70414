"""The training loop: models that differ in their penalty, on the same batches, in turns."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from bench.timing import Rounds
from bench.vit_training import checkpoint
from bench.vit_training.data import Batches
from bench.vit_training.memory import memory_of
from bench.vit_training.network import build, place
from bench.vit_training.options import Options
from bench.vit_training.penalties import penalise
from bench.vit_training.processes import Processes

WARMUP_SHARE = 0.1  # of the steps, in which the learning rate rises to its highest


def learning_rate(options: Options, step: int) -> float:
    """Linear warm-up, then half a cosine; of the step alone, so that nothing of it need be saved."""
    rising = max(1, round(WARMUP_SHARE * options.steps))
    if step < rising:
        return options.learning_rate * (step + 1) / rising
    return options.learning_rate * (1 + math.cos(math.pi * (step - rising) / max(1, options.steps - rising))) / 2


class Training:
    """A model, its optimizer and penalty."""

    def __init__(self, name: str, options: Options, classes: int, processes: Processes):
        self.options, self._kind = options, processes.kind
        self.memory = memory_of(processes.kind)[0]()
        with self.memory.building():
            self.network = build(options, classes, processes)
            self._penalty = penalise(name, self.network, options, lambda: place(self.network, options, processes))
            gc.collect()
        self._optimizer = self._penalty.optimizer
        self._parameters = list(self.network.module.parameters())
        self.losses: list[float] = []

    @property
    def parameters(self) -> int:
        """How many, of the whole model."""
        return sum(p.numel() for p in self._parameters)

    def step(self, number: int, images: Tensor, labels: Tensor) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.options, number)
        loss = cross_entropy(self.network.forward(images).float(), labels)
        loss.backward()
        if self.options.clip is not None:
            clip_grad_norm_(self._parameters, self.options.clip)
        self._penalty.add()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Of model, optimizer and vectors, as torch.distributed.checkpoint takes it; a new one has its first moments
        made by this."""
        model, optimizer = get_state_dict(self.network.module, self._optimizer)
        return {"model": model, "optimizer": optimizer, "vectors": self._penalty.vectors()}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.network.module, self._optimizer,
            model_state_dict=state["model"], optim_state_dict=state["optimizer"],
        )  # fmt: skip
        self._penalty.load_vectors(state["vectors"])


def train(
    options: Options,
    trainings: dict[str, Training],
    batches: Batches,
    processes: Processes,
    show: Callable[[str], None],
) -> Rounds:
    """All steps up to options.end, from the newest checkpoint if there is one; seconds of a step, turn by turn."""
    folder, about = options.checkpoint, options.trained() | {"origin": next(iter(trainings.values())).network.origin}
    step = 0
    if folder is not None:
        found = checkpoint.find(folder, options.resume, about, processes)
        if found is not None:
            state = {name: training.state() for name, training in trainings.items()}
            checkpoint.load(found, state)
            for name, training in trainings.items():
                training.load(state[name])
            step = checkpoint.step_of(found)
            show(f"from {found}")
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    names, turn = list(trainings), 0
    every = options.checkpoint_every or options.end
    while step < options.end:
        until = min(step + options.turn, options.end, (step // every + 1) * every)
        # Whole turns after the warm-up; where there is none of these, the last.
        counted = turn >= options.warmup and until - step == options.turn
        counted = counted or (until == options.end and not seconds[names[0]])
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with trainings[name].memory.turn(counted):
                taken = take_turn(trainings[name], range(step, until), batches, processes)
            if counted:
                seconds[name].append(taken / (until - step))
        step, turn = until, turn + 1
        show(f"step {step}: " + ", ".join(f"{name} {training.losses[-1]:.4f}" for name, training in trainings.items()))
        if folder is not None and (step % every == 0 or step == options.end):
            state = {name: training.state() for name, training in trainings.items()}
            checkpoint.save(folder, step, state, about, processes)
    return Rounds(seconds, dict.fromkeys(names, options.turn))


def take_turn(training: Training, steps: range, batches: Batches, processes: Processes) -> float:
    """Seconds of these steps, everything that was queued included."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        processes.barrier()
        started = time.perf_counter()
        losses = [training.step(step, *batches(step)) for step in steps]
        if processes.kind == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - started
    finally:
        if collecting:
            gc.enable()
    training.losses += processes.mean(torch.stack(losses)).tolist()
    return taken


def warm_up(processes: Processes) -> None:
    """Has a device allocate what it does once, as for matrix products, before anyone's memory is counted."""
    if processes.kind == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            layer = torch.nn.Linear(256, 256, device="cuda", dtype=dtype)
            layer(torch.ones(256, 256, device="cuda", dtype=dtype)).sum().backward()
        processes.barrier()
