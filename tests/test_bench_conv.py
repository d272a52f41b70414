"""bench/'s conv operators: layers, truth and baselines against dense matrices; a quick run."""

# ruff: noqa: F811  (fixtures of bench_fixtures, by their names)
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fixtures import _one_thread, needs_native, settings  # noqa: F401  fixtures, and bench/'s place
from test_bench import Traced
from torch import Tensor, nn

from bench import __main__ as command  # noqa: E402
from bench import bench_conv, conv_baselines, conv_problem, conv_truth, models, record, truth  # noqa: E402
from bench.case import FLOOR, Settings, check  # noqa: E402
from bench.conv_problem import ConvProblem  # noqa: E402
from bench.models import Conv  # noqa: E402
from bench.problem import TOLERANCE  # noqa: E402

F64 = torch.float64
# Strides that leave rows over and that do not, a 1 x 1 shortcut, a wide kernel.
CONVS = [Conv(4, 3, 3, 1, 5), Conv(3, 4, 3, 2, 6), Conv(3, 2, 3, 2, 5), Conv(5, 4, 1, 2, 5), Conv(2, 3, 7, 2, 9)]
STRENGTH = 0.1


def layer(conv: Conv, padding_mode: str = "zeros") -> nn.Conv2d:
    settings = {"stride": conv.stride, "padding": conv.padding, "padding_mode": padding_mode}
    return nn.Conv2d(conv.inputs, conv.outputs, conv.kernel, bias=False, dtype=F64, **settings)  # type: ignore[arg-type]


def dense(module: nn.Conv2d, size: int) -> Tensor:
    """The matrix of a layer, differentiable in its weight."""
    n = module.in_channels * size**2
    return module(torch.eye(n, dtype=F64).view(n, module.in_channels, size, size)).flatten(1).T


def start(conv: Conv) -> Tensor:
    v = torch.randn(1, conv.inputs, conv.size, conv.size, dtype=F64)
    return v / v.norm()


# ---- layers ----


def test_layers_are_the_networks() -> None:
    """Weights and multiplications of torchvision's ResNet-50 without its head; ResNet-18 in CIFAR form by hand."""
    cifar, resnet50 = models.CONV_NETS["resnet18-cifar"], models.CONV_NETS["resnet50"]
    assert (len(cifar), len(resnet50)) == (20, 53)
    weights = [sum(w.numel() for w in models.build(name).parameters()) for name in models.CONV_NETS]
    assert weights == [11_159_232, 23_454_912]  # 11,173,962 less 9,600 of BatchNorm and 5,130 of the head; 25.6 M less
    assert [sum(c.macs for c in net) for net in (cifar, resnet50)] == [555_417_600, 4_087_136_256]
    assert cifar[-1] == Conv(512, 512, 3, 1, 4) and resnet50[-1] == Conv(2048, 512, 1, 1, 7)


@pytest.mark.parametrize("conv", CONVS)
def test_output_sizes_are_torchs(conv: Conv) -> None:
    assert dense(layer(conv), conv.size).shape[0] == conv.outputs * conv.output_size**2


@pytest.mark.parametrize("name", models.CONV_NETS)
def test_quick_layers_have_outputs(name: str, settings: Settings) -> None:
    assert all(conv.output_size >= 1 for conv in models.conv_net(name, quick=True))
    assert len(ConvProblem(name, settings).layouts) == len(models.CONV_NETS[name])


# ---- truth and baselines ----


def problems() -> tuple[list[nn.Conv2d], list[Tensor], list[Tensor]]:
    modules, v = [layer(conv) for conv in CONVS], [start(conv) for conv in CONVS]
    weights = [module.weight for module in modules]
    for w in weights:
        w.grad = torch.zeros_like(w)
    return modules, weights, v


def test_truth_is_that_of_dense_matrices() -> None:
    modules, weights, v = problems()
    found = conv_truth.warm_step(weights, CONVS, v)
    value = torch.zeros((), dtype=F64)
    for i, (module, conv) in enumerate(zip(modules, CONVS, strict=True)):
        matrix = dense(module, conv.size)
        y = (matrix @ v[i].flatten()).detach()
        z = matrix.T @ (y / y.norm())
        sigma = z.norm()
        value = value + (sigma**2 - 1) ** 2
        assert found.sigma[i].item() == pytest.approx(sigma.item(), rel=1e-12)
        assert torch.allclose(found.v[i].flatten(), (z / sigma).detach(), rtol=0, atol=1e-12)
    assert found.value.item() == pytest.approx(value.item(), rel=1e-12)
    gradients = torch.autograd.grad(value, weights)
    assert truth.largest_error(found.dw, gradients) <= 1e-12


@pytest.mark.parametrize("in_place", [False, True])
def test_layer_by_layer_agrees(in_place: bool) -> None:
    _, weights, v = problems()
    true = conv_truth.warm_step(weights, CONVS, v)
    usual = conv_baselines.LayerByLayer(weights, CONVS, v, strength=STRENGTH, in_place=in_place)
    before = list(usual.v)
    sigma = usual.power_iteration()
    assert truth.largest_error([sigma, *usual.v], [true.sigma, *true.v]) <= 1e-12
    assert all((x is y) is in_place for x, y in zip(usual.v, before, strict=True))
    usual.restart(v)
    value = usual.accumulate_grad_()
    gradients = [w.grad for w in weights if w.grad is not None]
    scaled = [STRENGTH * dw for dw in true.dw]
    assert truth.largest_error([value, *usual.v, *gradients], [STRENGTH * true.value, *true.v, *scaled]) <= 1e-12
    usual.restart(v)
    usual.accumulate_grad_()
    assert truth.largest_error(gradients, [2 * dw for dw in scaled]) <= 1e-12  # added, not written


