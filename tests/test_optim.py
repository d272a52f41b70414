"""SpectralAdamW trains as clip -> accumulate_grad_ -> torch.optim.AdamW does, in the same training loops."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import pytest
import torch
from helpers import BF16, F32, F64, same_bits
from optim_models import LR, STRENGTH, Batches, apart, folded, largest_difference, net, train
from torch import nn

from spectral_ops import Rule, SpectralAdamW, SpectralRegularizer, backends

STEPS = 500
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "no decay": {"weight_decay": 0.0},
    "betas": {"betas": (0.5, 0.9), "eps": 1e-6},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
}


@pytest.fixture(autouse=True)
def _with_kernel(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(1)  # models of a few hundred numbers: what a step takes is waiting for the other thread
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.skip("hundreds of steps: tests/test_adamw.py has the kernels")


# ---- trajectories ----


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OPTIONS))
def test_500_steps_in_float64(backend: str, name: str) -> None:
    """Rounding grows by less than five orders in 500 steps of this model (measured: 3e-12)."""
    if backend == "reference" and name not in ("plain", "amsgrad"):
        pytest.skip("what differs is not in the step's formula")
    truth, _, reg = apart(net(F64), STEPS, dtype=F64, **OPTIONS[name])
    model, optimizer = folded(net(F64), STEPS, dtype=F64, **OPTIONS[name])
    assert largest_difference(model, truth) <= 1e-10
    assert largest_difference(truth, net(F64)) >= 0.05, "nothing was trained"
    # The regularizer's sigmas are of the weights before its last step: one read more.
    with torch.no_grad():
        reg.accumulate_grad_()
    sigmas = optimizer.sigmas()
    assert all((sigmas[key] - value).abs().max() <= 1e-10 for key, value in reg.sigmas().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "amsgrad"])
def test_500_steps_in_float32(backend: str, name: str) -> None:
    """Rounding grows along the way, whoever rounds: as far from float64 as torch's own steps are."""
    truth, *_ = apart(net(F64), STEPS, dtype=F64, **OPTIONS[name])
    # The same start in float32 for both.
    torchs, *_ = apart(net(F32), STEPS, **OPTIONS[name])
    ours, _ = folded(net(F32), STEPS, **OPTIONS[name])
    # Chaotic: measured 0.3 to 2.5 times as far.
    assert largest_difference(ours, truth) <= 10 * largest_difference(torchs, truth) + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "decoupled": True}], ids=["plain", "amsgrad, decoupled"])
def test_200_steps_of_the_kernel(options: dict[str, Any]) -> None:
    """In the interpreter, a small model: as native's, which is held against torch's above."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a device tests/test_adamw_cuda.py trains")
    finals = []
    for name, dtype in (("triton", F32), ("native", F32), ("native", F64)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
        optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH, **options)
        batches = torch.Generator().manual_seed(1)
        with backends.use_backend(name):  # type: ignore[arg-type]
            for _ in range(200):  # a third of a second each
                model.zero_grad()
                x = model(torch.randn(8, 6, generator=batches).to(dtype))
                (x.square().mean() + x.mean()).backward()
                optimizer.step()
        finals.append(model)
    ours, native, truth = finals
    assert largest_difference(truth, native) <= 1e-4
    # Rounding grows along the way, whoever rounds.
    assert largest_difference(ours, truth) <= 10 * largest_difference(native, truth) + 1e-6


@pytest.mark.slow
def test_500_steps_in_bfloat16(backend: str) -> None:
    """Against the same in plain torch on float32 masters, step by step, as torch's own moments would be bfloat16."""
    ours, optimizer = folded(net(BF16), STEPS, dtype=BF16, master_weights=True)
    masters = net(BF16).float()
    model = net(BF16)
    reg = SpectralRegularizer(model, strength=STRENGTH)
    other = torch.optim.AdamW(masters.parameters(), lr=LR)
    batches = Batches(BF16)
    for _ in range(STEPS):
        model.zero_grad()
        batches.loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for p, master in zip(model.parameters(), masters.parameters(), strict=True):
            master.grad = p.grad.float()  # type: ignore[union-attr]
        # The penalty's gradient in float32: as bfloat16 gradients would not have it.
        gradients = SpectralGradients(reg, model, masters)
        gradients.add()
        other.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters.parameters(), strict=True):
                p.copy_(master)
    start = net(BF16)
    # One bfloat16 weight that rounds the other way changes all that come after (measured: 0.03 of how far they went).
    assert largest_difference(ours, model) <= 0.25 * largest_difference(model, start)


class SpectralGradients:
    """Adds the penalty's gradient of 16-bit weights to float32 gradients of others."""

    def __init__(self, reg: SpectralRegularizer, model: nn.Module, masters: nn.Module) -> None:
        self.reg, self.model, self.masters = reg, model, masters

    def add(self) -> None:
        kept = [p.grad for p in self.model.parameters()]
        gradients = torch.autograd.grad(self.reg(), list(self.model.parameters()), allow_unused=True)
        for p, g in zip(self.masters.parameters(), gradients, strict=True):
            if g is not None:
                assert p.grad is not None
                p.grad += g.float()
        for p, g in zip(self.model.parameters(), kept, strict=True):
            p.grad = g


