"""The optimizer step's kernel on a device: real threads, many programs, graphs, scalers. Run by `make gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adamw_samples import EVERY_KIND, LAYOUTS, OPTION_SETS, OPTIONS, Problem
from helpers import BF16, F16, F32, NAMES, eps, same_bits
from layout_samples import Sample
from torch import Tensor, nn

from spectral_ops import SpectralAdamW, SpectralRegularizer, backends
from spectral_ops.ops.adamw_ref import adamw_step_ref
from spectral_ops.ops.adamw_state import Spectrum, Tensors

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LR, STRENGTH = 3e-3, 1e-2
LAUNCHES = 300


def moved(t: Tensor) -> Tensor:
    """On the device, lying in memory as it does here."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t.detach())


def on_device(problem: Problem) -> tuple[Tensors, Spectrum]:
    lists = [[None if t is None else moved(t) for t in tensors] for tensors in problem.tensors]
    return Tensors(*lists), Spectrum(*(x.to(DEVICE) for x in problem.spectrum))  # type: ignore[arg-type]


def compare(problem: Problem, by_chance: bool = False, **scalars: Any) -> None:
    """The device's kernel against the reference on the CPU, which tests/test_adamw.py holds against float64."""
    tensors, spectrum = on_device(problem)
    groups, hyper = [0] * len(problem.samples), [problem.hyper]
    there = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in scalars.items()}
    step = problem.table.triton_adamw.step_adamw
    value = step(tensors, spectrum, groups, hyper, problem.options, **there)
    arguments = problem.tensors, problem.spectrum, problem.table, groups, hyper, problem.options
    expected = adamw_step_ref(*arguments, scalars.get("grad_scale"), scalars.get("found_inf"))
    for name, ours, theirs in zip(Tensors._fields, tensors, problem.tensors, strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if b is None or name == "gradients" or b.numel() == 0:
                continue
            b = b.detach().double()
            size = max(b.abs().max().item(), 0.1)
            # A handful of roundings, and in 16 bits one that may go the other way.
            allowed = 32 * eps(F32) * size + (torch.finfo(a.dtype).eps * size if a.element_size() == 2 else 0.0)
            assert (a.cpu().double() - b).abs().max().item() <= allowed, (problem.samples[i].name, name)
            if by_chance and name == "weights" and a.dtype == BF16:
                assert (a.cpu().double() != b).double().mean() <= 1e-2
    # Of 16-bit weights that were rounded the other way here and there.
    rough = 64 * eps(F32) if problem.dtype == F32 else 2e-2
    for name, x, y in zip(Spectrum._fields, spectrum, problem.spectrum, strict=True):
        if name != "exponents" and y.numel():
            assert (x.cpu() - y).norm() <= rough * max(y.norm().item(), 1e-3), name
    assert abs(value.item() - expected.item()) <= 4 * rough * (abs(expected.item()) + 1e-2)


def test_triton_serves_this_device() -> None:
    assert backends.choose(DEVICE, "adamw_step") == "triton"


@pytest.mark.parametrize("sample", LAYOUTS, ids=lambda s: s.name)
def test_every_layout(sample: Sample) -> None:
    compare(Problem([sample]))


@pytest.mark.parametrize("options", OPTION_SETS, ids=lambda o: "-".join(o) or "none")
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F32)], ids=lambda d: "-".join(NAMES[x] for x in d))
def test_options_and_dtypes(dtypes: tuple[torch.dtype, torch.dtype], options: dict[str, bool]) -> None:
    compare(Problem(EVERY_KIND, *dtypes, options=OPTIONS._replace(**options)))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda d: NAMES[d])
def test_masters(dtype: torch.dtype) -> None:
    compare(Problem(EVERY_KIND, dtype, masters=True))


def test_stochastic_rounding_draws_the_same() -> None:
    compare(Problem(EVERY_KIND, BF16, options=OPTIONS._replace(stochastic_rounding=True, seed=3)), by_chance=True)


def test_scaled_and_skipped() -> None:
    compare(Problem(EVERY_KIND), grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0))
    compare(Problem(EVERY_KIND), grad_scale=torch.tensor(8.0), found_inf=torch.tensor(1.0))


# ---- the optimizer ----


