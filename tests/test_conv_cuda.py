"""Conv operators on a device: csrc's kernels against the CPU and float64, and what emulation cannot show.

Run by `make gpu`; tests/test_conv_blocks.py checks the same blocks without a device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conv_networks import ResNet18, UNet
from conv_samples import MIXED, OPS, SAMPLES, UNSEEN, ConvSample, Problem
from helpers import BF16, F16, F32, F64, NAMES, same_bits
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer, backends

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# As tests/test_conv_blocks.py.
CLOSE = {F32: 2e-5, F16: 2e-3, BF16: 2e-2}
LAUNCHES = 1_000


def results(problem: Problem, device: torch.device) -> list[Tensor]:
    weights = [w.to(device) for w in problem.weights]
    v, exponents = problem.v.to(device), problem.exponents.to(device)
    numbers = problem.layouts, problem.targets, problem.scales, 2.0
    out = list(OPS.spectral_penalty(weights, v, exponents, *numbers))
    upstream = torch.tensor(0.7, dtype=v.dtype, device=device)
    out += OPS.spectral_penalty_backward(upstream, weights, *out[1:4], *numbers)
    out += OPS.power_iteration(weights, v, exponents, problem.layouts, 3)
    gradients, sigma = [torch.ones_like(w) for w in weights], torch.zeros_like(exponents, dtype=v.dtype)
    strength = torch.tensor(0.3, dtype=F64, device=device)
    value = OPS.accumulate_grad_(gradients, weights, v, exponents, sigma, *numbers, strength, None, None)
    return [*out, value, sigma, *gradients, v, exponents]


def assert_close(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for x, y in zip(found, expected, strict=True):
        assert ((x.cpu().double() - y.double()).norm() <= limit * y.double().norm() + 1e-30).item()


def network() -> tuple[nn.Module, SpectralRegularizer]:
    torch.manual_seed(0)
    model = ResNet18(width=16).to(DEVICE)
    reg = SpectralRegularizer(model, strength=0.1, conv="operator", input_size=(3, 32, 32))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model, reg


def test_native_serves_this_device() -> None:
    assert backends.choose(DEVICE, "conv_accumulate_grad_", F32) == "native"
    assert backends.choose(DEVICE, "conv_spectral_norm", F32) == "reference"


@pytest.mark.parametrize("dtype", CLOSE, ids=NAMES.get)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_every_kind_of_layer_agrees_with_the_cpu(sample: ConvSample, dtype: torch.dtype) -> None:
    problem = Problem([sample], dtype)
    assert_close(results(problem, DEVICE), results(problem, torch.device("cpu")), CLOSE[dtype])


def test_many_layers_in_one_call_agree_with_the_cpu() -> None:
    strided = ConvSample((17, 19), (3, 3), 96, 130, padding=1, stride=2)
    problem = Problem([*MIXED, strided, ConvSample((4, 4), (3, 3), 200, 260, padding=1)], F32)
    assert_close(results(problem, DEVICE), results(problem, torch.device("cpu")), CLOSE[F32])


@pytest.mark.parametrize(("mode", "transposed"), [("zeros", False), ("circular", False), ("zeros", True)])
@pytest.mark.parametrize("dims", [1, 2])
def test_every_small_geometry(dims: int, mode: str, transposed: bool) -> None:
    problem = Problem.of_windows(dims, mode, transposed)
    assert_close(results(problem, DEVICE), results(problem, torch.device("cpu")), CLOSE[F32])


@pytest.mark.parametrize("sample", UNSEEN, ids=str)
def test_windows_that_see_nothing_but_padding(sample: ConvSample) -> None:
    problem = Problem([sample], F32)
    assert_close(results(problem, DEVICE), results(problem, torch.device("cpu")), CLOSE[F32])


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30, float("nan")])
def test_the_ends_of_the_range(factor: float) -> None:
    problem = Problem(MIXED, F32)
    problem.weights = [factor * w if i % 2 else w for i, w in enumerate(problem.weights)]
    found, expected = results(problem, DEVICE), results(problem, torch.device("cpu"))
    for i in (1, 2, 3):
        x, y = found[i].cpu().double(), expected[i].double()
        assert torch.equal(x.isfinite(), y.isfinite())
        assert_close([x.nan_to_num(0.0)], [y.nan_to_num(0.0)], CLOSE[F32])


def test_the_drop_in_agrees_with_the_cpu() -> None:
    torch.manual_seed(0)
    model = UNet(8)
    reg = SpectralRegularizer(model, strength=0.1, conv="operator", input_size=(2, 24, 24))
    reg.accumulate_grad_()
    state = reg.state_dict()
    here = [p.grad.clone() for p in model.parameters()]
    model.to(DEVICE)
    other = SpectralRegularizer(model, strength=0.1, conv="operator", input_size=(2, 24, 24))
    other.load_state_dict(state)
    model.zero_grad()
    other(advance=False).backward()
    assert reg.sigmas().keys() == other.sigmas().keys()
    for p, g in zip(model.parameters(), here, strict=True):
        # A step later than the first: vectors were converged to 1e-5 of sigma, their own error is about its root.
        assert (p.grad.cpu() - g).norm() <= 1e-3 * g.norm() + 1e-7


def test_the_same_bits_at_every_launch() -> None:
    model, reg = network()
    state = reg.state_dict()
    first: list[Tensor] = []
    for launch in range(LAUNCHES):
        reg.load_state_dict(state)
        for p in model.parameters():
            p.grad.zero_()
        reg.accumulate_grad_()
        if launch % 100 == 0:
            now = [p.grad.clone() for p in model.parameters()]
            first = first or now
            assert all(same_bits(x, y) for x, y in zip(now, first, strict=True))


def test_a_step_is_three_launches() -> None:
    model = ResNet18(width=16).to(DEVICE)
    others = ["head.*", "*.bn?.*", "*.shortcut.*", "stem.1.*"]
    reg = SpectralRegularizer(model, strength=0.1, conv="operator", input_size=(3, 32, 32), exclude=others)
    reg.accumulate_grad_()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        reg.accumulate_grad_()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    names = [e.name for e in profile.events() or [] if e.device_type == on_device and "Sync" not in e.name]
    assert len(names) == 3 and all("conv_kernel" in name for name in names), names


def test_no_sync_with_the_host() -> None:
    _, reg = network()
    reg.strength = torch.tensor(0.1, device=DEVICE)
    reg.accumulate_grad_()
    reg().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        reg.accumulate_grad_()
        reg().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_weights_and_strength() -> None:
    model, reg = network()
    strength = torch.tensor(0.1, device=DEVICE)
    reg.strength = strength
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            reg.accumulate_grad_()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = reg.accumulate_grad_()
    state = reg.state_dict()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    strength.fill_(0.2)
    for p in model.parameters():
        p.grad.zero_()
    graph.replay()
    replayed, gradients = value.clone(), [p.grad.clone() for p in model.parameters()]
    reg.load_state_dict(state)
    for p in model.parameters():
        p.grad.zero_()
    eager = reg.accumulate_grad_()
    assert same_bits(replayed, eager)
    assert all(same_bits(x, p.grad) for x, p in zip(gradients, model.parameters(), strict=True))


def test_a_skipped_step_changes_nothing() -> None:
    model = ResNet18(width=8).to(DEVICE)
    reg = SpectralRegularizer(model, strength=0.1, conv="operator", input_size=(3, 16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    reg.attach(optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    before, state = [p.detach().clone() for p in model.parameters()], reg.state_dict()
    scaler.scale(model(torch.randn(2, 3, 16, 16, device=DEVICE)).sum()).backward()
    next(model.parameters()).grad.fill_(float("inf"))
    scaler.step(optimizer)
    assert all(same_bits(p, x) for p, x in zip(model.parameters(), before, strict=True))
    after = reg.state_dict()
    assert all(same_bits(after["v"][name], v) for name, v in state["v"].items())


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        pytest.skip("compute-sanitizer is not installed")
    code = (
        "import torch; from torch import nn; from spectral_ops import SpectralRegularizer\n"
        "m = nn.Sequential(nn.Conv2d(3, 70, 3, padding=1), nn.Conv2d(70, 70, 3, stride=2, groups=7),\n"
        "    nn.ConvTranspose2d(70, 9, 3, stride=2), nn.Conv2d(9, 9, 3, padding=1, groups=9)).cuda()\n"
        "r = SpectralRegularizer(m, strength=1.0, conv='operator', input_size=(3, 14, 14))\n"
        "for _ in range(2): r.accumulate_grad_()\n"
        "r().backward(); torch.cuda.synchronize()\n"
    )
    run = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "3", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert run.returncode == 0 and "0 errors" in run.stdout, run.stdout[-3000:] + run.stderr[-2000:]
