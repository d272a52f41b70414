"""The sweep: equally many trials, tuning seeds, what is chosen, and the file that compare reads."""

import errno
import json

import pytest
from run_samples import sample_run

from spectral_ops.continual import sweep as module
from spectral_ops.continual.compare import CompareConfig, compare
from spectral_ops.continual.methods import METHODS, Method
from spectral_ops.continual.sweep import SweepConfig, sweep
from spectral_ops.continual.trainer import Stopped
from spectral_ops.continual.trials import choose_trial, fill, plan_trials
from spectral_ops.continual.variants import parse_variant

TINY = {"preset": "random-label-digits", "tasks": 2, "steps": 5, "samples": 60, "held_out_samples": 20, "workers": 1}


class Gridless(Method):
    """Has a strength, and says none that are usual."""

    def __init__(self, context, *, strength: float = 1.0):
        super().__init__(context)


def tiny(out, *methods, **changes):
    return SweepConfig(out=out, methods=methods, **(TINY | {"seeds": (0, 1)} | changes))


def points(trials, method):
    return [(trial.strength, trial.lr) for trial in trials if trial.method == method]


def trials_of(*texts, **rest):
    return plan_trials([parse_variant(text) for text in texts], **({"lr": 1e-3} | rest))


def test_fill_keeps_values_and_range_and_halves_the_widest_gap():
    assert fill((1e-2, 1e-4), 2) == [1e-4, 1e-2]
    assert fill((1e-4, 1e-2), 5) == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]
    assert fill((1e-4, 1e-3, 1.0), 4) == [1e-4, 1e-3, 0.0316, 1.0]
    assert fill((1e-3,), 1) == [1e-3] and fill((1e-3,), 3) == [1e-4, 1e-3, 1e-2]
    assert fill((1e-3,), 2) == [1e-4, 1e-3]
    assert fill((0.0, 0.1), 4) == [0.0, 0.05, 0.0707, 0.1]
    close = fill((1.0, 1.001), 9)  # three digits would not tell them apart
    assert len(set(close)) == 9 and close == sorted(close) and (close[0], close[-1]) == (1.0, 1.001)


def test_every_method_has_the_same_number_of_trials():
    texts = ["none", "l2", "spectral,strength=1e-3,1e-2", "l2-init,strength=1e-3", "spectral-norm", "parseval,lr=1e-3"]
    trials = trials_of(*texts, lrs=(1e-4, 1e-3, 1e-2))
    names = ["none", "l2", "spectral", "l2-init", "spectral-norm", "parseval"]
    rows = max(len(METHODS["l2"].grid), len(METHODS["parseval"].grid))
    assert [len(set(points(trials, name))) for name in names] == [3 * rows] * 6
    assert sorted({lr for _, lr in points(trials, "l2")}) == [1e-4, 1e-3, 1e-2]
    assert sorted({strength for strength, _ in points(trials, "l2")}) == sorted(fill(METHODS["l2"].grid, rows))
    spectral = {strength for strength, _ in points(trials, "spectral")}
    assert len(spectral) == rows and {min(spectral), max(spectral)} == {1e-3, 1e-2}  # more points, the same range
    for name, strength in (("none", None), ("l2-init", 1e-3)):  # only learning rates to vary
        assert {s for s, _ in points(trials, name)} == {strength}
        assert [lr for _, lr in points(trials, name)] == fill((1e-4, 1e-3, 1e-2), 3 * rows)
    assert {lr for _, lr in points(trials, "parseval")} == {1e-3}  # only strengths
    assert len({trial.variant.label for trial in trials}) == len(trials)


def test_learning_rates_of_a_method_without_strength_multiply_nobodys_trials():
    rates = (1e-4, 3e-4, 1e-3, 3e-3)
    trials = trials_of("none,lr=1e-4,3e-4,1e-3,3e-3", "l2,strength=1e-4,1e-3,1e-2", lrs=(1e-3, 1e-2))
    assert [lr for _, lr in points(trials, "none")] == fill(rates, 6) and len(points(trials, "l2")) == 6
    trials = trials_of("none,lr=1e-4,3e-4,1e-3,3e-3", "l2,strength=1e-4,1e-3,1e-2,1e-1,lr=2e-3")
    assert [lr for _, lr in points(trials, "none")] == list(rates)
    assert points(trials, "l2") == [(strength, 2e-3) for strength in (1e-4, 1e-3, 1e-2, 1e-1)]
    trials = trials_of("none,lr=1e-4,3e-4,1e-3,3e-3", "l2,strength=1e-4,1e-3,1e-2", lrs=(1e-3,))  # more than strengths
    assert len(points(trials, "none")) == len(points(trials, "l2")) == 6


