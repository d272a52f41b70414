"""The reference trainer: what a step of it costs beside the loop one would write by hand, what a method adds, and what
several seeds cost by shared steps.

Random labels, MLP 784-256-256-10 on images of MNIST's size, Adam. Bytes and floor: of weights read, gradients and
moments updated, what any step must move at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.baselines import UsualPenalty
from bench.case import FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, measure, random_unit_vectors
from bench.models import SEED, columns
from spectral_ops.continual import trainer
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.data import Dataset
from spectral_ops.continual.ensemble.ensemble import Ensemble
from spectral_ops.continual.ensemble.groups import runs_at_once
from spectral_ops.continual.trainer import Trainer

OP = "trainer"
BATCHES = {"mlp-b16": 16, "mlp-b256": 256}
STEPS = 200  # a task's; presets have 400 to 1500
SLICE = 20  # steps of a timed call: short, so that what else the machine does falls on all of a round alike
ROUNDS, BUDGET_S = 300, 80.0  # a median of so many ratios is known to half a percent
STRENGTH = 1e-3
NETWORK = "MLP 784-256-256-10, random labels, Adam."
NONE, SPECTRAL, BARE, USUAL = "trainer, none", "trainer, spectral", "a bare loop", "a bare loop, usual penalty"
FOLDED = "trainer, spectral-adamw"
NAMES = (NONE, SPECTRAL, FOLDED, BARE, USUAL, FLOOR)
# Two networks alike, in other places of memory, differ by up to a tenth in a step's time: so many of each take turns.
INSTANCES = 3
SEEDS = 10
TOGETHER, ONE_BY_ONE = "together", "one by one"
TOGETHER_NAMES = (TOGETHER, ONE_BY_ONE, FLOOR)
METHODS: dict[str, dict[str, object]] = {
    "none": {},
    "spectral": {"method": "spectral", "strength": STRENGTH},
    "spectral-adamw": {"method": "spectral", "strength": STRENGTH, "optimizer": "spectral-adamw"},
}
SHARED = {f"together-{method}{end}": (method, batch) for end, batch in (("", 16), ("-b256", 256)) for method in METHODS}


def noise(name: str, root: object = None, *, split: str = "train", samples: int | None = None) -> Dataset:
    """Images of MNIST's size without its files: the time of a step does not depend on what they show."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(256, (1200, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Dataset(images, torch.randint(10, (1200,), generator=generator), 10)


def config(settings: Settings, batch: int, **changes: object) -> RunConfig:
    hidden = (16, 16) if settings.quick else (256, 256)
    small = RunConfig(model_options={"hidden": hidden}, batch=batch, steps=STEPS, samples=1200, held_out_samples=0)
    return replace(small, device=settings.device.kind, threads=torch.get_num_threads(), **changes)  # type: ignore[arg-type]


def make(settings: Settings, batch: int, **changes: object) -> Trainer:
    with patch.object(trainer, "load_dataset", noise):
        made = Trainer(config(settings, batch, **changes))
    made.begin_task()
    return made


def steps_of(made: Trainer | Ensemble) -> None:
    """STEPS steps, as `run` takes them: the last one is measured too."""
    made.step = 0
    made.train_steps(lambda: None, lambda task, step: None, lambda: False)


class Steps:
    """The next SLICE steps of a task at every call, round and round, without the measurements at its end."""

    def __init__(self, made: Trainer):
        self._made, self._slices = made, cycle(made.samples[2].split(SLICE))

    def __call__(self) -> None:
        for rows in next(self._slices):
            self._made._step(rows, measure=False)


