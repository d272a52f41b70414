"""bench/: the statistics on made-up clocks, bytes, devices, models and baselines."""

# ruff: noqa: F811  (fixtures of bench_fixtures, by their names)
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_fixtures import WITHOUT_FLOOR, _one_thread, needs_native, settings  # noqa: F401  fixtures, and bench/'s place
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from bench import (  # noqa: E402
    baselines,
    bench_accumulate_grad,
    bench_power_iteration,
    bench_spectral_penalty,
    bench_training_step,
    models,
    table,
    truth,
)
from bench.case import DTYPES, Case, Settings, check  # noqa: E402
from bench.device import Device, counted_bytes, cut, time_calls  # noqa: E402
from bench.graph import WARMUP  # noqa: E402
from bench.problem import BFLOAT16_USUAL, TOLERANCE, Problem  # noqa: E402
from bench.timing import calls_per_sample, interleaved, summarise  # noqa: E402
from bench.transformer import VisionTransformer  # noqa: E402


class Clock:
    """A clock that moves only when told to; `work(seconds)` is a contender that takes that long."""

    def __init__(self) -> None:
        self.time, self.order = 0.0, ""
        self.now = lambda: self.time

    def work(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.order += name[0]
            self.time += seconds()

        return run

    def sample(self, run: Callable[[], Any], calls: int) -> float:
        return time_calls(run, calls, self.now)


# ---- timing ----


def test_summary_is_numpys() -> None:
    found = summarise([4.0, 1.0, 3.0, 2.0])
    assert (found.median, found.q25, found.q75, found.min, found.max) == (2.5, 1.75, 3.25, 1.0, 4.0)
    for no_times in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="summarise: expected values to be finite"):
            summarise(no_times)


def test_contenders_take_turns() -> None:
    clock = Clock()
    names = ("a", "b", "c")
    contenders = {name: clock.work(name, lambda: 1.0) for name in names}
    interleaved(contenders, clock.sample, rounds=4, warmup=1, now=clock.now)
    assert clock.order == "abc" + "abc" + "bca" + "cab" + "abc"


def test_ratios_are_of_one_round() -> None:
    """A machine ten times slower for one round leaves that round's ratio at 2."""
    clock = Clock()
    slowness = iter([1.0] * 2 + [1.0, 1.0, 10.0, 10.0, 1.0, 1.0])  # warm-up, then a b | b a | a b
    contenders = {"a": clock.work("a", lambda: next(slowness)), "b": clock.work("b", lambda: 2 * next(slowness))}
    rounds = interleaved(contenders, clock.sample, rounds=3, warmup=1, repeat=False, now=clock.now)
    assert rounds.seconds == {"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 2.0]}
    assert rounds.ratios("b", "a").median == rounds.ratios("b", "a").max == 2.0
    assert rounds.differences("b", "a").max == 10.0


def test_short_calls_are_repeated() -> None:
    clock = Clock()
    contenders = {"short": clock.work("short", lambda: 1.1e-4), "long": clock.work("long", lambda: 1.0)}
    rounds = interleaved(contenders, clock.sample, rounds=2, warmup=2, now=clock.now)
    assert rounds.calls == {"short": 5, "long": 1}
    assert rounds.seconds["short"] == pytest.approx([1.1e-4, 1.1e-4])
    assert interleaved(contenders, clock.sample, rounds=1, warmup=1, repeat=False, now=clock.now).calls["short"] == 1
    assert calls_per_sample(1e-9) == calls_per_sample(0.0) == 1000


def test_budget_ends_the_rounds_but_not_before_the_fewest() -> None:
    clock = Clock()
    contenders = {"a": clock.work("a", lambda: 1.0)}
    run = {"sample": clock.sample, "warmup": 1, "now": clock.now}
    assert interleaved(contenders, rounds=50, budget_s=10.0, fewest_rounds=2, **run).count == 10
    assert interleaved(contenders, rounds=50, budget_s=0.0, fewest_rounds=7, **run).count == 7
    assert interleaved(contenders, rounds=3, budget_s=0.0, fewest_rounds=7, **run).count == 3
    with pytest.raises(ValueError, match="interleaved: expected rounds and warmup to be at least 1"):
        interleaved({"a": lambda: None}, time_calls, rounds=0, warmup=1)


# ---- bytes and devices ----


def test_bytes() -> None:
    weights = [torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16)]
    gradients = [torch.zeros(3, 5), torch.zeros(7)]
    assert counted_bytes(weights, []) == 60 + 14
    assert counted_bytes(weights, gradients) == 74 + 2 * (60 + 28)
    a, b = torch.zeros(100), torch.zeros(33)
    chunks = cut([a], [b], 128)  # covers the memory once
    assert chunks[:, 1].sum() == 400 + 132
    assert chunks[:, 2].tolist() == [0] * 4 + [1] * 2
    assert chunks[3].tolist() == [a.data_ptr() + 384, 16, 0]


