"""bench/: the statistics on made-up clocks, bytes, the results file, baselines, comparison and picture."""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # last: an installed spectral_ops goes first
    sys.path.append(str(ROOT))

from bench import __main__ as command  # noqa: E402
from bench import baselines, compare, models, plot, record, table, truth  # noqa: E402
from bench.case import FLOOR, Case, Contender, Settings, check, measure  # noqa: E402
from bench.device import Device, counted_bytes, cut, time_calls  # noqa: E402
from bench.problem import TOLERANCE, Problem  # noqa: E402
from bench.timing import calls_per_sample, interleaved, summarise  # noqa: E402
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
    assert torch.allclose(step.dw[0], w.grad, rtol=1e-10)
    assert torch.allclose(step.db[0], b.grad, rtol=1e-10)
    one, nan = torch.ones(2), torch.full((2,), math.nan)
    assert math.isnan(truth.largest_error([one, nan, one], [one, one, one]))
    assert truth.largest_singular_values([w]).item() == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=1e-12)


PENALTIES: dict[str, Callable[[Problem], Contender]] = {
    "usual": Problem.usual,
    # Traced only: code generation takes half a minute, and bench/ runs it.
    "usual, compiled": lambda problem: problem.usual(baselines.compiled(baselines.usual_penalty, "eager")),
    "parametrization": Problem.parametrization,
}


@pytest.fixture
def settings() -> Settings:
    return Settings(Device("cpu", 1), quick=True)


@pytest.mark.parametrize("name", baselines.PENALTIES)
def test_penalty_baselines_agree(settings: Settings, name: str) -> None:
    problem = Problem("mlp-shrunk", settings)
    contender = PENALTIES[name](problem)
    contender.run()  # the check starts anew wherever the timing left off
    assert contender.error is not None and contender.error() <= TOLERANCE


def test_a_wrong_baseline_is_noticed(settings: Settings) -> None:
    def doubled(*arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        value, v = baselines.usual_penalty(*arguments)
        return 2 * value, v

    error = Problem("mlp-shrunk", settings).usual(doubled).error
    assert error is not None and error() >= 0.5


@pytest.mark.parametrize("name", baselines.NORMS)
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
    assert {case["name"] for case in results["cases"]} == {f"power_iteration/{m}" for m in ("vit-s", "mlp", "resnet18")}
    case = results["cases"][1]
    rows = {row["name"]: row for row in case["rows"]}
    assert case["bytes"] == 4 * (784 * 256 + 256 * 256 + 256 * 10)
    assert rows[FLOOR]["to_floor"]["median"] == rows[case["base"]]["to_base"]["median"] == 1.0
    assert rows["usual"]["gb_per_s"] == pytest.approx(case["bytes"] / rows["usual"]["seconds"]["median"] / 1e9)
    assert results["device"]["threads"] == 1


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
        (("version",), 2, "to be a spectral_ops benchmark file of version 1"),
        (("commit",), ..., r"to hold commit \(str or NoneType\), got nothing"),
        (("device", "threads"), "2", r"device to hold threads \(int\), got '2'"),
        (("cases", 0, "rows", 0, "note"), ..., "to hold note"),
        (("cases", 0, "rows", 0, "seconds", "median"), math.nan, r"seconds to hold median \(float\), got nan"),
        (("cases", 0, "rows", 0, "error"), True, "to hold error"),
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
    assert "only in the first: power_iteration/resnet18" in shown


def test_picture_from_the_file_alone(stored: Path, tmp_path: Path) -> None:
    """Every contender's name and the floor's line are in each panel."""
    picture = tmp_path / "picture.png"
    assert command.main(["plot", str(stored), str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = record.read(stored)
    axes = plot.Figure().subplots()
    plot.panel(axes, results["cases"][0], 4)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["power_iteration", "usual"]
    assert axes.get_xscale() == "log"
    floor = next(row for row in results["cases"][0]["rows"] if row["name"] == FLOOR)
    assert axes.get_lines()[-1].get_xdata()[0] == floor["seconds"]["median"]