class Loop:
    """The loop one would write by hand, on the same network, samples and batches."""

    def __init__(self, settings: Settings, batch: int, penalty: bool):
        made = make(settings, batch)
        self.model, self.optimizer = made.model, made.optimizer
        self._x, self._y, batches = made.samples
        self._slices = cycle(batches.split(SLICE))
        self.penalty: UsualPenalty | None = None
        if penalty:
            named = list(self.model.parameters())
            weights, biases = [p for p in named if p.ndim > 1], [p for p in named if p.ndim == 1]
            v = random_unit_vectors([columns(w) for w in weights], settings.device.kind)
            self.penalty = UsualPenalty(weights, biases, v, strength=STRENGTH)

    def __call__(self) -> None:
        for rows in next(self._slices):
            loss = cross_entropy(self.model(self._x[rows]), self._y[rows])
            if self.penalty is not None:
                loss = loss + self.penalty.loss()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def in_turns(build: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """Every call is of the next of INSTANCES."""
    instances = cycle([build() for _ in range(INSTANCES)])
    return lambda: next(instances)()


def case(model: str, dtype: str, settings: Settings) -> Case:
    batch = BATCHES[model]

    def trainer_of(method: str) -> Callable[[], None]:
        return in_turns(lambda: Steps(make(settings, batch, **METHODS[method])))

    def loop(penalty: bool) -> Callable[[], None]:
        return in_turns(lambda: Loop(settings, batch, penalty))

    contenders = {
        NONE: Contender(trainer_of("none")),
        SPECTRAL: Contender(trainer_of("spectral")),
        FOLDED: Contender(trainer_of("spectral-adamw"), note="the penalty in the optimizer's step"),
        BARE: Contender(loop(penalty=False)),
        USUAL: Contender(loop(penalty=True), note="as a term of the loss"),
    }
    parameters: list[nn.Parameter] = list(make(settings, batch).model.parameters())
    moments: list[Tensor] = [torch.zeros_like(p) for p in parameters for _ in range(3)]
    return Case(
        f"{OP}/{model}/{dtype}",
        f"{SLICE} steps of the trainer, batch {batch}, {dtype}",
        settings.device,
        read=parameters,
        update=moments,
        contenders=contenders,
        notes=[
            f"Times are of {SLICE} steps, of {INSTANCES} networks of each kind in turns; x base of {BARE}: what is "
            "left when the trainer's own work is taken away."
        ],
        cold=False,
        rounds=None if settings.quick else ROUNDS,
        budget_s=None if settings.quick or settings.on_cuda else BUDGET_S,
    )


def together(model: str, dtype: str, settings: Settings) -> Case:
    """STEPS steps of each of SEEDS runs."""
    method, batch = SHARED[model]
    changes = METHODS[method]
    singles = [make(settings, batch, seed=seed, **changes) for seed in range(SEEDS)]
    others = [make(settings, batch, seed=seed, **changes) for seed in range(SEEDS)]
    parameters: list[Tensor] = [p for other in others for p in other.model.parameters()]
    size = SEEDS
    if not settings.on_cuda:  # as run_together has it
        size = runs_at_once(sum(p.nbytes for p in parameters) // SEEDS, torch.get_num_threads())
    ensembles = [Ensemble(others[start : start + size]) for start in range(0, SEEDS, size)]
    for ensemble in ensembles:
        ensemble.begin_task()

    def shared() -> None:
        for ensemble in ensembles:
            steps_of(ensemble)

    def apart() -> None:
        for single in singles:
            steps_of(single)

    moments: list[Tensor] = [torch.zeros_like(p) for p in parameters for _ in range(3)]
    return Case(
        f"{OP}/{model}/{dtype}",
        f"{STEPS} steps of {SEEDS} seeds, {method}, batch {batch}, {dtype}",
        settings.device,
        read=parameters,
        update=moments,
        contenders={TOGETHER: Contender(shared), ONE_BY_ONE: Contender(apart)},
        notes=[
            f"{NETWORK} Batch {batch}. Times are of {STEPS} steps of all {SEEDS} runs, those together in groups of "
            f"{', '.join(str(len(ensemble.trainers)) for ensemble in ensembles)}, one group after the other."
        ],
        cold=False,
    )


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    if "float32" in settings.chosen_dtypes and (settings.models is None or "mlp" in settings.models):
        for model in BATCHES:
            yield f"{model}/float32", partial(case, model, "float32", settings)
        for model, (_, batch) in SHARED.items():
            if settings.on_cuda and batch > 16:
                continue  # minutes there; what a batch costs is a CPU's question
            yield f"{model}/float32", partial(together, model, "float32", settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", BATCHES)
def test_trainer(time_alone: TimeAlone, case_of: CaseOf, model: str, name: str) -> None:
    time_alone(case_of(case, model), name)


@pytest.mark.parametrize("name", TOGETHER_NAMES)
@pytest.mark.parametrize("model", SHARED)
def test_together(time_alone: TimeAlone, case_of: CaseOf, model: str, name: str) -> None:
    time_alone(case_of(together, model), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    measured = measure(case_of(case, "mlp-b16"), settings)
    assert {row["name"] for row in measured["rows"]} == set(NAMES)
