"""The command that compares methods: what it reads, which runs it plans, what it refuses, and what it leaves behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from run_samples import calls, sample_run

from spectral_ops.continual import compare as module
from spectral_ops.continual.compare import CompareConfig, compare, main
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.methods import Method
from spectral_ops.continual.run_folder import read_run
from spectral_ops.continual.toml_text import toml_lines
from spectral_ops.continual.trainer import Stopped
from spectral_ops.continual.variants import describe, fields_of, named, parse_variant, plan_jobs, read_file

TINY = {"preset": "random-label-digits", "tasks": 2, "steps": 5, "samples": 60, "held_out_samples": 20, "workers": 1}


class Own(Method):
    """Somebody's own method, with an option that has a run's name."""

    def __init__(self, context, *, strength: float = 1.0, steps: int = 3):
        super().__init__(context)


class Broken(Method):
    """Somebody's own method with a mistake."""

    def __init__(self, context, *, period: int = 3):
        {}[period]


def tiny(out, *methods, **changes):
    return CompareConfig(out=out, methods=methods, **(TINY | {"seeds": (10, 11)} | changes))


def error_of(config, capsys):
    assert compare(config, run=sample_run, report=lambda *_: 0) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


@pytest.mark.parametrize(
    "text, fields",
    [
        ("none", {"method": "none"}),
        ("l2,strength=1e-4,lr=3e-3", {"method": "l2", "strength": 1e-4, "lr": 3e-3}),
        ("spectral,strength=1,target=2", {"method": "spectral", "strength": 1.0, "options": {"target": 2}}),
        ("none,optimizer=sgd,momentum=0.9", {"method": "none", "optimizer": "sgd", "momentum": 0.9}),
        (
            "none,model=conv,model_options.channels=8,16,model_options.norm=layer",
            {"method": "none", "model": "conv", "model_options": {"channels": [8, 16], "norm": "layer"}},
        ),
        (
            "my.module:Class,options.steps=3,flag=true",
            {"method": "my.module:Class", "options": {"steps": 3, "flag": True}},
        ),
    ],
)
def test_text_and_table_say_the_same(tmp_path, text, fields):
    table = parse_variant(text)
    assert fields_of(table) == fields
    file = tmp_path / "methods.toml"
    file.write_text("\n".join(["[[methods]]", *toml_lines(table)]))
    assert read_file(file)[1] == [table]
    file.write_text(f"methods = [{json.dumps(text)}]")
    assert read_file(file)[1] == [table]


def test_a_space_in_place_of_a_comma_is_understood():
    with pytest.raises(ValueError, match="got 'strength=1e-3'. Its method comes first, with a comma between"):
        parse_variant("strength=1e-3")


def test_labels_are_readable_safe_and_unique():
    texts = [
        "l2,strength=1e-4",
        "l2,strength=0.0001,lr=1e-3",
        "my.mod:Class,path=../a b;c",
        "my.mod:class",
        "x.y:Class",
    ]
    tables = [*map(parse_variant, texts), {"method": "none", "label": "report"}, {"method": "none", "label": "/"}]
    labels = [variant.label for variant in named(tables)]
    assert labels == [
        "l2,strength=0.0001",
        "l2,strength=0.0001,lr=0.001",
        "Class,path=..-a-b-c",
        "class",
        "Class-2",  # also where a file system does not tell upper case from lower
        "report-2",  # beside the report's own folder
        "variant",
    ]
    long = named([{"method": "none", "options": {f"o{i}{j}": "x" * 50}} for i in range(2) for j in range(2)])
    assert max(len(variant.label) for variant in long) <= 82
    assert describe({"method": "l2", "options": {"a": True, "b": None, "c": [1, 2.5]}}) == "l2,a=true,b=none,c=1,2.5"