def test_grids_given_for_all_and_learning_rates_around_the_runs():
    trials = trials_of("none", "l2", "spectral,target=2", strengths=(1e-3, 1e-2), lr=3e-3)
    assert points(trials, "l2") == points(trials, "spectral,target=2")
    assert points(trials, "l2")[:3] == [(1e-3, 0.000949), (1e-3, 0.003), (1e-3, 0.00949)]
    assert len(points(trials, "none")) == 6
    assert trials[-1].variant.fields == {
        "method": "spectral",
        "strength": 1e-2,
        "lr": 0.00949,
        "options": {"target": 2},
    }
    labelled = trials_of("l2,label=mine,strength=1e-3", lrs=(1e-3,))
    assert labelled[0].variant.label == "mine,strength=0.001,lr=0.001" and labelled[0].method == "mine"


def test_choice_is_the_highest_mean_the_first_of_equal_ones_and_says_where_it_lies():
    trials = trials_of("l2,strength=1e-4,1e-3,1e-2", lrs=(1e-4, 1e-3, 1e-2))
    means = {trial.variant.label: 0.5 for trial in trials}
    labels = {(trial.strength, trial.lr): trial.variant.label for trial in trials}
    choice = choose_trial(trials, means | {labels[1e-3, 1e-3]: 0.7, labels[1e-2, 1e-3]: 0.7, labels[1e-2, 1e-2]: None})
    assert (choice.trial.strength, choice.trial.lr, choice.mean, choice.edges) == (1e-3, 1e-3, 0.7, [])
    edge = choose_trial(trials, means | {labels[1e-2, 1e-4]: 0.9})
    assert edge.edges == ["strength 0.01 is the highest", "lr 0.0001 is the lowest"]
    assert choose_trial(trials, dict.fromkeys(means)) == (None, None, [], 0)
    fixed = trials_of("l2,lr=1e-3,strength=1e-4,1e-3,1e-2")
    assert choose_trial(fixed, {t.variant.label: t.strength == 1e-3 for t in fixed}).edges == []  # one lr is no edge


def test_writes_all_trials_and_a_file_that_compare_reads(tmp_path, capsys):
    config = tiny(tmp_path / "sweep", "none", "l2,strength=1e-4,1e-3", "spectral,target=2,strength=1e-3,1e-2,1e-1")
    assert sweep(config, run=sample_run) == 0
    out = capsys.readouterr().out
    content = json.loads((config.out / "sweep.json").read_text())
    assert content["trials_per_method"] == 9 and len(content["trials"]) == 27 and content["seeds"] == [0, 1]
    trial = next(t for t in content["trials"] if t["label"] == "l2,strength=0.001,lr=0.001")
    # 0.9 and 0.88 in the two tasks, a hundredth more for seed 1.
    assert trial["by_seed"] == pytest.approx({"0": 0.89, "1": 0.9}) and trial["mean"] == pytest.approx(0.895)
    assert content["versions"]["torch"] and content["config"]["data"] == "digits" and "seed" not in content["config"]
    assert content["chosen"]["none"]["lr"] == 1e-3 and content["chosen"]["none"]["on_the_edge"] == []
    assert content["chosen"]["l2"]["strength"] == 1e-3
    assert content["chosen"]["l2"]["on_the_edge"] == ["strength 0.001 is the highest"]
    assert content["chosen"]["spectral,target=2"]["on_the_edge"] == ["strength 0.001 is the lowest"]
    assert "Best of 9 trials each, by the mean of accuracy over the tasks and the seeds 0, 1:" in out
    assert "0.8950  strength 0.001, lr 0.001" in out
    assert "its strength 0.001 is the highest tried: a better one may lie beyond" in out
    best = config.out / "best.toml"
    assert f"spectral-ops compare --config {best}" in out

    seen = []

    def look(run_config, folder, **rest):
        seen.append(run_config)
        sample_run(run_config, folder, **rest)

    report = CompareConfig(out=tmp_path / "compare", config=best, seeds=(10,), workers=1)
    assert compare(report, run=look, report=lambda *_: 0) == 0
    assert [(c.method, c.strength, c.lr, c.options) for c in seen] == [
        ("none", None, 1e-3, {}),
        ("l2", 1e-3, 1e-3, {}),
        ("spectral", 1e-3, 1e-3, {"target": 2}),
    ]
    assert all((c.data, c.tasks, c.steps, c.samples, c.seed) == ("digits", 2, 5, 60, 10) for c in seen)
    on_tuned = CompareConfig(out=tmp_path / "other", config=best, seeds=(1, 10), workers=1)
    assert compare(on_tuned, run=look, report=lambda *_: 0) == 2
    assert f"seeds: expected others than {best} was chosen on, got 1. Change --seeds." in capsys.readouterr().err


