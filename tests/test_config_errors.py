"""Configurations from Python that are none: the error names the field, what it is to hold, and how it is spelled."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectral_ops.continual import RunConfig, Trainer, config, run, run_together
from spectral_ops.continual.choices import check_options, parse_options
from spectral_ops.continual.jobs import Job
from spectral_ops.continual.methods.spectral import Spectral
from spectral_ops.continual.variants import check_jobs

TINY = RunConfig(data="digits", tasks=1, samples=64, steps=2, batch=8, probe_samples=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "5"}, "run: expected tasks to be int, got '5' of type str. Change tasks (--tasks), for instance"),
        ({"options": None}, "run: expected options to be dict, got None of type NoneType. Change options (--options)"),
        ({"model_options": ["norm=layer"]}, "(--model-options), for instance to {}."),
        ({"tasks": 2.0}, "expected tasks to be int, got 2.0 of type float"),
        ({"seed": np.int64(3)}, "expected seed to be int, got"),  # config.json could not be written
        ({"steps": True}, "expected steps to be int, got True of type bool"),
        ({"lr": "high"}, "expected lr to be float, got 'high' of type str. Change lr (--lr), for instance to 0.001."),
        ({"strength": "1"}, "expected strength to be float or None, got '1'"),
        ({"method": None}, "expected method to be str, got None of type NoneType. Change method (--method), for "),
        ({"data_root": 3}, "expected data_root to be Path or None, got 3 of type int"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    wrong = replace(TINY, **changes)
    for refuses in (run, Trainer):
        with pytest.raises(TypeError, match=re.escape(message)):
            refuses(wrong)
    together = message.replace("run:", "run_together:")
    with pytest.raises(TypeError, match=re.escape(together)):
        run_together([wrong], [tmp_path / "run"])
    assert not list(tmp_path.iterdir())


def test_an_int_is_a_float_and_a_text_is_a_path() -> None:
    config.check_types(replace(TINY, lr=1, strength=2, checkpoint_seconds=5, data_root="/data"))  # type: ignore
    config.check_types(RunConfig(data_root=Path("/data"), strength=0.5))


@pytest.mark.parametrize("wrong", ["x", None, {"tasks": 5}, RunConfig], ids=str)
def test_what_is_no_configuration_is_said_to_be_none(wrong: Any) -> None:
    message = f"run: expected a RunConfig, got {wrong!r} of type {type(wrong).__name__}. Make one: RunConfig("
    for refuses in (run, Trainer):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
            refuses(wrong)
    with pytest.raises(TypeError, match=f"^{re.escape(message.replace('run:', 'run_together:'))}"):
        run_together([TINY, wrong])


def test_one_configuration_or_folder_is_no_list(tmp_path: Path) -> None:
    message = r"^run_together: expected configs to be a list of RunConfig, got one RunConfig\. Write \[config, "
    with pytest.raises(TypeError, match=message):
        run_together(TINY)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected configs to be a list of RunConfig, got 'x' of type str"):
        run_together("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected configs to be a list of RunConfig, got <generator .* of type gen"):
        run_together(TINY for _ in range(2))  # type: ignore[arg-type]
    for folder in (str(tmp_path / "o"), tmp_path / "o"):
        with pytest.raises(TypeError, match=r"^run_together: expected folders to be a list of paths or None, got .*o'"):
            run_together([TINY], folder)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"device": "tpu"}, "Change device (--device)."),
        ({"momentum": 0.5}, "Drop momentum (--momentum), or use sgd as optimizer (--optimizer)."),
        ({"optimizer": "spectral-adamw"}, "use spectral as method (--method), or adam as optimizer (--optimizer)."),
        (
            {"method": "l2", "strength": 1.0, "options": {"strength": 2}},
            "got 1.0 and 2. Drop strength (--strength) or 'strength' among the options (--options).",
        ),
    ],
    ids=str,
)
def test_the_remedy_is_for_python_and_the_command_line(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(remedy)):
        run(replace(TINY, **changes))


def test_conv_operators_ask_for_the_size_of_images_before_anything_runs(tmp_path: Path) -> None:
    conv = replace(TINY, model="conv", model_options={"channels": (2,)})
    operator = replace(conv, method="spectral", options={"conv": "operator"})
    jobs = [Job("none", conv, tmp_path / "none"), Job("spectral", operator, tmp_path / "spectral")]
    for refuses, given in ((run, operator), (Trainer, operator), (check_jobs, jobs)):
        with pytest.raises(ValueError, match="^run: expected an option input_size with conv='operator'") as caught:
            refuses(given)  # type: ignore[operator]
    (python,), (shell,) = (re.findall(p, str(caught.value)) for p in (r"RunConfig\(.*?\)\}\)", r"--options (.*)\.$"))
    assert eval(python).options == {"conv": "operator", "input_size": (1, 28, 28)}
    assert check_options("a", Spectral, parse_options(shell.split())) == eval(python).options
    there = {"conv": "operator", "input_size": (1, 8, 8)}
    assert run(replace(operator, options=there))[0]["penalty_ratio"] > 0