def test_plan_pairs_the_seeds_and_keeps_what_is_shared(tmp_path):
    base = RunConfig(model_options={"hidden": [9]}, tasks=3)
    tables = ["none", "l2,strength=1e-4,model_options.norm=layer", "none,model=conv,model_options.norm=layer"]
    jobs = plan_jobs(base, named(map(parse_variant, tables)), (10, 12), tmp_path)
    assert [job.config.seed for job in jobs] == [10, 10, 10, 12, 12, 12]
    assert jobs[1].folder == tmp_path / "l2,strength=0.0001,norm=layer" / "seed-10"
    assert jobs[0].config == replace(base, seed=10)
    assert jobs[1].config.model_options == {"hidden": [9], "norm": "layer"}
    assert jobs[2].config.model_options == {"norm": "layer"}  # those of another network are not its own
    assert len({job.folder for job in jobs}) == 6
    kept = {(c.stream, c.data, c.tasks, c.samples, c.steps, c.batch) for c in (job.config for job in jobs)}
    assert len(kept) == 1  # what the stream of a seed is made of


def test_runs_all_reports_on_them_and_does_not_run_them_again(tmp_path, capsys):
    config, reports = tiny(tmp_path / "out", "none", "l2,strength=1e-4"), []
    for _ in range(2):
        assert compare(config, run=sample_run, report=lambda *called: reports.append(called) or 0) == 0
    labels = ["none/seed-10", "l2,strength=0.0001/seed-10", "none/seed-11", "l2,strength=0.0001/seed-11"]
    folders = [config.out / label for label in labels]
    assert reports == [(folders, config.out / "report", folders[0])] * 2
    assert all(len((folder / "calls").read_text().split()) == 1 for folder in folders)
    assert read_run(folders[1]).config["strength"] == 1e-4 and read_run(folders[1]).config["seed"] == 10
    assert f"4 of 4 runs finished, in {config.out}; report in {config.out / 'report'}" in capsys.readouterr().out


def test_failed_runs_and_a_failed_report_are_seen_in_the_status(tmp_path, capsys):
    config = tiny(tmp_path, "none", f"{__name__}:Own,strength=1")
    reports = []

    def fails(run_config, folder, **rest):
        if run_config.method != "none":
            raise RuntimeError("boom")
        sample_run(run_config, folder, **rest)

    def report(folders, *_):
        assert "that failed" not in capsys.readouterr().err  # but after the tables, which are long
        reports.append(folders)
        return 0

    assert compare(config, run=fails, report=report) == 1
    captured = capsys.readouterr()
    assert "expected 4 runs to finish, got 2 that failed" in captured.err and "boom; see" in captured.err
    assert "2 of 4 runs finished" in captured.out
    assert reports == [[tmp_path / "none" / "seed-10", tmp_path / "none" / "seed-11"]]
    assert compare(tiny(tmp_path, "none"), run=sample_run, report=lambda *_: 1) == 1
    assert compare(tiny(tmp_path / "all", f"{__name__}:Own"), run=fails, report=lambda *_: pytest.fail("no runs")) == 1


def test_interrupted_runs_are_not_reported_on(tmp_path, capsys):
    def interrupted(config, folder, *, stop, **rest):
        stop.set()
        raise Stopped

    status = compare(tiny(tmp_path, "none"), run=interrupted, report=lambda *_: pytest.fail("it was interrupted"))
    assert status == 130 and f"The same command goes on: {tmp_path} holds" in capsys.readouterr().err


def test_dry_run_lists_the_runs_and_what_is_there_of_them(tmp_path, capsys):
    config = tiny(tmp_path, "none", "l2", workers=3)
    first = plan_jobs(RunConfig(), named([{"method": "none"}]), (10,), tmp_path)[0]
    assert compare(replace(config, dry_run=True), run=pytest.fail) == 0
    assert not list(tmp_path.iterdir())
    assert compare(replace(config, workers=1), run=sample_run, report=lambda *_: 0) == 0
    log = tmp_path / "l2" / "seed-10" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))  # a header and one of two tasks
    capsys.readouterr()
    assert compare(replace(config, dry_run=True, seeds=(10, 12)), run=pytest.fail) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "4 runs, 3 at a time:".split()
    assert lines[1] == ["none", "seed", "10", "finished", str(first.folder)]
    assert lines[2][:7] == ["l2", "seed", "10", "1", "of", "2", "tasks"] and lines[3][:4] == [
        "none",
        "seed",
        "12",
        "new",
    ]
    assert calls(first) and not (tmp_path / "none" / "seed-12").exists()