def test_select_decides_what_is_averaged(tmp_path):
    config = tiny(tmp_path, "l2,strength=1e-4,1e-3,1e-2", select="online_accuracy", lrs=(1e-3,), seeds=(0,))
    assert sweep(config, run=sample_run) == 0
    chosen = json.loads((tmp_path / "sweep.json").read_text())["chosen"]["l2"]
    assert chosen["strength"] == 1e-4 and chosen["mean"] == pytest.approx(0.21)  # 1 - accuracy, by the sample runs


def test_held_out_accuracy_is_selected_where_there_is_one(tmp_path, capsys):
    options = {"select": "held_out_accuracy", "lrs": (1e-3,), "seeds": (0,)}
    assert sweep(tiny(tmp_path / "a", "l2,strength=1e-4,1e-3", **options), run=pytest.fail) == 2
    assert "for random-labels, which holds nothing out, got held_out_accuracy" in capsys.readouterr().err
    assert sweep(tiny(tmp_path / "a", "l2", stream="least-likely-label", **options), run=pytest.fail) == 2
    assert "for least-likely-label, which holds nothing out" in capsys.readouterr().err
    config = tiny(tmp_path / "b", "l2,strength=1e-4,1e-3", stream="permuted-pixels", **options)
    assert sweep(config, run=sample_run) == 0
    chosen = json.loads((tmp_path / "b" / "sweep.json").read_text())["chosen"]["l2"]
    # Of task 1 alone, 1 - accuracy / 2 by the sample runs: task 0 has none.
    assert chosen["strength"] == 1e-4 and chosen["mean"] > 0.5


def test_trial_with_a_failed_run_is_not_chosen_and_a_method_without_any_leaves_no_file(tmp_path, capsys):
    def fails(config, folder, **rest):
        if config.method == "l2" and (config.strength == 1e-3 and config.seed == 1 or config.lr == 1e-2):
            raise RuntimeError("diverged")
        sample_run(config, folder, **rest)

    texts = ["none", "l2,strength=1e-4,1e-3"]
    assert sweep(tiny(tmp_path / "some", *texts, lrs=(1e-3,)), run=fails) == 1
    content = json.loads((tmp_path / "some" / "sweep.json").read_text())
    assert content["chosen"]["l2"]["strength"] == 1e-4  # not the better one, which has a seed less
    assert [t["mean"] for t in content["trials"] if t["label"] == "l2,strength=0.001,lr=0.001"] == [None]
    captured = capsys.readouterr()
    assert "l2,strength=0.001,lr=0.001 seed 1: RuntimeError: diverged" in captured.err
    assert captured.err.splitlines()[-1].startswith("Mend the cause and give the same command again")
    text = (tmp_path / "some" / "best.toml").read_text()
    for said in (captured.out, text):
        assert said.count("trials that finished") == 1
    assert "strength 0.0001, lr 0.001, the best of 1 trials that finished" in captured.out
    assert "[[methods]]  # 0.7950, the best of 1 trials that finished" in text
    assert sweep(tiny(tmp_path / "all", *texts, lrs=(1e-2,)), run=fails) == 1
    out = capsys.readouterr().out
    assert "no trial has finished" in out and "No best.toml: no trial of l2 has finished." in out
    assert not (tmp_path / "all" / "best.toml").exists()


