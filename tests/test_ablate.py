"""The ablation: its variants, each the penalty that its name says."""

from pathlib import Path

import pytest
import torch
import tyro
from run_samples import sample_run

from spectral_ops.continual import ablate as module
from spectral_ops.continual.ablate import INITIAL, VARIANTS, AblateConfig, ablate, main, variants_at
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.trainer import Trainer
from spectral_ops.continual.variants import named

TINY = {"preset": "random-label-digits", "tasks": 2, "steps": 5, "samples": 60, "held_out_samples": 20, "workers": 1}


def tiny(out, **changes):
    return AblateConfig(out=out, **(TINY | {"seeds": (10,)} | changes))


def runs_of(config):
    seen = {}

    def look(run_config, folder, **rest):
        seen[folder.parent.name] = run_config
        sample_run(run_config, folder, **rest)

    assert ablate(config, run=look, report=lambda *_: 0) == 0
    return seen


def entries(label):
    """A variant's trainer on a network with parameters of all kinds, and {parameter: target} of its penalty."""
    base = RunConfig(data="digits", samples=60, held_out_samples=20, model_options={"hidden": [12], "norm": "layer"})
    variant = next(variant for variant in named(variants_at(1e-3)) if variant.label == label)
    trainer = Trainer(variant.config(base, 3))
    treated = [entry for entry in trainer.method.regularizer.entries if entry.layout is not None]
    return trainer, {entry.name: entry.target for entry in treated}


def test_each_variant_is_the_penalty_that_its_name_says():
    weights = {"layers.0.incoming.weight", "head.weight"}
    biases = {"layers.0.incoming.bias", "head.bias"}
    norms = {"layers.0.norm.weight", "layers.0.norm.bias"}
    assert set(entries("weights")[1]) == weights
    assert set(entries("weights+biases")[1]) == weights | biases
    assert set(entries("weights+biases+norms")[1]) == weights | biases | norms
    assert set(entries("without-output")[1]) == {n for n in weights | biases | norms if not n.startswith("head")}
    for label, target in (("target-0.5", 0.5), ("weights+biases+norms", 1.0), ("target-2", 2.0), ("target-4", 4.0)):
        assert {entries(label)[1][name] for name in weights} == {target}
    trainer, initial = entries("target-initial")
    for name in weights:
        sigma = torch.linalg.svdvals(trainer.model.get_parameter(name).detach().double())[0].item()
        assert abs(initial[name] - sigma) <= 1e-4 * sigma  # measured 1e-6
    assert set(initial) == weights | biases | norms


def test_initial_target_has_no_gradient_at_the_start_and_is_found_again_by_a_run_that_goes_on():
    trainer, targets = entries("target-initial")
    trainer.optimizer.zero_grad()
    trainer.method.after_backward()
    weight = trainer.model.get_parameter("head.weight")
    plain, _ = entries("weights+biases+norms")
    plain.optimizer.zero_grad()
    plain.method.after_backward()
    assert weight.grad.norm() <= 1e-3 * plain.model.get_parameter("head.weight").grad.norm()
    assert trainer.method.regularizer.strength == 1e-3
    state = trainer.state_dict()
    with torch.no_grad():
        weight.mul_(3)
    again, same = entries("target-initial")
    again.load_state_dict(state)
    assert same == targets


def test_all_variants_run_with_one_strength_and_the_same_stream(tmp_path):
    seen = runs_of(tiny(tmp_path, strength=3e-3))
    assert list(seen) == [table["label"] for table in VARIANTS]
    assert {c.strength for label, c in seen.items() if label != "none"} == {3e-3} and seen["none"].strength is None
    assert len({(c.seed, c.lr, c.tasks) for c in seen.values()}) == 1
    assert seen["target-initial"].method == INITIAL
    assert {c.strength for c in runs_of(tiny(tmp_path / "default")).values()} == {None}


def test_takes_strength_and_learning_rate_of_spectral_from_the_file_of_a_sweep(tmp_path, capsys):
    file = tmp_path / "best.toml"
    file.write_text(
        """
        tuning_seeds = [0]
        batch = 8
        [[methods]]
        method = "l2"
        strength = 1e-5
        [[methods]]
        method = "spectral"
        strength = 1e-2
        lr = 3e-3
        """
    )
    seen = runs_of(tiny(tmp_path / "out", config=file))
    assert {(c.strength, c.lr, c.batch) for label, c in seen.items() if label != "none"} == {(1e-2, 3e-3, 8)}
    assert seen["none"].lr == 3e-3
    given = runs_of(tiny(tmp_path / "given", config=file, strength=1e-1, lr=1e-4))
    assert {(c.strength, c.lr) for label, c in given.items() if label != "none"} == {(1e-1, 1e-4)}
    assert ablate(tiny(tmp_path / "tuned", config=file, seeds=(0,)), run=pytest.fail) == 2
    assert "seeds: expected others than" in capsys.readouterr().err


def test_dry_run_and_command_line(tmp_path, monkeypatch, capsys):
    assert ablate(tiny(tmp_path, dry_run=True), run=pytest.fail) == 0
    out = capsys.readouterr().out
    assert f"{len(VARIANTS)} runs, 1 at a time:" in out and "without-output seed 10" in out
    assert ablate(tiny(tmp_path, workers=0), run=pytest.fail) == 2
    assert "ablate: expected workers >= 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(module, "ablate", lambda config: config)
    configured = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(main)
    config = tyro.cli(configured, args=["--out", "x", "--strength", "0.01", "--seeds", "12"])
    assert (config.out, config.strength, config.seeds) == (Path("x"), 0.01, (12,))
    with pytest.raises(SystemExit):
        tyro.cli(configured, args=["--out", "x", "--method", "l2"])