def test_file_gives_what_the_command_line_does_not(tmp_path):
    file, seen = tmp_path / "best.toml", []
    file.write_text(
        """
        tuning_seeds = [0, 1]
        lr = 0.01
        batch = 8
        model_options = { hidden = [7], norm = "layer" }
        [[methods]]
        method = "spectral"
        strength = 1e-3
        target = 2.0
        """
    )
    config = tiny(tmp_path / "out", config=file, batch=4, model_options=("norm=layer-plain",), seeds=(10,))

    def look(run_config, folder, **rest):
        seen.append(run_config)
        sample_run(run_config, folder, **rest)

    assert compare(config, run=look, report=lambda *_: 0) == 0
    (run_config,) = seen
    assert (run_config.lr, run_config.batch, run_config.tasks) == (0.01, 4, 2)  # file, command line over it, ...
    assert run_config.model_options == {"hidden": [7], "norm": "layer-plain"}
    assert run_config.data == "digits"  # ... and the preset below both
    assert (run_config.method, run_config.strength, run_config.options) == ("spectral", 1e-3, {"target": 2.0})


@pytest.mark.parametrize(
    "methods, changes, message",
    [
        ((), {}, "methods: expected at least one, got none"),
        (("none",), {"seeds": ()}, "seeds: expected distinct ones >= 0, got ()"),
        (("none",), {"seeds": (10, 10)}, "seeds: expected distinct ones >= 0, got (10, 10)"),
        (("none", "l2"), {"baseline": "l3"}, "baseline: expected one of none, l2, got 'l3'. The nearest is 'l2'"),
        (("none",), {"workers": 0}, "compare: expected workers >= 1, got 0"),
        (
            ("none", "none,lr=1e-3"),
            {},
            "methods: expected different ones, got none,lr=0.001 and none, which are the same",
        ),
        (("l2,1e-4",), {}, "methods: expected name,key=value,..., got 'l2,1e-4'"),
        (("",), {}, "methods: expected each to name its method, got {'method': ''}"),
        (
            ("none,steps=3",),
            {},
            "method none: expected steps to be the same for all methods, got steps=3. Set it for all",
        ),
        (("none,seed=3",), {}, "method none: expected seed to be the same for all methods"),
        (("none,options=3",), {}, "method none: expected options to be a table, got 3"),
        (("l2,strength=much",), {}, "method l2: expected option strength to be float or NoneType, got 'much'"),
        (("l3",), {}, "method: expected one of none, l2"),
        (("l2,strenth=1",), {}, "The nearest is 'strength'"),
        (("none,strength=1",), {}, "got 'strength'"),
        (("none",), {"model": "mpl"}, "The nearest is 'mlp'"),
        (("none",), {"model_options": ("hiden=3",)}, "The nearest is 'hidden'"),
        (("none,optimizer=adan",), {}, "The nearest is 'adam'"),
        (("none",), {"samples": 10**6}, "expected samples"),
        (("none",), {"steps": 0}, "run: expected steps from 1"),
        (("none", "redo,period=0"), {}, "redo: expected period from 1 to inf, got 0"),
        (("redo", "redo,strength=7"), {}, "redo: expected strength from 0 to 1, got 7"),
        (("shrink-and-perturb,every=step",), {}, "shrink-and-perturb: expected source normal with every step"),
        (("spectral,target=-1",), {}, "expected target to be finite and >= 0, got -1"),
        (("spectral,conv=operator",), {}, "expected an option input_size with conv='operator' of method spectral"),
        ((f"{__name__}:Broken",), {}, "Broken: expected it to be made with the options {}, got KeyError: 3. Mend its"),
        (("fire,iterations=0",), {}, "fire: expected iterations from 1 to 1000, got 0"),
    ],
)
def test_refuses_before_anything_runs(tmp_path, capsys, methods, changes, message):
    error = error_of(tiny(tmp_path / "out", *methods, **changes), capsys)
    assert message in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("method = 'l2'", "expected method within [[methods]] or as --seeds, got it for all"),
        ("seed = 3", "expected seed within [[methods]] or as --seeds, got it for all"),
        ("methods = 3", "expected methods to be tables [[methods]], got 3"),
        ("tuning_seeds = 'all'", "expected tuning_seeds to be integers, got 'all'"),
        ("tuning_seeds = [10, 3]\n[[methods]]\nmethod = 'none'", "seeds: expected others than"),
        ("[[methods]]\nstrength = 1.0", "methods: expected each to name its method"),
        ("methods = ", "to be TOML, got"),
        ("bach = 3", "The nearest is 'batch'"),
    ],
)
def test_refuses_files(tmp_path, capsys, text, message):
    file = tmp_path / "some.toml"
    file.write_text(text)
    assert message in error_of(tiny(tmp_path / "out", config=file), capsys)
    assert str(file) in error_of(tiny(tmp_path / "out", "none", config=tmp_path / "missing.toml"), capsys).replace(
        "missing", "some"
    )


