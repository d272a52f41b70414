"""`spectral-ops doctor` and the command line around it: what it reports, and that it fails when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

import spectral_ops
from spectral_ops import backends, cli, doctor


@pytest.fixture(autouse=True)
def _default_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTRAL_OPS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_chosen", None)


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ModuleNotFoundError("No module named 'spectral_ops._native'")
    monkeypatch.setattr(backends, "_import_native", lambda: error)
    monkeypatch.setattr(backends, "_warn_not_built", lambda: None)


def usable_on_cpu() -> list[str]:
    return [name for name in ("reference", "native") if backends.available()[name] is None]


def test_json_report_of_a_sound_installation(capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(json=True)
    report = json.loads(capsys.readouterr().out)
    assert status == 0 and report["ok"], report["checks"]
    assert (
        report["versions"]["torch"] == torch.__version__.partition("+")[0]
        or report["versions"]["torch"] == torch.__version__
    )
    assert report["backends"].keys() == {"reference", "native", "triton"}
    assert report["chosen"]["cpu"]["backend"] == usable_on_cpu()[-1]
    # Both checks on each backend that is usable: none silently left out.
    tested = {(check["op"], check["backend"]) for check in report["checks"] if check["device"] == "cpu"}
    assert tested == {(op, backend) for op in ("spectral_norm", "power_iteration") for backend in usable_on_cpu()}


def test_text_report_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    text = capsys.readouterr().out
    for part in ("versions", "devices", "backends", "chosen", "self-test", torch.__version__):
        assert part in text


@pytest.mark.parametrize("built", [False, True])
def test_the_verdict_says_when_compiled_kernels_are_missing(built: bool) -> None:
    report = doctor.examine()
    report["ok"], report["backends"]["native"] = True, None if built else "not built"
    assert doctor.render(report).splitlines()[-1].startswith("all is well" if built else "it works, without")


def test_compiled_module_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("spectral_ops._native")
    module.getenv = os.environ.get
    module.__file__ = "_native.so"
    module.isa = lambda: "avx2"
    module.built_with = lambda: {"compiler": "GNU 12.2.0", "cuda": "13.0"}
    module.cuda_versions = lambda: (35, 0, 13000, 0)
    module.cuda_error_text = lambda error: f"error {error}"
    monkeypatch.setattr(backends, "_import_native", lambda: module)
    facts = doctor.describe_native()
    assert facts is not None
    facts.pop("file")
    assert facts == {
        "isa": "avx2",
        "compiler": "GNU 12.2.0",
        "cuda": "13.0",
        "cuda_driver": None,  # there is none
        "cuda_runtime": "13.0",
        "cuda_devices": 0,
        "cuda_error": "error 35",
    }


@pytest.mark.parametrize("wrong", ["value", "nan", "error"])
def test_a_wrong_op_fails(wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = spectral_ops.spectral_norm

    def spectral_norm(weights: list[torch.Tensor]) -> torch.Tensor:
        sigma = right(weights)
        if wrong == "value":
            sigma[3] *= 1 + 3 * doctor.TOLERANCE
        elif wrong == "nan":
            sigma[3] = float("nan")
        else:
            raise ArithmeticError("broken on purpose")
        return sigma

    monkeypatch.setattr(spectral_ops, "spectral_norm", spectral_norm)
    assert doctor.main(json=True) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    failed = {check["op"] for check in checks if not check["ok"]}
    assert failed == {"spectral_norm"}  # and the others still ran
    (detail, *_) = [check["detail"] for check in checks if not check["ok"]]
    expected = {
        "value": "largest error 3.0e-05 (one row)",
        "nan": "largest error nan (one row)",
        "error": "broken on purpose",
    }
    assert expected[wrong] in detail


@pytest.mark.parametrize("fault", ["sigma", "u not unit", "v not advanced", "v not unit"])
def test_a_wrong_step_fails(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = spectral_ops.power_iteration

    def power_iteration(weights: list[torch.Tensor], v: list[torch.Tensor]) -> Any:
        given = [x.clone() for x in v]
        sigma, u, v = right(weights, v)
        factor = 1 + 3 * doctor.TOLERANCE
        if fault == "sigma":
            sigma = sigma / factor
        elif fault == "u not unit":
            u = [x * factor for x in u]
        elif fault == "v not unit":
            v = [x * factor for x in v]
        else:
            v = given
        return sigma, u, v

    assert doctor.check_power_iteration(torch.device("cpu"))[0]
    monkeypatch.setattr(spectral_ops, "power_iteration", power_iteration)
    assert not doctor.check_power_iteration(torch.device("cpu"))[0]


def test_missing_native_is_reported_and_no_failure(not_built: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert "not usable: ModuleNotFoundError" in text and "compiled module" not in text
    assert "reference (auto: not 'native', not usable here" in text


def test_require(not_built: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(require=("reference",)) == 0
    assert doctor.main(require=("reference", "native")) == 1
    assert "doctor: expected native to be usable, got ModuleNotFoundError" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match="expected require to name one of auto, reference, native, triton, got 'gpu'. Name"
    ):
        doctor.main(require=("gpu",))


def test_an_explicit_choice_that_cannot_be_had_fails(
    not_built: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECTRAL_OPS_BACKEND", "native")
    assert doctor.main() == 1
    assert "power_iteration: expected backend to be usable and to serve cpu" in capsys.readouterr().out


def test_the_hard_matrices_are_hard() -> None:
    found = {name: torch.linalg.svdvals(w.double()) for name, w in doctor.matrices().items()}
    assert found["rank one"][1] < 1e-6 * found["rank one"][0]
    assert 0.96 < found["close pair"][1] / found["close pair"][0] < 0.98
    assert found["tie"][0] == found["tie"][-1] == 1
    assert found["huge"][0] ** 4 > torch.finfo(torch.float32).max
    assert found["tiny"][0] ** 4 < torch.finfo(torch.float32).tiny
    assert found["zero"][0] == 0


def test_usage_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == spectral_ops.__version__
    known = "doctor, bench, scale, demo, train, compare, sweep, ablate, report, download"
    for argv in ([], ["docter"]):
        assert cli.main(argv) == 2
        assert f"spectral-ops: expected one of {known}, got" in capsys.readouterr().err


def test_options_reach_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "--require", "reference"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["demo"]) == 1
    message = capsys.readouterr().err
    assert "spectral-ops demo: expected matplotlib to be installed" in message
    assert "In a checkout of spectral_ops: pip install '.[continual]'." in message


def test_a_missing_module_of_ours_is_not_blamed_on_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'spectral_ops.nothing'", name="spectral_ops.nothing")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_doctor_needs_no_extra() -> None:
    """In a process that cannot import what only [continual] brings."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'sklearn', 'tqdm']));"
        "sys.argv = ['spectral-ops', 'doctor']; import runpy; runpy.run_module('spectral_ops', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
