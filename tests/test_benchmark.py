"""`spectral-ops bench`: it finds the checkout, measures and draws, or says what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from spectral_ops import backends, benchmark, cli

ROOT = Path(__file__).resolve().parents[1]
needs_native = pytest.mark.skipif(
    backends.available()["native"] is not None, reason="the floor of a CPU is csrc's, and it is not built"
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two wait for each other on a busy machine; tests/conftest.py sets the number back."""
    torch.set_num_threads(1)


@needs_native
def test_the_command_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--only", "power_iteration", "--models", "mlp", "--dtypes", "bfloat16", "--quick", "--threads", "1"]
    assert cli.main(["bench", "--device", "cpu", *options, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "power_iteration/mlp/bfloat16" in shown and "usual, stacked" in shown
    (picture,) = tmp_path.glob("*-quick-roofline.png")
    assert str(picture) in shown
    assert [case["dtype"] for case in json.loads(next(tmp_path.glob("*.json")).read_text())["cases"]] == ["bfloat16"]


def test_the_command_finds_the_checkout_or_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.find_checkout((tmp_path, ROOT)) == ROOT
    inside = ROOT / "bench" / "results"
    installed = tmp_path / "site" / "spectral_ops" / "__init__.py"  # as from a wheel
    monkeypatch.setattr(benchmark.spectral_ops, "__file__", str(installed))
    monkeypatch.chdir(inside)
    assert benchmark.find_checkout() == ROOT
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").touch()  # somebody else's
    assert benchmark.find_checkout() is None
    assert cli.main(["bench", "--quick"]) == 1
    told = capsys.readouterr().err
    assert "spectral-ops bench: expected a checkout of spectral_ops" in told and "Clone the repository" in told


def test_the_command_asks_for_matplotlib_before_it_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "--quick"]) == 1
    assert "expected matplotlib to be installed, got none. In the checkout: pip install '.[continual]'" in (
        capsys.readouterr().err
    )