def test_maximize_grows_the_objective_and_not_the_penalty(backend: str) -> None:
    """As the step on the negated objective."""
    results = []
    for sign in (1, -1):
        model = net(F64)
        options = {"maximize": sign < 0}
        optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH, **options)  # type: ignore[arg-type]
        batches = Batches(F64)
        for _ in range(5):
            optimizer.zero_grad()
            (sign * batches.loss(model)).backward()
            optimizer.step()
        results.append(model)
    assert largest_difference(*results) == 0.0


@pytest.mark.slow
def test_decoupled(backend: str) -> None:
    """W -= lr * dR/dW beside AdamW's step on the task's gradient alone."""
    model, other = net(F64), net(F64)
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH, decoupled=True)
    reg = SpectralRegularizer(other, strength=STRENGTH)
    beside = torch.optim.AdamW(other.parameters(), lr=LR)
    batches, others = Batches(F64), Batches(F64)
    for _ in range(STEPS):
        train(model, optimizer, batches, 1)
        other.zero_grad()
        for p in other.parameters():
            p.grad = torch.zeros_like(p)
        reg.accumulate_grad_()
        added = [p.grad.clone() for p in other.parameters()]  # type: ignore[union-attr]
        train(other, beside, others, 1)
        with torch.no_grad():
            for p, g in zip(other.parameters(), added, strict=True):
                p -= LR * g
    assert largest_difference(model, other) <= 1e-10


# ---- in a training loop ----


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CosineAnnealingLR", "LambdaLR"])
def test_lr_schedulers(schedule: str) -> None:
    def run(kind: type[torch.optim.AdamW], **options: Any) -> nn.Module:
        model = net(F64)
        reg = None if options else SpectralRegularizer(model, strength=STRENGTH)
        optimizer = kind(model.parameters(), lr=LR, **(options | {"model": model} if options else {}))
        arguments = {"OneCycleLR": (0.01, 40), "CosineAnnealingLR": (40,), "LambdaLR": (lambda t: 1 / (1 + t),)}
        scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, *arguments[schedule])
        batches = Batches(F64)
        for _ in range(40):
            optimizer.zero_grad()
            batches.loss(model).backward()
            if reg is not None:
                reg.accumulate_grad_()
            optimizer.step()
            scheduler.step()
        return model

    assert largest_difference(run(torch.optim.AdamW), run(SpectralAdamW, strength=STRENGTH)) <= 1e-10


def test_lr_and_strength_as_tensors() -> None:
    model, other = net(F64), net(F64)
    lr, strength = torch.tensor(LR, dtype=F64), torch.tensor(STRENGTH, dtype=F64)
    optimizer = SpectralAdamW(model.parameters(), lr=lr, model=model, strength=strength)
    plain = SpectralAdamW(other.parameters(), lr=LR, model=other, strength=STRENGTH)
    batches, others = Batches(F64), Batches(F64)
    for step in range(10):
        lr.fill_(LR / (1 + step))
        strength.fill_(STRENGTH * step)
        for group in plain.param_groups:
            group.update(lr=LR / (1 + step), strength=STRENGTH * step)
        train(model, optimizer, batches, 1)
        train(other, plain, others, 1)
    assert largest_difference(model, other) == 0.0


def test_grad_scaler() -> None:
    """Gradients come scaled, a step with an infinity is skipped whole; otherwise as without a scaler."""
    model, other = net(), net()
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)
    plain = SpectralAdamW(other.parameters(), lr=LR, model=other, strength=STRENGTH)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    batches, others = Batches(), Batches()
    for step in range(8):
        optimizer.zero_grad()
        scaler.scale(batches.loss(model)).backward()
        if step == 4:
            assert model.head.weight.grad is not None
            model.head.weight.grad[0, 0] = math.inf
            before = [p.clone() for p in model.parameters()]
            state = [x.clone() for s in optimizer.state.values() for x in s.values()]
            sigmas = optimizer.sigmas()
        scaler.step(optimizer)
        scaler.update()
        if step == 4:
            assert all(same_bits(p, q) for p, q in zip(model.parameters(), before, strict=True))
            after = [x for s in optimizer.state.values() for x in s.values()]
            assert all(same_bits(x, y) for x, y in zip(after, state, strict=True))
            assert all(same_bits(x, sigmas[name]) for name, x in optimizer.sigmas().items())
            others.loss(other)
        else:
            plain.zero_grad()
            others.loss(other).backward()
            plain.step()
    # Scales are powers of two: exact.
    assert largest_difference(model, other) == 0.0


