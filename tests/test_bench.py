"""bench/: the statistics on made-up clocks, bytes, the results file, baselines, comparison and picture."""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.fx.experimental.proxy_tensor import make_fx

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # last: an installed spectral_ops goes first
    sys.path.append(str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import (  # noqa: E402
    baselines,
    bench_accumulate_grad,
    bench_power_iteration,
    bench_spectral_penalty,
    bench_training_step,
    compare,
    models,
    plot,
    record,
    roofline,
    table,
    truth,
)
from bench import case as case_module  # noqa: E402
from bench.case import DISAGREES, DTYPES, FLOOR, Case, Contender, Settings, check, measure  # noqa: E402
from bench.device import Device, count_launches, counted_bytes, cut, time_calls  # noqa: E402
from bench.graph import WARMUP  # noqa: E402
from bench.problem import BFLOAT16_USUAL, TOLERANCE, Problem  # noqa: E402
from bench.timing import calls_per_sample, interleaved, summarise  # noqa: E402
from bench.transformer import VisionTransformer  # noqa: E402
from spectral_ops import backends  # noqa: E402

WITHOUT_FLOOR = backends.available()["native"] is not None
needs_native = pytest.mark.skipif(WITHOUT_FLOOR, reason="the floor of a CPU is csrc's, and it is not built")


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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two wait for each other on a busy machine; tests/conftest.py sets the number back."""
    torch.set_num_threads(1)


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


@pytest.fixture
def settings() -> Settings:
    return Settings(Device("cpu", 1), quick=True)


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


# ---- cases ----


@needs_native
def test_a_disagreeing_contender_is_not_timed(settings: Settings) -> None:
    w = torch.ones(4, 4)
    wrong = {"off": Contender(lambda: None, lambda: math.nan, 1e-5), "rough": Contender(lambda: None, lambda: 1.0, 0.1)}
    case = Case("op/model", "", settings.device, [w], [], wrong)
    with pytest.raises(AssertionError, match="op/model, off: expected an error of at most 1e-05 .* got nan"):
        measure(case, settings)
    case.contenders["rough"].approximate = True
    assert check(case, "rough") == 1.0
    assert check(case, FLOOR) is None


class Fails(Contender):
    def __init__(self, message: str, **how: bool):
        def error() -> float:
            raise RuntimeError(message)

        super().__init__(lambda: None, error, **how)


@needs_native
def test_what_a_device_refuses_is_left_out_and_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.ones(4, 4)
    good = Contender(lambda: None, lambda: 0.0)
    contenders = {
        "good": good,
        "refused": Fails("no capture\nand more", optional=True),
        "wrong": Contender(lambda: None, lambda: math.nan, 0.1, optional=True),
        "late": Contender(lambda: None, lambda: 0.0, compiles=True),
    }
    late = Settings(settings.device, quick=True, deadline=time.perf_counter() + 1)
    measured = measure(Case("op/model", "", settings.device, [w], [], contenders, left_out={"x": "needs CUDA"}), late)
    assert [row["name"] for row in measured["rows"]] == ["good", FLOOR]
    assert measured["left_out"] == {
        "x": "needs CUDA",
        "wrong": measured["left_out"]["wrong"],
        "refused": "not possible here: RuntimeError: no capture",
        "late": "the minutes of this run were nearly over",
    }
    assert measured["left_out"]["wrong"].startswith(f"{DISAGREES}: op/model, wrong: expected an error of at most 0.1")
    with pytest.raises(RuntimeError, match="no capture"):
        measure(Case("op/model", "", settings.device, [w], [], {"ours": Fails("no capture")}), settings)
    monkeypatch.setattr(Settings, "on_cuda", True)
    monkeypatch.setattr(case_module, "LONGEST_CALL_S", 0.0)
    slow = {"good": good, "slow": Contender(lambda: None, lambda: 0.0, optional=True)}
    measured = measure(Case("op/model", "", settings.device, [w], [], slow), settings)
    assert measured["left_out"]["slow"].startswith("one call took 0.00 s")
    full = Settings(settings.device, quick=True, full=True)
    assert not measure(Case("op/model", "", settings.device, [w], [], slow), full)["left_out"]


def test_launches_are_what_ran_on_the_device() -> None:
    kernel, region = (SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=x) for x in (False, True))
    on_host = SimpleNamespace(device_type=DeviceType.CPU, is_user_annotation=False)
    assert count_launches([kernel, on_host, region, kernel]) == 2
    device = Device("cpu", 1)
    assert device.launches(lambda: None) is device.host_seconds(lambda: None) is device.peak_bytes(lambda: None) is None


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results file of a quick run of one op."""
    if WITHOUT_FLOOR:
        pytest.skip("the floor of a CPU is csrc's, and it is not built")
    folder = tmp_path_factory.mktemp("results")
    assert command.main(["--quick", "--threads", "1", "--only", "power_iteration", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    return path


def test_results_file(stored: Path) -> None:
    results = record.read(stored)
    assert stored.name.startswith(results["device"]["slug"]) and stored.stem.endswith("-quick")
    assert {case["name"] for case in results["cases"]} == {
        f"power_iteration/{m}/float32" for m in ("vit-s", "mlp", "resnet18")
    }
    case = results["cases"][1]
    rows = {row["name"]: row for row in case["rows"]}
    assert case["bytes"] == 4 * (784 * 256 + 256 * 256 + 256 * 10)
    assert rows[FLOOR]["to_floor"]["median"] == rows[case["base"]]["to_base"]["median"] == 1.0
    assert rows["usual"]["gb_per_s"] == pytest.approx(case["bytes"] / rows["usual"]["seconds"]["median"] / 1e9)
    assert results["device"]["threads"] == 1
    assert (case["dtype"], rows["usual"]["launches"], rows["usual"]["host_seconds"]) == ("float32", None, None)
    assert case["left_out"]["usual, graph"] == "needs CUDA"


def test_files_of_version_1_are_read(stored: Path, tmp_path: Path) -> None:
    old = record.read(stored)
    old["version"] = 1
    del old["left_out"]
    for case in old["cases"]:
        case["name"] = case["name"].removesuffix("/float32")
        del case["dtype"], case["left_out"]
        for row in case["rows"]:
            del row["launches"], row["host_seconds"]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old))
    assert record.read(file)["cases"][0]["name"] == record.read(stored)["cases"][0]["name"]
    for path in sorted((ROOT / "bench" / "results").glob("*.json")):
        record.read(path)


def change(results: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one entry replaced, or left out where the value is ..."""
    results = copy.deepcopy(results)
    *outer, last = path
    at = functools.reduce(operator.getitem, outer, results)
    at[last] = value
    if value is ...:
        del at[last]
    return results


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 3, "to be a spectral_ops benchmark file of version 2"),
        (("commit",), ..., r"to hold commit \(str or NoneType\), got nothing"),
        (("device", "threads"), "2", r"device to hold threads \(int\), got '2'"),
        (("cases", 0, "rows", 0, "note"), ..., "to hold note"),
        (("cases", 0, "rows", 0, "seconds", "median"), math.nan, r"seconds to hold median \(float\), got nan"),
        (("cases", 0, "rows", 0, "error"), True, "to hold error"),
        (("cases", 0, "rows", 0, "launches"), 1.5, r"to hold launches \(int or NoneType\), got 1.5"),
        (("cases", 0, "rows", 0, "host_seconds"), math.inf, "to hold host_seconds"),
    ],
)
def test_results_are_checked(stored: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record.check(change(record.read(stored), path, value), "here")


def test_other_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match="pytest-benchmark's own JSON is another format"):
        record.read(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="read: expected .* to be JSON"):
        record.read(file)
    assert record.describe_commit(tmp_path) == (None, None)  # outside git


# ---- text, comparison, picture ----


def test_tables_show_every_row(stored: Path) -> None:
    assert [table.duration(x) for x in (2.5, 0.0123, 1.234e-4, 5e-9)] == ["2.50 s", "12.3 ms", "123 us", "0.005 us"]
    results = record.read(stored)
    for text in (table.as_text(results), table.as_markdown(results)):
        assert "QUICK RUN" in text
        for name in ("power_iteration", "usual", FLOOR):
            assert text.count(name) >= len(results["cases"])
    for load, busy in ((3.0, True), (0.1, False)):
        assert ("BUSY MACHINE" in table.as_text(change(results, ("load", "before"), load))) is busy


def with_launches(results: Any) -> Any:
    """As a CUDA run has it: the first row of the first case made one launch; the others' are not known."""
    made = change(results, ("cases", 0, "rows", 0, "launches"), 1)
    made = change(made, ("cases", 0, "rows", 0, "host_seconds"), 1.5e-5)
    return change(made, ("cases", 0, "rows", 0, "peak_bytes"), 2048)


def test_columns_of_a_cuda_run(stored: Path) -> None:
    results = record.read(stored)
    record.check(with_launches(results), "here")
    columns = ("launches", "host", "peak memory")
    assert not set(columns) & set(table.head(results["cases"][0]))
    case = with_launches(results)["cases"][0]
    assert tuple(table.head(case)[-3:]) == columns
    assert table.cells(case, case["rows"][0])[-3:] == ["1", "15.0 us", "2.0 kB"]
    assert table.cells(case, case["rows"][1])[-3:] == ["-", "-", "-"]
    shown = compare.as_text(results, with_launches(results)).splitlines()
    head = next(line for line in shown if "by the floor" in line)
    assert head.split("by the floor")[1].split() == ["A", "launches", "B", "launches", "A", "host", "B", "host"] + [
        "A", "peak", "B", "peak",
    ]
    assert "launches" not in compare.as_text(results, results)


def test_what_was_not_measured_is_said(stored: Path) -> None:
    results = change(record.read(stored), ("left_out",), {"op/vit-g": "no minutes"})
    results = change(results, ("cases", 0, "left_out"), {"usual, graph": "needs CUDA", "usual, compiled": "too slow"})
    for text in (table.as_text(results), table.as_markdown(results)):
        assert "NOT MEASURED op/vit-g: no minutes" in text
        assert "Left out: usual, compiled: too slow." in text
        assert "usual, graph" not in text


def test_the_share_of_a_training_step(stored: Path) -> None:
    case = record.read(stored)["cases"][0]
    assert table.shares(case) == []
    case["name"] = "training_step/vit-b/float32"
    row = case["rows"][1]
    row["to_base"] |= {"median": 1.031, "q25": 1.02, "q75": 1.05}
    assert table.shares(case)[0] == (
        f"{row['name']} adds 3.10 % to the step (quartiles 2.00 and 5.00 %)."
    )
    row["to_base"]["q25"] = 0.99
    assert "(quartiles -1.00 and 5.00 %, not told apart from none)" in table.shares(case)[0]
    row["name"], row["to_base"]["median"] = table.ALONE, 0.0123
    assert table.shares(case)[0] == "accumulate_grad_ alone, by itself, takes 1.23 % of the time of the step without."


def slower(results: Any, factor: float) -> Any:
    """The same results with the first row's times and ratios multiplied, without any spread."""
    results = copy.deepcopy(results)
    row = results["cases"][0]["rows"][0]
    for key in ("seconds", "to_floor"):
        row[key] = dict.fromkeys(row[key], factor * row[key]["median"])
    return results


def test_compare(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = slower(record.read(stored), 1.0)
    spread = {"median": 1.0, "q25": 0.9, "q75": 1.3}
    assert not compare.beyond_noise(spread, {"median": 1.2, "q25": 1.1, "q75": 1.4})  # the quartiles overlap
    assert compare.beyond_noise(spread, {"median": 1.5, "q25": 1.4, "q75": 1.6})
    verdicts = {factor: compare.differences(a, slower(a, factor))[0]["verdict"] for factor in (1.0, 1.04, 1.5, 0.5)}
    assert verdicts == {1.0: "same", 1.04: "same", 1.5: "slower", 0.5: "faster"}
    b = change(change(slower(a, 1.5), ("device", "threads"), 2), ("cases", 2), ...)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, results in zip(paths, (a, b), strict=True):
        record.write(results, path)
    assert command.main(["compare", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "slower" in shown and "1.50" in shown
    assert "device threads differs: 1 and 2" in shown
    assert "only in the first: power_iteration/resnet18/float32" in shown


def test_picture_from_the_file_alone(stored: Path, tmp_path: Path) -> None:
    """Every contender's name and the floor's line are in each panel."""
    picture = tmp_path / "picture.png"
    assert command.main(["plot", str(stored), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = record.read(stored)
    axes = plot.Figure().subplots()
    plot.panel(axes, results["cases"][0], 4)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["power_iteration", "usual", "usual, stacked"]
    assert axes.get_xscale() == "log"
    floor = next(row for row in results["cases"][0]["rows"] if row["name"] == FLOOR)
    assert axes.get_lines()[-1].get_xdata()[0] == floor["seconds"]["median"]


def test_roofline_from_the_file_alone(stored: Path, tmp_path: Path) -> None:
    """Every contender is a line of its own over all models; the floor, the copy's rate and the models are named."""
    picture = tmp_path / "roofline.png"
    assert command.main(["roofline", str(stored), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = record.read(stored)
    (cases,) = roofline.grouped(results).values()
    assert [case["bytes"] for case in cases] == sorted(case["bytes"] for case in results["cases"])
    styles = roofline.styles_of(cases)
    axes = plot.Figure().subplots()
    roofline.panel(axes, cases, styles, 40.0)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {"power_iteration", "usual", "usual, stacked", FLOOR} <= set(lines)
    x, y = lines["usual"].get_data()
    rows = [row for case in cases for row in case["rows"] if row["name"] == "usual"]
    assert [*x] == [case["bytes"] for case in cases] and [*y] == [row["gb_per_s"] for row in rows]
    assert any([*line.get_ydata()] == [40.0, 40.0] for line in axes.get_lines())
    named = ", ".join(text.get_text().strip() for text in axes.texts)
    assert sorted(named.split(", ")) == ["mlp", "resnet18", "vit-s"]
    other = change(results, ("cases",), [case | {"name": "spectral_norm/vit-s-init/float32"} for case in cases])
    with pytest.raises(ValueError, match="draw: expected results of accumulate_grad, .* got cases of other ops alone"):
        roofline.draw(other, picture)


def test_roofline_tells_every_contender_apart() -> None:
    """Ours thick, graphs dashed; no two contenders of a panel look alike."""
    names = ["reg()", "reg(), graph", *baselines.PENALTIES]
    rows = [{"name": name} for name in ("accumulate_grad_", "accumulate_grad_, graph", *names, FLOOR)]
    loss = {"base": "reg()", "rows": [{"name": "reg()"}]}
    styles = roofline.styles_of([{"base": "accumulate_grad_", "rows": rows}, loss])
    assert set(styles) == {row["name"] for row in rows} - {FLOOR}
    looks = {(s["color"], s["marker"], s.get("linestyle"), s["linewidth"]) for s in styles.values()}
    assert len(looks) == len(styles)
    assert {name for name, s in styles.items() if s.get("linestyle") == "--"} == {n for n in styles if ", graph" in n}
    assert {name for name, s in styles.items() if s["linewidth"] > 2} == {
        "accumulate_grad_", "accumulate_grad_, graph", "reg()", "reg(), graph",
    }


def test_roofline_keeps_names_apart() -> None:
    """Models next to each other share a line of text instead of writing over each other."""
    axes = plot.Figure().subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1e6, 1e9)
    axes.set_ylim(1, 10)
    roofline.name_models(axes, [(2e6, "a"), (2.1e6, "b"), (1e8, "c")])
    assert [text.get_text().strip() for text in axes.texts] == ["a, b", "c"]


# ---- commands ----


@needs_native
def test_a_wrong_baseline_is_left_out_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.problem.TOLERANCE", 0.0)  # of the usual code; ours keeps its own
    monkeypatch.setattr("bench.problem.VARIANTS", {"usual, stacked": baselines.Variant(stacked=True)})
    options = ["--quick", "--threads", "1", "--only", "power_iteration", "--models", "mlp", "--out", str(tmp_path)]
    assert command.main(options) == 1
    (path,) = tmp_path.glob("*.json")
    (case,) = record.read(path)["cases"]
    assert case["left_out"]["usual, stacked"].startswith(DISAGREES)
    assert [row["name"] for row in case["rows"]] == ["power_iteration", FLOOR]


def test_a_failing_case_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cases(settings: Settings) -> Any:
        def broken() -> Case:
            raise RuntimeError("no memory")

        yield "broken", broken
        yield "late", broken

    monkeypatch.setattr(bench_power_iteration, "cases", cases)
    monkeypatch.setattr(Settings, "remaining_s", property(lambda self: next(left)))
    left = iter([1.0, 0.0])
    arguments = ["--quick", "--only", "power_iteration", "--minutes", "5", "--out", str(tmp_path), "--roofline"]
    assert command.main(arguments) == 1
    (path,) = tmp_path.glob("*.json")
    assert record.read(path)["left_out"] == {
        "power_iteration/broken": "RuntimeError: no memory",
        "power_iteration/late": "the 5 minutes of this run were over; --minutes gives more, --only chooses",
    }
    assert "no picture: draw: expected results of" in capsys.readouterr().err


def test_a_run_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "Device: expected a CUDA device, got none that torch can use. Use --device cpu." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--only", "training_step", "--models", "mlp"])
    assert "expected --only, --models and --dtypes to leave a case, got none" in capsys.readouterr().err