def test_device_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Device: expected kind to be cpu or cuda, got 'tpu'"):
        Device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="Device: expected a CUDA device, got none"):
        Device("cuda")


@needs_native
def test_floor_changes_nothing() -> None:
    weights, gradients = [torch.randn(1000), torch.zeros(0)], [torch.randn(999)]
    before = [x.clone() for x in (*weights, *gradients)]
    run, kind = Device("cpu", 1).floor(weights, gradients)
    run()
    assert kind == "csrc floor"
    assert all(torch.equal(x, y) for x, y in zip((*weights, *gradients), before, strict=True))


# ---- models and baselines ----


def test_shapes() -> None:
    vit = models.VITS["vit-s"]
    assert vit.matrices == [(1152, 384), (384, 384), (1536, 384), (384, 1536)]
    assert 4 * vit.depth * sum(m * n for m, n in vit.matrices) == 84_934_656
    resnet = models.build("resnet18")
    assert sum(isinstance(layer, nn.Conv2d) for layer in resnet) == 20
    assert sum(p.numel() for p in resnet.parameters()) == 11_166_912 + 512_000  # torchvision's, convolutions and fc


def test_models_are_the_same_at_every_call() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    a, b = models.build("mlp").parameters(), models.build("mlp").parameters()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="build: expected name to be one of vit-ti"):
        models.build("alexnet")


def test_truth_is_autograds() -> None:
    """The written-out gradient against autograd in float64 at fixed u, and sigma_1 against the SVD."""
    torch.manual_seed(0)
    w, b, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4), (6,), (4,)))
    w.requires_grad_(), b.requires_grad_()
    step = truth.warm_step([w], [b], [v], exponent=3.0, target=0.5)
    value = ((w.T @ step.u[0]).norm() ** 3 - 0.5**3) ** 2 + b.norm() ** 6
    value.backward()
    assert step.value.item() == pytest.approx(value.item(), rel=1e-12)
    assert torch.allclose(next(step.dw), w.grad, rtol=1e-10)
    assert torch.allclose(step.db[0], b.grad, rtol=1e-10)
    one, nan = torch.ones(2), torch.full((2,), math.nan)
    assert math.isnan(truth.largest_error([one, nan, one], [one, one, one]))
    assert truth.largest_singular_values([w]).item() == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=1e-12)


def traced(variant: baselines.Variant) -> Callable[..., Any]:
    """The variant's code, compiled by Dynamo alone: code generation takes half a minute, and bench/ runs it."""
    if variant.mode is not None:
        return baselines.compiled(baselines.usual_penalty, backend="eager")
    return variant.code(baselines.usual_penalty, baselines.stacked_penalty)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in baselines.PENALTIES if not baselines.needs_cuda(name)])
def test_penalty_baselines_agree(settings: Settings, name: str, dtype: str) -> None:
    problem = Problem("mlp-shrunk", settings, dtype)
    if name == baselines.PARAMETRIZATION:
        contender = problem.parametrization()
    else:
        variant = baselines.VARIANTS[name]
        contender = problem.usual(variant, traced(variant))
    contender.run()  # the check starts anew wherever the timing left off
    assert contender.tolerance == (BFLOAT16_USUAL if dtype == "bfloat16" else TOLERANCE)
    assert contender.error is not None and contender.error() <= contender.tolerance


