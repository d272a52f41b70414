"""train --optimizer spectral-adamw: the penalty of method spectral taken into the optimizer's step."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from test_trainer import SMALL, same_weights, weights, without_times

from spectral_ops import SpectralAdamW
from spectral_ops.continual import steps
from spectral_ops.continual.ensemble import run_together
from spectral_ops.continual.trainer import Stopped, Trainer, run

APART = replace(SMALL, method="spectral", strength=1e-2)
FOLDED = replace(APART, optimizer="spectral-adamw")


@pytest.mark.parametrize("options", [{}, {"output": False, "target": 2.0, "biases": False}], ids=["all", "some"])
def test_trains_as_method_and_optimizer_apart(options: dict[str, object]) -> None:
    config = replace(APART, options=options, tasks=4, steps=60, strength=0.1, lr=1e-2)
    apart, folded = run(config), run(replace(config, optimizer="spectral-adamw"))
    for mine, other in zip(folded, apart, strict=True):
        # One sample of 60, which rounding may put on the other side.
        assert abs(mine["accuracy"] - other["accuracy"]) <= 1 / 60 + 1e-9
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-2, abs=1e-4)
    without = run(replace(config, method="none", strength=None, options={}))
    assert any(abs(r["loss"] - other["loss"]) > 0.05 * other["loss"] for r, other in zip(folded, without, strict=True))


def test_resumes_with_the_same_bits(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_PATIENCE", -1.0)
    whole = run(FOLDED, tmp_path / "whole")
    stop = threading.Event()

    def progress(task: int, step: int) -> None:
        if (task, step) >= (1, 5):
            stop.set()

    with pytest.raises(Stopped):
        run(FOLDED, tmp_path / "cut", progress=progress, stop=stop)
    resumed = run(FOLDED, tmp_path / "cut", resume=True)
    assert without_times(resumed) == without_times(whole)
    assert same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_the_optimizer_has_the_options_of_the_method() -> None:
    trainer = Trainer(replace(FOLDED, options={"output": False, "exponent": 1.0}))
    optimizer = trainer.optimizer
    assert isinstance(optimizer, SpectralAdamW)
    group = optimizer.param_groups[0]
    assert (group["strength"], group["exponent"], group["weight_decay"]) == (1e-2, 1.0, 0.0)
    assert not any(name.startswith(f"{trainer.model.output}.") for name in optimizer.sigmas())
    assert trainer.method.state_dict() == {}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="expected method spectral with optimizer spectral-adamw, got 'none'"):
        run(replace(FOLDED, method="none", strength=None))
    with pytest.raises(ValueError, match="expected conv='reshape' with --optimizer spectral-adamw, got 'operator'"):
        run(replace(FOLDED, options={"conv": "operator", "input_size": (1, 8, 8)}))
    with pytest.raises(ValueError, match="expected conv='reshape' with --optimizer spectral-adamw, got 'operator'"):
        run_together([replace(FOLDED, seed=seed, options={"conv": "operator"}) for seed in range(2)])