class Block(nn.Module):
    """Wide and narrow matrices, a conv, norms, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 256)
        self.conv = nn.Conv1d(256, 384, 3, padding=1)
        self.norm = nn.LayerNorm(384)
        self.up, self.down = nn.Linear(384, 1536), nn.Linear(1536, 384)
        self.wide = nn.Linear(384, 5000)
        self.back = nn.Linear(5000, 10)

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(words).mT).mT)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.back(torch.tanh(self.wide(x.mean(1))))


def block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block().to(DEVICE)


def backward(model: nn.Module, generator: torch.Generator) -> None:
    words = torch.randint(300, (16, 7), generator=generator, device=DEVICE)
    labels = torch.randint(10, (16,), generator=generator, device=DEVICE)
    nn.functional.cross_entropy(model(words), labels).backward()


def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(1)


def test_trains_as_the_penalty_apart() -> None:
    ours, theirs = block(), block()
    folded = SpectralAdamW(ours.parameters(), lr=LR, model=ours, strength=STRENGTH)
    reg = SpectralRegularizer(theirs, strength=STRENGTH)
    apart = torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True)
    a, b = generator(), generator()
    for _ in range(20):
        for model, draws in ((ours, a), (theirs, b)):
            model.zero_grad()
            backward(model, draws)
        folded.step()
        reg.accumulate_grad_()
        apart.step()
    # Roundings of the two ways, which Adam's quotients of small numbers blow up: 20 steps of at most 3e-3.
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() <= 2e-3
        assert (p - q).norm() <= 1e-3 * q.norm() + 1e-4
    with torch.no_grad():
        reg.accumulate_grad_()  # of the weights after the last step
    for name, sigma in folded.sigmas().items():
        assert torch.allclose(sigma, reg.sigmas()[name], rtol=1e-3), name


def test_replayed_from_a_graph() -> None:
    """A step in a CUDA graph, its learning rate a tensor that a schedule fills: the bits of eager steps."""
    models, finals = (block(), block()), []
    for model, graphed in zip(models, (False, True), strict=True):
        lr = torch.tensor(LR, device=DEVICE)
        optimizer = SpectralAdamW(model.parameters(), lr=lr, model=model, strength=STRENGTH, capturable=True)
        draws = generator()
        gradients = []
        for _ in range(6):
            backward(model, draws)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        run: Any = optimizer.step
        graph = torch.cuda.CUDAGraph()
        for i, given in enumerate(gradients):
            for p, g in zip(model.parameters(), given, strict=True):
                assert p.grad is not None
                p.grad.copy_(g)
            lr.fill_(LR / (1 + i))
            if graphed and i == 2:  # captured after two steps; capturing runs nothing
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    optimizer.step()
                run = graph.replay
            run()
        torch.cuda.synchronize()
        finals.append([p.detach().clone() for p in model.parameters()] + [*optimizer.sigmas().values()])
    assert all(same_bits(a, b) for a, b in zip(*finals, strict=True))


def test_a_graph_outlives_a_new_cut_of_the_parameters() -> None:
    """The first gradient of an embedding changes what a step is made of; a replay goes on with what it was made of."""
    model = nn.Sequential(nn.Linear(300, 200), nn.Embedding(20, 200)).to(DEVICE)
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH, capturable=True)
    linear, table = model
    for p in linear.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    table.weight.grad = torch.ones_like(table.weight)
    optimizer.step()
    held = [torch.full((1 << 18,), float("nan"), device=DEVICE) for _ in range(64)]  # in memory that was given up
    before = table.weight.detach().clone()
    count = optimizer.state[linear.weight]["step"].item()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert len(held) == 64 and same_bits(before, table.weight.detach())
    assert optimizer.state[linear.weight]["step"].item() == count + 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_first_step_under_capture_is_refused() -> None:
    model = block()
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH, capturable=True)
    backward(model, generator())
    optimizer.step()
    optimizer.param_groups[0]["exponent"] = 1.5  # parameters are cut anew
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="before a CUDA graph of it is captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_one_launch() -> None:
    model = block()
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH)
    backward(model, generator())
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        optimizer.step()
        torch.cuda.synchronize()
    names = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 1 and "adamw" in names[0], names


def test_grad_scaler_skips() -> None:
    model = block().half()
    optimizer = SpectralAdamW(model.parameters(), lr=LR, model=model, strength=STRENGTH, master_weights=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=1)
    draws = generator()
    for overflow in (False, True, False):
        model.zero_grad()
        words = torch.randint(300, (16, 7), generator=draws, device=DEVICE)
        loss = model(words).float().square().mean() * (1e30 if overflow else 1.0)
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in model.parameters()] + [x.clone() for x in optimizer.sigmas().values()]
        count = optimizer.state[model.up.weight]["step"].item() if optimizer.state else 0.0
        scaler.step(optimizer)
        scaler.update()
        after = [*model.parameters(), *optimizer.sigmas().values()]
        kept = all(same_bits(a, b) for a, b in zip(before, after, strict=True))
        assert kept == overflow
        assert optimizer.state[model.up.weight]["step"].item() == count + (0.0 if overflow else 1.0)


@pytest.mark.parametrize("delayed", [False, True])
def test_many_steps_give_the_same_bits(delayed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(EVERY_KIND)
    first: list[Tensor] | None = None
    step = problem.table.triton_adamw.step_adamw
    for i in range(LAUNCHES):
        if delayed and i > 0:
            monkeypatch.setenv("SPECTRAL_OPS_DEBUG", "1")
            monkeypatch.setenv("SPECTRAL_OPS_DELAYS", str(i))
        tensors, spectrum = on_device(problem)
        value = step(tensors, spectrum, [0] * len(problem.samples), [problem.hyper], problem.options)
        now = [value, *spectrum, *tensors.weights, *tensors.exp_avgs, *tensors.exp_avg_sqs]
        first = now if first is None else first
        assert all(same_bits(a, b) for a, b in zip(first, now, strict=True)), f"launch {i}"