@pytest.mark.parametrize("file", ["sweep.json", "best.toml"])
def test_choice_is_told_where_it_cannot_be_written(tmp_path, monkeypatch, capsys, file):
    def full(path, text):
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_text", full)
    assert sweep(tiny(tmp_path, "l2,strength=1e-4,1e-3", lrs=(1e-3,)), run=sample_run) == 2
    captured = capsys.readouterr()
    assert "0.8950  strength 0.001, lr 0.001" in captured.out
    assert f"sweep: expected {tmp_path} to be writable, got [Errno 28] No space left on device. Make" in captured.err


def test_sweep_into_what_is_no_folder_ends_in_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = tiny(tmp_path / "file" / "out", "l2,strength=1e-4", lrs=(1e-3, 1e-2), seeds=(0,))
    assert sweep(config, run=sample_run) == 2
    captured = capsys.readouterr()
    assert f"got {tmp_path / 'file'}, which is a file. Choose another folder" in captured.err and not captured.out


def test_dry_run_and_resuming(tmp_path, capsys):
    config = {"strengths": (1e-3, 1e-2), "lrs": (1e-3,), "seeds": (0,)}
    assert sweep(tiny(tmp_path, "l2", dry_run=True, **config), run=pytest.fail) == 0
    assert "2 runs, 1 at a time:" in capsys.readouterr().out and not list(tmp_path.iterdir())
    for _ in range(2):
        assert sweep(tiny(tmp_path, "l2", **config), run=sample_run) == 0
    counts = [len((path / "calls").read_text().split()) for path in tmp_path.glob("*/seed-0")]
    assert counts == [1, 1]


@pytest.mark.parametrize(
    "methods, changes, message",
    [
        (("l2",), {"seeds": (2, 10, 11)}, "sweep: expected seeds below 10, got 10, 11. Change --seeds: the others"),
        (("l2",), {"seeds": ()}, "seeds: expected distinct ones >= 0, got ()"),
        (("l2",), {"workers": 0}, "sweep: expected workers >= 1, got 0"),
        ((), {}, "methods: expected at least one"),
        (
            ("l2,strength=1e-3,lr=1e-3",),
            {},
            "sweep: expected l2 to have a strength or a learning rate to vary, got both",
        ),
        (("l2,lr=high",), {}, "sweep: expected lr of l2 to be one number or several, got 'high'"),
        (("l2,strength=1e-3,high",), {}, "sweep: expected strength of l2 to be one number or several"),
        ((f"{__name__}:Gridless",), {}, "which has no usual ones, got none. Give --strengths."),
        (("l2",), {"strengths": (-1.0,)}, "run: expected strength from 0"),
        (("l3",), {}, "method: expected one of none"),
        (("redo,period=none",), {}, "got None"),
        (("redo",), {"strengths": (0.1, 5.0)}, "redo: expected strength from 0 to 1, got 5"),
    ],
)
def test_refuses_before_anything_runs(tmp_path, capsys, methods, changes, message):
    assert sweep(tiny(tmp_path / "out", *methods, **changes), run=pytest.fail) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error, error
    assert not (tmp_path / "out").exists()


def test_refuses_methods_named_twice(tmp_path, capsys):
    file = tmp_path / "some.toml"
    file.write_text("[[methods]]\nmethod = 'none'")
    assert sweep(tiny(tmp_path / "out", "none", config=file), run=pytest.fail) == 2
    assert f"methods: expected them once, got --methods and those of {file}." in capsys.readouterr().err


def test_interrupted_sweep_chooses_nothing(tmp_path, capsys):
    def interrupted(config, folder, *, stop, **rest):
        stop.set()
        raise Stopped

    assert sweep(tiny(tmp_path, "none"), run=interrupted) == 130
    assert "The same command goes on" in capsys.readouterr().err and not (tmp_path / "sweep.json").exists()