def test_stacked_is_by_shape_and_in_order(settings: Settings) -> None:
    """ResNet's mixed shapes: every sigma and v in its own place."""
    problem = Problem("resnet18", settings)
    with torch.no_grad():
        stacked, apart = (
            step(problem.weights, problem.v)
            for step in (baselines.stacked_power_iteration, baselines.usual_power_iteration)
        )
    assert max(len(places) for places in baselines.by_shape(problem.weights)) > 1
    assert truth.largest_error([*stacked[0], *stacked[1]], [*apart[0], *apart[1]]) <= TOLERANCE


def test_a_wrong_baseline_is_noticed(settings: Settings) -> None:
    def doubled(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        value, v = baselines.usual_penalty(*arguments)
        return 2 * value, v

    error = Problem("mlp-shrunk", settings).usual(code=doubled).error
    assert error is not None and error() >= 0.5


class Traced:
    """In place of a CUDA graph, on a CPU: the calls into torch of one run, replayed on the very tensors of that run.

    As with a graph, what Python bound anew meanwhile is not seen by a replay.
    """

    held_bytes = 0

    def __init__(self, run: Callable[[], Any]):
        self.run, self.replay = run, None

    def capture(self) -> None:
        if self.replay is None:
            for _ in range(WARMUP):
                self.run()
            self.replay = make_fx(lambda: self.run())()

    def __call__(self) -> Any:
        self.capture()
        return self.replay()


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only CUDA runs, on CPU tensors; what CUDA itself does with it is for a device to show.

    Ours in plain torch, since a call of compiled code leaves no trace.
    """
    monkeypatch.setenv("SPECTRAL_OPS_BACKEND", "reference")
    monkeypatch.setattr(Settings, "on_cuda", True)
    monkeypatch.setattr("bench.problem.Captured", Traced)
    monkeypatch.setattr(bench_accumulate_grad, "Captured", Traced)
    monkeypatch.setattr(bench_spectral_penalty, "Captured", Traced)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (bench_accumulate_grad.case, bench_accumulate_grad.NAMES),
        (bench_spectral_penalty.value, bench_spectral_penalty.VALUE_NAMES),
        (bench_power_iteration.case, bench_power_iteration.NAMES),
    ],
)
def test_graphs_agree_and_keep_their_state_in_place(
    settings: Settings, as_if_on_cuda: None, build: Callable[..., Case], names: tuple[str, ...], dtype: str
) -> None:
    case = build("mlp-shrunk", dtype, settings)
    graphs = [name for name in case.contenders if name.endswith(", graph")]
    assert set(graphs) == {name for name in names if name.endswith(", graph") and "compiled" not in name}
    assert set(case.contenders) | set(case.left_out) == set(names)
    assert "backend reference" in case.contenders[names[0]].note
    for name in graphs:
        contender = case.contenders[name]
        assert contender.optional
        for _ in range(2):  # captured by the first, replayed from another state by the second
            error = check(case, name)
            assert error is not None and error <= contender.tolerance
            contender.run()
        assert contender.note.endswith("its graph holds 0 bytes between calls")


def test_the_graphed_usual_code_writes_its_v_in_place() -> None:
    w, v = nn.Parameter(torch.randn(4, 3)), torch.ones(3)
    w.grad = torch.zeros_like(w)
    for in_place in (True, False):
        usual = baselines.UsualPenalty([w], [], [v], strength=1.0, in_place=in_place)
        (before,) = usual.v
        usual.accumulate_grad_()
        assert (usual.v[0] is before) is in_place
        assert not torch.equal(usual.v[0], v)


def test_cuda_only_contenders_are_absent_on_a_cpu(settings: Settings) -> None:
    graphs = {"usual, graph", "usual, compiled, graph", "usual, stacked, graph"}
    drivers = {"svdvals, gesvd", "svdvals, gesvdj", "svdvals, gesvda"}
    everyone = [*baselines.PENALTIES, *baselines.NORMS]
    assert {name for name in everyone if baselines.needs_cuda(name)} == graphs | drivers
    for name in graphs | drivers:
        assert settings.left_out(name, "mlp", "float32") == "needs CUDA"
    assert Settings(Device("cpu", 1)).left_out(baselines.COMPILED, "mlp", "float32") == ""
    assert "--full" in Settings(Device("cpu", 1)).left_out(baselines.AUTOTUNED, "vit-s", "float32")
    assert Settings(Device("cpu", 1), full=True).left_out(baselines.AUTOTUNED, "vit-s", "float32") == ""


def test_the_choice_of_models_and_dtypes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.grid(("a", "b"), ("c",)) == [("a", "float32"), ("b", "float32")]
    asked = Settings(settings.device, models=["vit-b", bench_training_step.CPU_MODEL], dtypes=["bfloat16"])
    assert asked.grid(("a", "b"), ("c",)) == [("vit-b", "bfloat16")]
    monkeypatch.setattr(Settings, "on_cuda", True)
    assert settings.grid(("a", "b"), ("c",)) == [("c", "float32"), ("c", "bfloat16")]
    assert {"mlp", "resnet18", "vit-ti", "vit-s", "vit-b", "vit-l", "vit-h", "vit-g"} == set(models.CUDA_MODELS)


def test_parts_and_dtypes_of_models() -> None:
    shapes = [tuple(w.shape) for w in models.build("vit-s", blocks=2, dtype=torch.bfloat16, device="meta").parameters()]
    assert shapes == models.VITS["vit-s"].matrices * 2
    model = models.build("mlp-shrunk", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_the_training_step_trains_and_adds_the_penalty(settings: Settings) -> None:
    model = VisionTransformer(models.ViT(16, 1, 32, ""), 8, 4, 5)
    assert model(torch.randn(3, 3, 8, 8)).shape == (3, 5)
    if WITHOUT_FLOOR:
        pytest.skip("the floor of a CPU is csrc's, and it is not built")
    case = bench_training_step.case(bench_training_step.CPU_MODEL, "float32", settings)
    before = [w.detach().clone() for w in case.read]
    for name in (bench_training_step.ATTACHED, table.ALONE, baselines.USUAL, baselines.STACKED):
        error = check(case, name)
        assert error is not None and error <= TOLERANCE
    assert all(torch.equal(w, x) for w, x in zip(case.read, before, strict=True))  # a check moves nothing
    case.contenders[bench_training_step.ATTACHED].run()
    assert not any(torch.equal(w, x) for w, x in zip(case.read, before, strict=True))


@pytest.mark.parametrize("name", [name for name in baselines.NORMS if not baselines.needs_cuda(name)])
def test_norm_baselines_agree(name: str) -> None:
    torch.manual_seed(0)
    model = models.build("vit-ti", quick=True)
    models.set_decaying_spectrum(model)
    weights = [w.detach() for w in models.matrices(model)]
    assert torch.linalg.svdvals(weights[0])[:3].tolist() == pytest.approx([3, 3 / 2**0.5, 3**0.5], rel=1e-5)
    norm = baselines.NORMS[name]
    true = truth.largest_singular_values(weights)
    iterations = {"svd_lowrank": [16] * len(weights), "lobpcg": [32] * len(weights)}.get(name)
    found = norm(weights) if iterations is None else norm(weights, iterations)
    assert truth.relative_error(found, true) <= 5e-6  # measured: at most 4e-7


def test_fewest_iterations() -> None:
    found = baselines.fewest_iterations(lambda ws, n: ws[0] * n[0], (1, 2, 3), torch.ones(3, 1), lambda i, s: s > i)
    assert found == [1, 2, 3]
    assert baselines.fewest_iterations(lambda ws, n: ws[0], (1, 2), torch.ones(1, 1), lambda i, s: False) == [2]
