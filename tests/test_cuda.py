"""The drop-in and the ops on a CUDA device, whatever backend serves it there. Run by `make gpu`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from spectral_ops import SpectralRegularizer, power_iteration, spectral_norm, spectral_penalty

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# float32 sums of this size differ by 1e-7 to 3e-7 between orders of summation on the CPU; ten times that here.
CLOSE = 3e-6


def make_model() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3)
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(288, 33), nn.LayerNorm(33), nn.Linear(33, 7))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()).item()


def test_converged_norm_against_float64() -> None:
    weights = [torch.randn(70, 40, device=DEVICE), torch.randn(5, 300, device=DEVICE)]
    truth = torch.stack([torch.linalg.matrix_norm(w.double().cpu(), 2) for w in weights])
    assert relative(spectral_norm(weights), truth) <= CLOSE


def vit_weights(blocks: int = 4) -> list[torch.Tensor]:
    """Matrices of the shapes of a ViT-S, as torch initialises them, in two dtypes."""
    torch.manual_seed(0)
    shapes = [(384, 768), *[(1152, 384), (384, 384), (1536, 384), (384, 1536)] * blocks, (1000, 384)]
    weights = [nn.Linear(n, m, bias=False).weight.detach() for m, n in shapes]
    return [w.to(DEVICE, torch.bfloat16 if i % 3 == 0 else torch.float32) for i, w in enumerate(weights)]


def test_converged_norms_of_a_vit_against_float64() -> None:
    weights = vit_weights()
    truth = torch.stack([torch.linalg.matrix_norm(w.double().cpu(), 2) for w in weights])
    sigma, bound, u, v = spectral_norm(weights, return_bound=True, return_vectors=True)
    error = (sigma.double().cpu() - truth) / truth
    # Measured on the CPU (native): 2e-7. The largest values of such matrices lie within a per cent of each other.
    assert error.abs().max().item() <= 2e-6
    assert ((truth - sigma.double().cpu() - bound.double().cpu()) / truth).max().item() <= CLOSE
    for w, s, left, right in zip(weights, sigma, u, v, strict=True):
        assert relative(w.double().T @ left.double(), s.double() * right.double()) <= CLOSE


def test_converged_norms_look_at_the_device_once_every_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_ops.kernels import spectral_norm as kernels
    from spectral_ops.ops.triton_norm import CHECK

    weights = vit_weights(blocks=1)
    expected = spectral_norm(weights)  # tables and kernels exist
    steps = 0
    lanczos = kernels.launch_lanczos

    def counted(*args: object) -> None:
        nonlocal steps
        steps += 1
        lanczos(*args)

    monkeypatch.setattr(kernels, "launch_lanczos", counted)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sigma = spectral_norm(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = [str(w.message) for w in caught if "synchronizing" in str(w.message)]
    dtypes = len({w.dtype for w in weights})
    assert 0 < len(syncs) <= -(-steps // CHECK)
    assert steps > dtypes * CHECK  # several looks
    assert torch.equal(sigma, expected)


def test_ops_agree_with_the_cpu() -> None:
    weights = [torch.randn(33, 20), torch.randn(8, 50)]
    v = [torch.nn.functional.normalize(torch.ones(w.shape[1]), dim=0) for w in weights]
    on_device = [w.to(DEVICE) for w in weights]
    for op in (lambda w, x: power_iteration(w, x)[0], spectral_penalty):
        here, there = op(weights, [x.clone() for x in v]), op(on_device, [x.clone().to(DEVICE) for x in v])
        assert relative(there, here) <= CLOSE


@pytest.mark.parametrize("form", ["loss", "accumulate", "attach"])
def test_gradients_agree_with_the_cpu(form: str) -> None:
    gradients: list[list[torch.Tensor]] = []
    state: dict[str, dict[str, torch.Tensor]] = {}
    for device in ("cpu", "cuda"):
        model = make_model().to(device)
        reg = SpectralRegularizer(model, strength=0.5)
        # The start is converged to 1e-5 only, and differs by that between backends.
        state = state or reg.state_dict()
        reg.load_state_dict(state)
        if form == "loss":
            reg().backward()
        elif form == "accumulate":
            reg.accumulate_grad_()
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            reg.attach(optimizer)
            optimizer.step()
        gradients.append([p.grad for p in model.parameters()])
    for here, there in zip(*gradients, strict=True):
        assert (there.cpu() - here).norm().item() <= CLOSE * here.norm().item() + 1e-12  # biases of norms are 0


def test_follows_the_model_to_the_device_and_back() -> None:
    model = make_model()
    reg = SpectralRegularizer(model, strength=1.0)
    before = reg(advance=False).item()
    model.to(DEVICE)
    assert reg(advance=False).device.type == "cuda"
    model.cpu()
    assert abs(reg(advance=False).item() - before) <= CLOSE * abs(before)


def test_no_sync_with_the_host_on_the_step() -> None:
    model = make_model().to(DEVICE)
    reg = SpectralRegularizer(model, strength=torch.tensor(1e-3, device=DEVICE))
    reg.accumulate_grad_()  # gradients exist, groups stand
    reg().backward()  # and so do the tables of both forms
    torch.cuda.set_sync_debug_mode("error")
    try:
        reg.accumulate_grad_()
        reg().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_grad_scaler_with_a_fused_optimizer() -> None:
    models = [make_model().to(DEVICE) for _ in range(2)]
    models[1].load_state_dict(copy.deepcopy(models[0].state_dict()))
    x = torch.randn(4, 3, 8, 8, device=DEVICE)
    for model, scaled in zip(models, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        SpectralRegularizer(model, strength=1e-2).attach(optimizer)
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=scaled)
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert (a - b).abs().max().item() <= 1e-5  # a hundredth of the step; scaling by 1024 is exact
