"""A training step of a vision transformer without the penalty and with it: the share of the step that it adds.

Forward in bfloat16 (autocast), float32 weights, AdamW, fused on CUDA. The bytes counted and the floor are those of the
penalty: what it must add at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench import truth
from bench.baselines import COMPILED, STACKED, USUAL, VARIANTS, UsualPenalty, stacked_penalty, usual_penalty
from bench.case import FLOOR, Case, CaseOf, Contender, Settings, TimeAlone, measure, random_unit_vectors
from bench.models import SEED, VITS, ViT, columns
from bench.problem import STRENGTH, TOLERANCE, backend_note, regularizer_of
from bench.table import ALONE
from bench.transformer import VisionTransformer
from spectral_ops import SpectralRegularizer

OP = "training_step"
MODEL, CPU_MODEL = "vit-b", "vit-tiny"
SIZES = {  # shape, image, patch, classes, batch
    MODEL: (VITS[MODEL], 224, 16, 1000, 256),
    CPU_MODEL: (ViT(192, 2, 768, "none: small enough for a CPU"), 32, 4, 10, 16),
}
QUICK = (ViT(48, 1, 96, "none: the smallest that runs"), 16, 8, 10, 2)
LEARNING_RATE = 1e-4
WITHOUT, ATTACHED = "without the penalty", "attach"
NAMES = (WITHOUT, ATTACHED, ALONE, USUAL, COMPILED, STACKED, FLOOR)
BUDGET_S = 20.0


class Training:
    """The model, one fixed batch of noise with labels, and a step. Weights and gradients are shared by all contenders.

    Weights move with every step; where a check compares with float64, that is of the weights as they are then.
    """

    def __init__(self, name: str, settings: Settings):
        self.kind = settings.device.kind
        *self._shape, batch = QUICK if settings.quick else SIZES[name]
        _, image, _, classes = self._shape
        with torch.random.fork_rng(), torch.device(self.kind):
            torch.manual_seed(SEED)
            self.model = VisionTransformer(*self._shape)
            self.images, self.labels = torch.randn(batch, 3, image, image), torch.randint(classes, (batch,))
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        treated = [entry.parameter for entry in self.regularizer().entries if entry.layout is not None]
        self.weights: list[nn.Parameter] = [p for p in treated if p.ndim > 1]
        self.biases: list[nn.Parameter] = [p for p in treated if p.ndim == 1]
        self.v = random_unit_vectors([columns(w) for w in self.weights], self.kind)

    def regularizer(self) -> SpectralRegularizer:
        """Norms left out, since the usual code knows none: both treat the same parameters."""
        with torch.device("meta"):
            twin = VisionTransformer(*self._shape)
        return regularizer_of(self.model, twin, norms=False)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=self.kind == "cuda")

    def step(self, optimizer: torch.optim.Optimizer, penalty: Callable[[], Tensor] | None = None) -> None:
        optimizer.zero_grad(set_to_none=False)  # addresses stay, as for a CUDA graph
        with torch.autocast(self.kind, torch.bfloat16):
            loss = cross_entropy(self.model(self.images), self.labels)
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()

    def penalty_error(self, add: Callable[[], object], v: list[Tensor]) -> float:
        """Of the gradients that `add` leaves in .grad where all were zero; v: from where it takes its step."""
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad.zero_()
        true = truth.warm_step(self.weights, self.biases, v)
        add()
        errors = []
        for w, dw, scale in zip(self.weights, true.dw, true.scale, strict=True):
            errors.append(truth.relative_error(w.grad, STRENGTH * dw, STRENGTH * scale))
        for b, db in zip(self.biases, true.db, strict=True):
            errors.append(truth.relative_error(b.grad, STRENGTH * db))
        return truth.largest(errors)


def attached(training: Training) -> Contender:
    reg, optimizer = training.regularizer(), training.optimizer()
    reg.attach(optimizer)

    def only_the_penalty() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the gradients stay, and so do the weights
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE

    def error() -> float:
        v = [x.flatten() for x in reg.state_dict()["v"].values()]
        return training.penalty_error(only_the_penalty, v)

    note = f"reg.attach(optimizer), {backend_note(training.kind, 'accumulate_grad_')}"
    return Contender(partial(training.step, optimizer), error, TOLERANCE, note)


def alone(training: Training) -> Contender:
    """What attach adds, by itself: a share of a tenth of a per cent would drown in the spread of whole steps."""
    reg = training.regularizer()

    def error() -> float:
        v = [x.flatten() for x in reg.state_dict()["v"].values()]
        return training.penalty_error(reg.accumulate_grad_, v)

    return Contender(reg.accumulate_grad_, error, TOLERANCE)


def usual(training: Training, code: Callable[..., tuple[Tensor, list[Tensor]]]) -> Contender:
    optimizer = training.optimizer()
    penalty = UsualPenalty(training.weights, training.biases, training.v, strength=STRENGTH, penalty=code)

    def error() -> float:
        return training.penalty_error(penalty.accumulate_grad_, [x.clone() for x in penalty.v])

    run = partial(training.step, optimizer, penalty.loss)
    return Contender(run, error, TOLERANCE, "as a term of the loss", optional=True)


def case(model: str, dtype: str, settings: Settings) -> Case:
    training = Training(model, settings)
    contenders = {
        WITHOUT: Contender(partial(training.step, training.optimizer())),
        ATTACHED: attached(training),
        ALONE: alone(training),
        USUAL: usual(training, usual_penalty),
    }
    # float32 weights, and the gradient of ViT-B compiled for bfloat16 already: --full alone.
    left_out = {COMPILED: settings.left_out(COMPILED, model, dtype)}
    if not left_out[COMPILED]:
        left_out = {}
        contenders[COMPILED] = usual(training, VARIANTS[COMPILED].code(usual_penalty, stacked_penalty))
        contenders[COMPILED].compiles = True
    contenders[STACKED] = usual(training, stacked_penalty)
    treated = [*training.weights, *training.biases]
    batch, _, image, _ = training.images.shape
    return Case(
        f"{OP}/{model}/{dtype}",
        f"A training step, {model}, batch {batch} of {image} x {image}, forward in bfloat16, {dtype} weights",
        settings.device,
        read=treated,
        update=[p.grad for p in treated],
        contenders=contenders,
        notes=["Bytes, GB/s and floor: of the penalty alone, what it must add at least.", "Weights, biases; no norms."],
        left_out=left_out,
        budget_s=None if settings.quick else BUDGET_S,
    )


def cases(settings: Settings) -> Iterator[tuple[str, Callable[[], Case]]]:
    model, dtype = (MODEL if settings.on_cuda else CPU_MODEL), "float32"
    if (settings.models is None or model in settings.models) and dtype in settings.chosen_dtypes:
        yield f"{model}/{dtype}", partial(case, model, dtype, settings)


@pytest.mark.parametrize("name", NAMES)
def test_training_step(time_alone: TimeAlone, settings: Settings, case_of: CaseOf, name: str) -> None:
    time_alone(case_of(case, MODEL if settings.on_cuda else CPU_MODEL), name)


def test_interleaved(settings: Settings, case_of: CaseOf) -> None:
    measured = measure(case_of(case, MODEL if settings.on_cuda else CPU_MODEL), settings)
    assert {row["name"] for row in measured["rows"]} | set(measured["left_out"]) == set(NAMES)