def test_grad_scaler_with_unscale() -> None:
    model, other = net(), net()
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)
    plain = SpectralAdamW(other.parameters(), lr=LR, model=other, strength=STRENGTH)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batches = Batches()
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(batches.loss(model)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    train(other, plain, Batches(), 3)
    assert largest_difference(model, other) == 0.0


def test_closure_and_hooks() -> None:
    model = net()
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = Batches().loss(model)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] and called == ["before", "after"] * 20


def test_penalty_is_that_of_the_new_weights(backend: str) -> None:
    model, optimizer = folded(net(), 3)
    reg = SpectralRegularizer(model, strength=STRENGTH)
    with torch.no_grad():
        expected = reg(advance=False)
    assert optimizer.penalty is not None and optimizer.penalty.ndim == 0
    # Its vectors start converged, ours are three steps on their way.
    assert abs(optimizer.penalty.item() - expected.item()) <= 1e-3 * expected.item()


def test_groups_with_settings_of_their_own() -> None:
    """strength, exponent and target per group: as a regularizer for each."""
    model, other = net(F64), net(F64)
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in head)]
    groups = [{"params": rest}, {"params": head, "strength": 0.1, "exponent": 1.0, "target": 0.5, "lr": 1e-2}]
    optimizer = SpectralAdamW(groups, lr=LR, model=model, strength=STRENGTH)
    first = SpectralRegularizer(other, strength=STRENGTH, exclude="head.*")
    second = SpectralRegularizer(other, strength=0.1, exponent=1.0, target=0.5, include="head.*")
    others = list(other.head.parameters())
    rest = [p for p in other.parameters() if all(p is not q for q in others)]
    beside = torch.optim.AdamW([{"params": rest}, {"params": others, "lr": 1e-2}], lr=LR)
    batches, same = Batches(F64), Batches(F64)
    for _ in range(50):
        train(model, optimizer, batches, 1)
        other.zero_grad()
        same.loss(other).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        first.accumulate_grad_()
        second.accumulate_grad_()
        beside.step()
    assert largest_difference(model, other) <= 1e-10


def test_backends_agree() -> None:
    models = []
    for name in ("reference", "native"):
        with backends.use_backend(name):  # type: ignore[arg-type]
            models.append(folded(net(F64), 50, dtype=F64)[0])
    # Attention does not depend on the key's bias: its gradient is rounding, blown up by the moments (measured: 2e-11).
    assert largest_difference(*models) <= 1e-9


def test_surroundings_compile_whole() -> None:
    """The step itself is not traced: it stands outside of what is compiled with fullgraph=True, or breaks the graph."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    optimizer = SpectralAdamW(model.parameters(), model=model, strength=STRENGTH)
    beside = SpectralAdamW(other.parameters(), model=other, strength=STRENGTH)
    x = torch.randn(4, 3)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")

    def step(x: torch.Tensor) -> torch.Tensor:
        beside.zero_grad()
        value = other(x).square().sum()
        value.backward()
        beside.step()
        return value

    whole = torch.compile(step, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).backward()
        optimizer.step()
        whole(x)
    assert largest_difference(model, other) <= 1e-6


def test_a_model_of_transformers() -> None:
    """GPT-2: weights stored (in, out), read along their columns, and an embedding tied to the head."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 31, "n_positions": 12}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    start = transformers.GPT2LMHeadModel(config).double()
    words = torch.randint(31, (4, 12), generator=torch.Generator().manual_seed(1))
    rules: dict[Any, Any] = {"*.c_attn.weight": Rule(split=(3, 1))}
    models = []
    for kind in (torch.optim.AdamW, SpectralAdamW):
        model = copy.deepcopy(start)
        own: dict[str, Any] = {}
        reg = None
        if kind is SpectralAdamW:
            own = {"model": model, "strength": STRENGTH, "rules": rules}
        else:
            reg = SpectralRegularizer(model, strength=STRENGTH, rules=rules)
        optimizer = kind(model.parameters(), lr=LR, **own)
        for _ in range(30):
            optimizer.zero_grad()
            model(input_ids=words, labels=words).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if reg is not None:
                reg.accumulate_grad_()
            optimizer.step()
        models.append(model)
    assert largest_difference(models[0], models[1]) <= 1e-9
    assert largest_difference(models[0], start) >= 1e-2


# ---- looking at it ----


def test_penalty_gradients_are_what_the_next_step_takes_in() -> None:
    model, _, reg = apart(net(F64), 3, dtype=F64)
    _, optimizer = folded(net(F64), 3, dtype=F64)
    found = optimizer.penalty_gradients()
    model.zero_grad()
    reg.accumulate_grad_()
    penalised = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == penalised.keys() and len(found) > 8
    for name, gradient in penalised.items():  # rounding along three steps
        assert found[name].shape == gradient.shape
        assert (found[name] - gradient).abs().max() <= 1e-10 * (1e-3 + gradient.abs().max()), name
    again = optimizer.penalty_gradients()
    assert all(same_bits(again[name], x) for name, x in found.items())
