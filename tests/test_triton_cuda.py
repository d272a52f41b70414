"""The one-launch kernel on a device: what the interpreter cannot show. Run by `make gpu`.

Memory order, many programs at once, streams, graphs, sanitizers. tests/test_triton_penalty.py runs there too.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BF16, F32, eps, relative_error, same_bits
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer, backends, power_iteration, spectral_penalty
from spectral_ops.ops.layout import Layout, pack

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
LAUNCHES = 10_000
STRESS_LAUNCHES = 2_000


def make_model(width: int = 256, depth: int = 3) -> nn.Module:
    """Linear layers of several widths with biases and norms, a conv, and a layer too wide for one sweep."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 7), nn.Linear(9001, 5)]
    for i in range(depth):
        layers += [nn.Linear(width, 3 * width), nn.LayerNorm(width), nn.Linear(width * (i + 1), width - i)]
    return nn.ModuleList(layers).to(DEVICE)


def zero_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def results(model: nn.Module, reg: SpectralRegularizer, value: Tensor) -> list[Tensor]:
    state = reg.state_dict()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [value.clone(), *gradients, *state["v"].values(), *state["sigma"].values()]


def test_triton_serves_this_device() -> None:
    for op in ("accumulate_grad_", "power_iteration", "spectral_penalty", "spectral_norm"):
        assert backends.choose(DEVICE, op) == "triton"


def test_agrees_with_the_oracle_in_float64() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    zero_gradients(model)
    state = reg.state_dict()
    value = reg.accumulate_grad_()
    exact = make_model().double()
    oracle = SpectralRegularizer(exact, strength=1.0)
    oracle.load_state_dict({key: {name: x.double() if key != "exponent" else x for name, x in part.items()}
                            for key, part in state.items()})  # fmt: skip
    zero_gradients(exact)
    true = oracle.accumulate_grad_()
    assert relative_error(value, true) <= 64 * eps(F32)
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        # Sums of up to 9001 float32 products: 6 roundings on the CPU.
        assert (p.grad.double() - q.grad).abs().max() <= 64 * eps(F32) * max(q.grad.abs().max().item(), 1.0)


def test_many_launches_give_the_same_bits() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    kept = reg.state_dict()
    first: list[Tensor] | None = None
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for i in range(LAUNCHES):
        if i % 100 == 0:
            reg.load_state_dict(kept)
        zero_gradients(model)
        value = reg.accumulate_grad_()
        if i % 100 == 0:
            now = results(model, reg, value)
            if first is None:
                first = now
            for a, b in zip(first, now, strict=True):
                different += (a != b).sum()
    assert different.item() == 0


