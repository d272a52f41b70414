"""`spectral-ops scale`: a rung measured, the others predicted, tables and a picture; bad options are errors."""

# ruff: noqa: F811  (fixtures of bench_fixtures, by their names)
from __future__ import annotations

import mmap
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bench_fixtures import WITHOUT_FLOOR, _one_thread, needs_native, settings  # noqa: F401  fixtures, and bench/'s place
from torch import nn

from bench import bench_scale, ladder, models, record, scale_plot, scale_table
from bench import scale as command
from bench.bench_scale import CASES, MEASURED, Rung, needed_bytes, resident_peak, too_large
from bench.case import Settings, check
from bench.cost_model import CPU_PASS_S, GRADIENT, H200_MEMORY, OPS, OURS, TORCH, VALUE, Memory
from bench.device import Device
from bench.transformer import Block
from bench.vit_shapes import VITS
from spectral_ops import cli

OPTIONS = ["--quick", "--threads", "1", "--models", "vit-s", "vit-22b", "--ranks", "16", "1", "1024"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick run leaves. Of the largest model a narrow block is still large: its shape is replaced."""
    if WITHOUT_FLOOR:
        pytest.skip("the floor of a CPU is csrc's, and it is not built")
    folder = tmp_path_factory.mktemp("scale")
    with pytest.MonkeyPatch.context() as patch:
        for module in (bench_scale, models):
            patch.setattr(module, "VITS", dict.fromkeys(VITS, VITS["vit-ti"]))
        assert cli.main(["scale", "--device", "cpu", *OPTIONS, "--out", str(folder)]) == 0
    (path,) = folder.glob("*-quick-scale.json")
    return path


# ---- the command ----


def test_tables_and_picture_are_written(stored: Path) -> None:
    assert stored.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    results = record.read(stored)
    names = {f"scale/{op}/{model}/float32" for op in MEASURED for model in ("vit-s", "vit-22b")}
    assert {case["name"] for case in results["cases"]} == names
    text = stored.with_suffix(".md").read_text()
    assert "| model |  | what | time | GB/s | x floor | held | peak beyond | predicted | error | own rate |" in text
    assert "PREDICTED, none of it measured" in text and "QUICK RUN" in text
    for section in ("Measured here", "One H200", "Penalty with gradient, by ranks", "Share of a training step"):
        assert f"## {section}" in text
    for model in ("vit-s", "vit-22b"):
        assert text.count(f"| {model} | float32 |") >= 4 + 1 + 4


def test_every_measured_point_has_its_prediction_and_error(stored: Path) -> None:
    found = record.read(stored)["ladder"]
    assert [(p["model"], p["op"]) for p in found["here"]] == [(m, op) for m in ("vit-s", "vit-22b") for op in OPS]
    assert found["stored"] and {p["op"] for p in found["here"]} == set(OPS)
    for point in (*found["here"], *found["stored"]):
        assert point["predicted_s"] > 0
        assert point["predicted_error"] == pytest.approx(point["predicted_s"] / point["seconds"] - 1)
        cells = dict(zip(scale_table.POINT_HEAD, scale_table.point_cells(point), strict=True))
        assert cells["error"].endswith(" %") and cells["error"][0] in "+-"
        assert (cells["own rate"] == "-") is (point["floor_s"] is None)
    assert "float32" in found["memory_from"]


def test_every_rank_is_predicted(stored: Path) -> None:
    found = record.read(stored)["ladder"]
    assert found["ranks"] == [1, 16, 1024]  # in order, whatever was given
    places = [(p["dtype"], p["model"], p["ranks"]) for p in found["predictions"]]
    assert places == [(d, m, r) for d in ("float32", "bfloat16") for m in found["models"] for r in (1, 16, 1024)]
    for point in found["predictions"]:
        assert (point["all_reduce_s"] == 0) is (point["ranks"] == 1)
        assert point["share"] == pytest.approx(point["seconds"][GRADIENT] / point["step_s"])
        assert set(point["seconds"]) == set(OPS)


def test_drawn_anew_from_the_file(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(stored.read_bytes())
    assert command.main(["--from", str(copy), "--models", "vit-b", "--ranks", "1"]) == 0
    found = record.read(copy)["ladder"]
    assert (found["models"], found["ranks"]) == (["vit-b"], [1])
    assert len(found["here"]) == 2 * len(OPS)  # what was measured stays
    assert str(copy.with_suffix(".png")) in capsys.readouterr().out


def test_drawn_anew_elsewhere(stored: Path, tmp_path: Path) -> None:
    """The file that it is from may be one that was committed."""
    before = stored.read_bytes()
    chosen = ["--models", "vit-b", "--ranks", "1", "--out", str(tmp_path / "new")]
    assert command.main(["--from", str(stored), *chosen]) == 0
    assert stored.read_bytes() == before
    assert record.read(tmp_path / "new" / stored.name)["ladder"]["models"] == ["vit-b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "vit-x"], "scale: expected models to be of vit-s, .*, vit-22b, got 'vit-x'. Name one of these."),
        (["--dtypes", "float8"], "scale: expected dtypes to be of float32, bfloat16, got 'float8'. Name one of these."),
        (["--ranks", "0"], "expected ranks to be at least 1, got 0. Use 1 for a single device."),
        (["--ranks", "1", "12"], "expected ranks to be at most 8 or a multiple of it, got 12. Use whole nodes"),
        (["--images", "0"], "scale: expected images to be at least 1, got 0. Give those of one rank."),
        (["--device", "cuda"], "Device: expected a CUDA device, got none that torch can use. Use --device cpu."),
        (["--threads", "0"], "Device: expected threads to be at least 1, got 0. Leave --threads out for 2."),
        (["--from", "/no.json"], "scale: expected --from to be a results file, got /no.json. Measure one first."),
    ],
)
def test_bad_options_are_refused(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command.main([*options, "--quick", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told


def test_dtypes_are_called_as_those_of_bench(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["scale", "--dtypes", "float8", "--quick"])
    assert stopped.value.code == 2 and "expected dtypes to be of float32, bfloat16" in capsys.readouterr().err


def test_outside_a_checkout_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spectral_ops.__file__", str(tmp_path / "spectral_ops" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["scale"]) == 1
    assert "spectral-ops scale: expected a checkout of spectral_ops" in capsys.readouterr().err


def test_a_failing_case_leaves_the_others(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(rung: Rung) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setitem(CASES, VALUE, broken)
    monkeypatch.setitem(CASES, OURS, broken)
    if WITHOUT_FLOOR:
        monkeypatch.setitem(CASES, GRADIENT, broken)
    cases, left_out, failed = command.climb(["vit-s", "vit-b"], settings, chosen=False)
    assert failed[f"scale/{VALUE}/vit-s/float32"] == "RuntimeError: no memory"
    assert [case["name"] for case in cases] == ([] if WITHOUT_FLOOR else [f"scale/{GRADIENT}/vit-s/float32"])
    assert "--models names it" in left_out["scale/vit-b/float32"]


# ---- a rung ----


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_agrees_part_by_part(settings: Settings, dtype: str) -> None:
    rung = Rung("vit-s", dtype, settings)
    assert len(rung.parts([*rung.weights])) == 6 and len(rung.weights) == 4
    for op in MEASURED:
        case = CASES[op](rung)
        for name, contender in case.contenders.items():
            error = check(case, name)
            assert error is None or error <= contender.tolerance
    assert all(g.count_nonzero() == 0 for g in rung.gradients)


def test_a_wrong_gradient_is_noticed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_OPS_BACKEND", "reference")
    rung = Rung("vit-s", "float32", settings)
    assert rung.gradient_error() <= bench_scale.TOLERANCE and rung.value_error() <= bench_scale.TOLERANCE
    # The value is right, no gradient is added.
    monkeypatch.setattr(rung.reg, "accumulate_grad_", partial(rung.reg, advance=False))
    assert rung.gradient_error() >= 0.1


@needs_native
def test_torch_steps_leave_the_weights_and_ours_unread(settings: Settings) -> None:
    """AdamW works on the same memory, and SpectralAdamW neither sees a change nor reads all weights again."""
    rung = Rung("vit-s", "float32", settings)
    case = bench_scale.optimizer_case(rung)
    for g in rung.gradients:
        g.fill_(1.0)
    before, versions = [w.detach().clone() for w in rung.weights], [w._version for w in rung.weights]
    case.contenders[bench_scale.FUSED].run()
    assert all(torch.equal(w, x) for w, x in zip(rung.weights, before, strict=True))
    assert [w._version for w in rung.weights] == versions
    case.contenders[bench_scale.FOLDED].run()
    assert not any(torch.equal(w, x) for w, x in zip(rung.weights, before, strict=True))


def test_timm_where_it_is_installed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create_model(name: str, num_classes: int) -> nn.Module:
        asked.append((name, num_classes))
        return nn.ModuleDict({"blocks": nn.ModuleList([Block(12, 24, 2)])})

    fake = ModuleType("timm")
    fake.create_model = lambda name, num_classes: SimpleNamespace(blocks=create_model(name, num_classes)["blocks"])
    monkeypatch.setitem(sys.modules, "timm", fake)
    blocks, source = bench_scale.blocks_of(VITS["vit-b"], "cpu", torch.bfloat16)
    assert asked == [("vit_base_patch16_224", 0)] and source == "timm's vit_base_patch16_224"
    assert {p.dtype for p in blocks.parameters()} == {torch.bfloat16}
    monkeypatch.setitem(sys.modules, "timm", None)
    small = Rung("vit-s", "float32", settings)
    assert small.source.startswith("shapes of Touvron") and asked == [("vit_base_patch16_224", 0)]
    again = Rung("vit-s", "float32", settings)
    assert all(torch.equal(a, b) for a, b in zip(small.weights, again.weights, strict=True))


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    count = VITS["vit-22b"].parameters
    assert needed_bytes(GRADIENT, count, "bfloat16", built=False) == 4 * count
    assert needed_bytes(GRADIENT, count, "bfloat16", built=True) == 0
    assert needed_bytes(OURS, count, "float32", built=False) == (8 + 2 * 4 + 2 * 4) * count
    assert needed_bytes(OURS, count, "bfloat16", built=True) == (2 * 4 + 2 * 2) * count
    full = Settings(Device("cpu", 1))
    monkeypatch.setattr(bench_scale, "free_bytes", lambda kind: int(140e9))
    assert too_large(GRADIENT, "vit-22b", "bfloat16", full, built=False) == ""
    assert too_large(OURS, "vit-22b", "bfloat16", full, built=True) == "takes 261 GB of memory, 140 GB are free"
    assert too_large(OURS, "vit-22b", "bfloat16", Settings(Device("cpu", 1), quick=True), built=True) == ""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no such account")
def test_memory_of_a_call() -> None:
    size = 64 << 20

    def run() -> None:
        with mmap.mmap(-1, size) as fresh:  # an allocator might give what it holds already
            for at in range(0, size, mmap.PAGESIZE):
                fresh[at] = 1

    found = resident_peak(run)
    assert found is not None and 0.9 * size <= found <= 2 * size


# ---- points ----


def test_the_newest_graph_of_each_is_taken() -> None:
    found = {(p["model"], p["dtype"], p["op"]): p for p in ladder.stored_points()}
    steps = "nvidia-h200-2026-11-28-steps"
    assert found["vit-l", "float32", GRADIENT]["source"] == steps
    assert found["vit-l", "float32", GRADIENT]["seconds"] == pytest.approx(984.2e-6, rel=1e-3)  # not 1441, a plain call
    assert found["vit-l", "bfloat16", TORCH]["seconds"] == pytest.approx(1589.5e-6, rel=1e-3)
    assert found["vit-l", "bfloat16", TORCH]["bytes"] == 14 * VITS["vit-l"].parameters  # torch's own
    assert found["vit-g", "float32", GRADIENT]["date"] == "2026-11-27"
    assert found["vit-s", "float32", GRADIENT]["source"] == ladder.NOTED_SOURCE
    assert found["vit-s", "float32", GRADIENT]["to_floor"] is None


def test_predictions_meet_the_h200() -> None:
    """Rates are those of plain passes: too low, by up to a third for torch's AdamW in bfloat16, by a fifth for ours."""
    for point in ladder.stored_points():
        found = ladder.with_prediction(point, H200_MEMORY, "cuda")
        assert -0.35 <= found["predicted_error"] <= 0.02
        if point["op"] != TORCH:
            assert found["predicted_error"] >= -0.2


def test_a_slow_machine_is_no_error_of_the_model() -> None:
    """Half as fast in the rounds of this point as where the rates are from: wrong by half, with its own rate right."""
    size = 28 * 1000
    point = {"op": OURS, "dtype": "float32", "parameters": 1000, "floor_bytes": size, "floor_s": 2.0, "seconds": 2.0}
    memory = Memory({OURS: float(size)}, 0.0, CPU_PASS_S)
    found = ladder.with_prediction(point, memory, "cpu")
    assert found["predicted_error"] == pytest.approx(-0.5, abs=1e-4)
    assert found["own_predicted_error"] == pytest.approx(0.0, abs=1e-4)
    torchs = ladder.with_prediction(point | {"op": TORCH, "dtype": "bfloat16"}, memory, "cpu")
    assert torchs["own_predicted_error"] == pytest.approx(-0.5, abs=1e-4)  # 14 bytes, where the floor moved 28
    unknown = ladder.with_prediction(point | {"floor_s": 1e-6}, None, "cuda")  # shorter than a measurement
    assert unknown["predicted_s"] is unknown["own_predicted_s"] is unknown["predicted_error"] is None


def test_the_largest_model_gives_the_rates() -> None:
    points = [
        {"model": model, "dtype": dtype, "op": op, "parameters": size, "floor_bytes": size, "floor_s": 1.0}
        for model, size in (("vit-s", 10), ("vit-b", 20))
        for dtype in ("bfloat16", "float32")
        for op in (VALUE, GRADIENT, OURS)
    ]
    memory, told = ladder.memory_of(points, "cpu")
    assert memory is not None and memory.rates == dict.fromkeys((VALUE, GRADIENT, OURS), 20.0)
    assert told == "the floors of vit-b, float32"
    assert ladder.memory_of(points[:2], "cpu") == (None, "")


def test_the_picture_holds_every_point(stored: Path) -> None:
    found = record.read(stored)["ladder"]
    axes = scale_plot.Figure().subplots()
    scale_plot.over_models(axes, found, "float32", "some CPU")
    drawn = {(x, y) for line in axes.get_lines() for x, y in zip(*line.get_data(), strict=True)}
    for point in (*found["here"], *found["stored"]):
        assert ((point["parameters"], point["seconds"]) in drawn) is (point["dtype"] == "float32")
    for point in found["here"]:
        assert (point["parameters"], point["predicted_s"]) in drawn
    for what in ("time", "share"):
        axes = scale_plot.Figure().subplots()
        scale_plot.over_ranks(axes, found, "float32", what)
        labels = [line.get_label() for line in axes.get_lines()]
        assert labels[:2] == ["vit-s", "vit-22b"] and ("of it the all-reduce, vit-22b" in labels) is (what == "time")
        assert [*axes.get_lines()[0].get_xdata()] == [1, 16, 1024]
    shown = [scale_plot.per_cent(x) for x in (1.0, 0.1, 0.01, 0.001, 0.0001)]
    assert shown == ["100 %", "10 %", "1 %", "0.1 %", "0.01 %"]