def test_refuses_methods_named_twice_and_folders_of_another_run(tmp_path, capsys):
    file = tmp_path / "some.toml"
    file.write_text("[[methods]]\nmethod = 'none'")
    message = error_of(tiny(tmp_path / "out", "none", config=file), capsys)
    assert message == f"methods: expected them once, got --methods and those of {file}. Drop one."
    assert compare(tiny(tmp_path / "out", "none"), run=sample_run, report=lambda *_: 0) == 0
    capsys.readouterr()
    assert "got one of another (steps: 5 there, 6 here)" in error_of(tiny(tmp_path / "out", "none", steps=6), capsys)


def test_report_compares_with_the_baseline(tmp_path, capsys):
    config = tiny(tmp_path, "none", "l2,strength=1e-4", steps=20, baseline="l2,strength=0.0001")
    assert compare(config) == 0  # the trainer itself, and its report
    text = (tmp_path / "report" / "report.md").read_text()
    assert "none" in text and "l2 0.0001" in text and "l2 0.0001" in capsys.readouterr().out
    rows = (tmp_path / "report" / "differences.csv").read_text().splitlines()[1:]
    assert rows and all(row.startswith("none") for row in rows)  # what is compared, with l2
    alone = tiny(tmp_path, "none", steps=20)
    assert compare(alone) == 0


def test_command_line(tmp_path, monkeypatch, capsys):
    configured = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(main)
    monkeypatch.setattr(module, "compare", lambda config: config)
    arguments = [
        "--out",
        "x",
        "--methods",
        "none",
        "spectral,strength=1e-3,target=2",
        "--seeds",
        "10",
        "11",
        "--dry-run",
    ]
    config = tyro.cli(configured, args=[*arguments, "--lr", "0.01", "--model-options", "norm=layer"])
    assert config.methods == ("none", "spectral,strength=1e-3,target=2") and config.seeds == (10, 11)
    assert (config.out, config.dry_run, config.lr, config.workers) == (Path("x"), True, 0.01, 2)
    for option in ("--method", "--seed", "--strength", "--options"):  # of a single run
        with pytest.raises(SystemExit):
            tyro.cli(configured, args=["--out", "x", option, "1"])
    assert "--methods" in capsys.readouterr().err


def test_toml_refuses_what_it_has_no_word_for():
    assert toml_lines({"a b": [1, 2.5, True], "t": {"x": "\"'"}, "e": {}}) == [
        '"a b" = [1, 2.5, true]',
        't = { x = "\\"\'" }',
        "e = {}",
    ]
    with pytest.raises(ValueError, match="toml: expected target to have a value, got None. Leave it out."):
        toml_lines({"options": {"target": None}})
    with pytest.raises(TypeError, match="toml: expected x to be text, a number, a list or a table, got object"):
        toml_lines({"x": object()})