@pytest.mark.parametrize("seed", range(8))
def test_random_delays_change_no_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    kept = reg.state_dict()
    zero_gradients(model)
    undisturbed = results(model, reg, reg.accumulate_grad_())
    monkeypatch.setenv("SPECTRAL_OPS_DEBUG", "1")
    for i in range(STRESS_LAUNCHES // 8):
        monkeypatch.setenv("SPECTRAL_OPS_DELAYS", str(1 + seed * STRESS_LAUNCHES + i))
        reg.load_state_dict(kept)
        zero_gradients(model)
        delayed = results(model, reg, reg.accumulate_grad_())
        assert all(same_bits(a, b) for a, b in zip(undisturbed, delayed, strict=True)), f"delays {seed}, launch {i}"


def test_a_matrix_of_more_than_2_31_elements() -> None:
    m, n = 66_000, 33_000
    if torch.cuda.mem_get_info()[0] < 2.2 * m * n * 2:
        pytest.skip("needs 10 GB of free memory")
    w = torch.zeros(m, n, dtype=BF16, device=DEVICE)
    w[-1, -8:] = 3.0  # beyond 2^31 elements: found only with 64-bit offsets
    w[0, :8] = 1.0
    v = torch.full((n,), 1 / math.sqrt(n), device=DEVICE)
    sigma, u, _ = power_iteration([w], [v], n_iter=5)
    assert abs(sigma.item() - 3 * math.sqrt(8)) <= 1e-5 * sigma.item()
    assert abs(u[0][-1].item()) >= 1 - 1e-5 and v[-8:].norm().item() >= 1 - 1e-5
    value = spectral_penalty([w.requires_grad_()], [v])
    value.backward()
    assert w.grad is not None and w.grad[-1, -1].item() > 0
    assert w.grad[1 : m // 2, : n // 2].count_nonzero().item() == 0


def test_captured_and_replayed_with_changed_weights_and_strength() -> None:
    model = make_model()
    strength = torch.tensor(0.5, device=DEVICE)
    reg = SpectralRegularizer(model, strength=strength)
    zero_gradients(model)
    for _ in range(3):
        reg.accumulate_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = reg.accumulate_grad_()
    eager = SpectralRegularizer(model, strength=strength)
    for step in range(4):
        with torch.no_grad():
            strength.fill_(0.25 * (step + 1))
            for p in model.parameters():
                p.mul_(1 + 0.01 * step)
                p.grad.zero_()
        eager.load_state_dict(reg.state_dict())
        graph.replay()
        replayed = results(model, reg, value)
        for p in model.parameters():
            p.grad.zero_()
        repeated = results(model, eager, eager.accumulate_grad_())
        assert all(same_bits(a, b) for a, b in zip(repeated, replayed, strict=True))


def test_the_loss_form_is_captured_too() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    zero_gradients(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            reg().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    zero_gradients(model)
    with torch.cuda.graph(graph):
        value = reg()
        value.backward()
    kept = reg.state_dict()
    for p in model.parameters():
        p.grad.zero_()
    graph.replay()
    replayed = results(model, reg, value.detach())
    reg.load_state_dict(kept)
    zero_gradients(model)
    value = reg()
    value.backward()
    for a, b in zip(results(model, reg, value.detach()), replayed, strict=True):
        assert relative_error(a, b) <= 4 * eps(F32)


def test_captured_again_after_a_state_was_loaded() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    zero_gradients(model)
    kept = reg.state_dict()
    reg.accumulate_grad_()
    graphs, values = [], []
    for _ in range(3):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            values.append(reg.accumulate_grad_())
    found = []
    for graph, value in zip(graphs, values, strict=True):
        reg.load_state_dict(kept)  # in place: all three graphs go on with the same vectors
        for p in model.parameters():
            assert p.grad is not None
            p.grad.zero_()
        graph.replay()
        found.append(results(model, reg, value))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_compiled_step_keeps_its_table() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=torch.tensor(0.1, device=DEVICE))
    zero_gradients(model)
    step = torch.compile(lambda: reg.accumulate_grad_())
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() <= before + 4096


def test_gradients_set_to_none_are_made_anew() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    for _ in range(5):
        for p in model.parameters():
            p.grad = None
        reg.accumulate_grad_()
        filler = [torch.randn_like(p) for p in model.parameters()]  # so that memory is not simply handed out again
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        del filler


def test_two_regularizers_on_two_streams() -> None:
    models = [make_model(), make_model(192, 2)]
    regs = [SpectralRegularizer(model, strength=1.0) for model in models]
    kept = [reg.state_dict() for reg in regs]
    alone = []
    for model, reg in zip(models, regs, strict=True):
        zero_gradients(model)
        alone.append(results(model, reg, reg.accumulate_grad_()))
    streams = [torch.cuda.Stream() for _ in regs]
    for _ in range(100):
        values = []
        for model, reg, state in zip(models, regs, kept, strict=True):
            reg.load_state_dict(state)
            zero_gradients(model)
        torch.cuda.synchronize()
        for reg, stream in zip(regs, streams, strict=True):
            with torch.cuda.stream(stream):
                values.append(reg.accumulate_grad_())
        torch.cuda.synchronize()
        for model, reg, value, true in zip(models, regs, values, alone, strict=True):
            assert all(same_bits(a, b) for a, b in zip(true, results(model, reg, value), strict=True))


def test_one_regularizer_on_alternating_streams() -> None:
    model, other = make_model(), make_model()
    reg, single = SpectralRegularizer(model, strength=1.0), SpectralRegularizer(other, strength=1.0)
    single.load_state_dict(reg.state_dict())
    streams = [torch.cuda.Stream() for _ in range(2)]
    zero_gradients(model)
    zero_gradients(other)
    torch.cuda.synchronize()
    for step in range(50):
        with torch.cuda.stream(streams[step % 2]):  # each waits for the last one's launch
            value = reg.accumulate_grad_()
        true = single.accumulate_grad_()
    torch.cuda.synchronize()
    for a, b in zip(results(model, reg, value), results(other, single, true), strict=True):
        assert same_bits(a, b)


def kernels_of(run: Callable[[], object]) -> list[str]:
    """The names of what a call runs on the device: kernels, copies and fills."""
    run()  # compiles, and makes tables
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    # Beside them the profiler lists calls of the driver, which are the host's.
    on_device = torch.autograd.DeviceType.CUDA
    return [e.name for e in profile.events() or [] if e.device_type == on_device and "Sync" not in e.name]


def test_the_kernel_is_launched_once() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    zero_gradients(model)
    kernels = kernels_of(reg.accumulate_grad_)
    assert len(kernels) == 1 and "_penalty_kernel" in kernels[0], kernels


def test_a_replay_is_one_launch() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    zero_gradients(model)
    for _ in range(3):
        reg.accumulate_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reg.accumulate_grad_()
    kernels = kernels_of(graph.replay)
    assert len(kernels) == 1 and "_penalty_kernel" in kernels[0], kernels


def test_the_loss_form_is_one_launch_forward_and_one_backward() -> None:
    """Beside them the product with the strength, its own backward, and where the new gradients lie, copied over."""
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    forward = kernels_of(reg)
    assert sum("_penalty_kernel" in name for name in forward) == 1 and len(forward) <= 2, forward
    parameters = list(model.parameters())
    both = kernels_of(lambda: torch.autograd.grad(reg(), parameters))
    assert sum("_penalty_backward_kernel" in name for name in both) == 1 and len(both) <= 6, both


def test_many_matrices_are_a_handful_of_launches() -> None:
    weights = [torch.randn(40 + i, 30 + i, device=DEVICE) for i in range(60)]
    v = [torch.nn.functional.normalize(torch.ones(w.shape[1], device=DEVICE), dim=0) for w in weights]
    kernels = kernels_of(lambda: power_iteration(weights, v, n_iter=3))
    assert len(kernels) <= 10, kernels  # the vectors of the list gathered, one step kernel, vectors handed back


def test_no_sync_and_no_memory_on_the_step() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1e-3)
    zero_gradients(model)
    reg.accumulate_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        reg.accumulate_grad_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before <= 1024  # the value


def test_opcheck() -> None:
    pytest.importorskip("expecttest")  # which torch.library.opcheck imports
    w = [torch.randn(9, 33, device=DEVICE, requires_grad=True), torch.randn(4, 5, device=DEVICE, requires_grad=True)]
    v = torch.cat([torch.full((n,), n**-0.5, device=DEVICE) for n in (33, 5)])
    exponents = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    layouts = pack([Layout(), Layout()])
    torch.library.opcheck(
        torch.ops.spectral_ops.spectral_penalty, (w, v, exponents, layouts, [1.0, 1.0], [1.0, 1.0], 2.0)
    )
    plain = [x.detach() for x in w]
    torch.library.opcheck(torch.ops.spectral_ops.power_iteration, (plain, v, exponents, layouts, 2))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_as_one_graph(mode: str) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).to(DEVICE)
    reg = SpectralRegularizer(model, strength=0.1)
    eager = SpectralRegularizer(model, strength=0.1)
    eager.load_state_dict(reg.state_dict())
    x = torch.randn(8, 64, device=DEVICE)

    def loss(form: Any) -> Tensor:
        return model(x).square().mean() + form()

    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for _ in range(4):
        gradients = []
        for function, form in ((compiled, reg), (loss, eager)):
            model.zero_grad()
            function(form).backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert relative_error(a, b) <= 1e-5  # matrix products of two compilers, TF32 off


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.slow
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        pytest.skip("compute-sanitizer is not installed")
    code = (
        "import torch; from torch import nn; from spectral_ops import SpectralRegularizer\n"
        "m = nn.ModuleList([nn.Conv2d(3, 24, 7), nn.Linear(300, 70), nn.LayerNorm(9), nn.Linear(9001, 3)]).cuda()\n"
        "r = SpectralRegularizer(m, strength=1.0)\n"
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