def test_fourier_methods_agree_with_dense_matrices() -> None:
    """Even and odd sizes, more inputs than outputs and fewer; the bound is above, and within its promise."""
    convs = [Conv(4, 3, 3, 1, 5), Conv(3, 4, 3, 1, 6), Conv(2, 2, 5, 1, 5)]
    modules = [layer(conv, "circular") for conv in convs]
    weights = [module.weight.detach() for module in modules]
    dense_norms = [
        torch.linalg.matrix_norm(dense(module, conv.size).detach(), 2)
        for module, conv in zip(modules, convs, strict=True)
    ]
    exact = torch.stack(dense_norms)
    assert truth.relative_error(conv_truth.circular_norms(weights, convs), exact) <= 1e-12
    assert truth.relative_error(conv_baselines.fft_norms(weights, convs), exact) <= 1e-12
    for iterations in (1, 3, 6):
        excess = conv_baselines.gram_bounds(weights, convs, iterations) / exact
        assert excess.min() >= 1 - 1e-12
        assert excess.max() <= 4 ** (1 / 2 ** (iterations + 1))


def test_a_wrong_step_is_noticed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of another sign, outputs in another order, NaN: each beyond any tolerance in use."""
    problem = ConvProblem("resnet18-cifar", settings)
    value, gradient = (problem.layer_by_layer(gradient=x).error for x in (False, True))
    assert value is not None and value() <= TOLERANCE
    assert gradient is not None and gradient() <= TOLERANCE
    convolve, weight_gradient = nn.functional.conv2d, nn.grad.conv2d_weight
    monkeypatch.setattr(nn.grad, "conv2d_weight", lambda *arguments: -weight_gradient(*arguments))
    assert gradient() >= 0.1
    monkeypatch.setattr(nn.functional, "conv2d", lambda *arguments: convolve(*arguments).roll(1, -1))
    assert value() >= 0.1
    assert math.isnan(problem.step_error(problem.truth.sigma * math.nan, problem.truth.v))


# ---- cases ----


@pytest.mark.slow
@needs_native
def test_a_quick_run(tmp_path: Path) -> None:
    assert command.main(["--quick", "--threads", "1", "--only", "conv", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    cases = {case["name"]: case for case in record.read(path)["cases"]}
    both = [f"conv/{kind}/{m}/float32" for kind in ("value", "accumulate_grad", "reshape") for m in models.CONV_NETS]
    assert set(cases) == {*both, "conv/norm/resnet18-cifar/float32"}
    names = {
        "value": bench_conv.STEP_NAMES,
        "accumulate_grad": bench_conv.ACCUMULATE_NAMES,
        "reshape": bench_conv.RESHAPE_NAMES,
        "norm": bench_conv.NORM_NAMES,
    }
    for name, case in cases.items():
        rows = {row["name"] for row in case["rows"]}
        assert rows | set(case["left_out"]) == set(names[name.split("/")[1]])
        assert all("compile" in why or why == "needs CUDA" for why in case["left_out"].values())
        assert case["bytes"] > 4 * case["parameters"] or "norm" in name


def test_the_choice_of_models(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**options: Any) -> set[str]:
        return {name for name, _ in bench_conv.cases(Settings(settings.device, **options))}

    kinds = ("value", "accumulate_grad", "reshape", "norm")
    assert chosen() == {f"{kind}/resnet18-cifar/float32" for kind in kinds}
    assert chosen(models=["resnet50", "vit-s"]) == {f"{kind}/resnet50/float32" for kind in kinds[:3]}
    assert chosen(dtypes=["bfloat16"]) == set()
    monkeypatch.setattr(Settings, "on_cuda", True)
    assert chosen() == {f"{kind}/{m}/float32" for kind in kinds[:3] for m in models.CONV_NETS} | {
        "norm/resnet18-cifar/float32"
    }


@needs_native
@pytest.mark.parametrize("build", [bench_conv.value, bench_conv.accumulate])
def test_graphs_agree_and_keep_their_state_in_place(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    """See Traced: ours in plain torch, since a call of compiled code leaves no trace."""
    monkeypatch.setenv("SPECTRAL_OPS_BACKEND", "reference")
    monkeypatch.setattr(Settings, "on_cuda", True)
    monkeypatch.setattr(conv_problem, "Captured", Traced)
    case = build("resnet18-cifar", "float32", settings)
    graphs = [name for name in case.contenders if name.endswith(", graph")]
    assert len(graphs) == 2 and FLOOR in case.contenders and not case.left_out
    for name in graphs:
        for _ in range(2):  # captured by the first, replayed from another state by the second
            error = check(case, name)
            assert error is not None and error <= TOLERANCE
            case.contenders[name].run()
        assert case.contenders[name].note.endswith("its graph holds 0 bytes between calls")
