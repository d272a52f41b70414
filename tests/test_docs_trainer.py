"""docs/trainer.md: its tables are those of the code, and its examples run."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_ops import continual
from spectral_ops.continual import RunConfig, Stream, Trainer, run
from spectral_ops.continual.choices import options_of
from spectral_ops.continual.data import DATASETS, load_dataset
from spectral_ops.continual.models import MODELS, Model
from spectral_ops.continual.models.mlp import MLP
from spectral_ops.continual.streams import COMMON, STREAMS, Task

TEXT = (Path(__file__).parent.parent / "docs" / "trainer.md").read_text()
TINY = {"data": "digits", "tasks": 1, "samples": 40, "steps": 3, "batch": 8, "probe_samples": 8}


def table(first: str) -> dict[str, list[str]]:
    """The rows of the table whose first column is called so: the name, without its marks, and the other cells."""
    found = re.search(rf"^\| {first} \|.*\n\| --- .*\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert found is not None, first
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows}


def written(function: Any, without: tuple[str, ...] = ()) -> str:
    """The options and their defaults as on a command line."""

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()

    return " ".join(f"`{n}={text(p.default)}`" for n, p in options_of(function).items() if n not in without)


def test_streams_are_those_of_the_code() -> None:
    rows = table("stream")
    assert list(rows) == list(STREAMS)
    for name, (_, options, held_out, _) in rows.items():
        assert options == written(STREAMS[name], without=COMMON), name
        reads = STREAMS[name].reads_model
        assert held_out == ("yes" if STREAMS[name].holds_out and not reads else "no"), name
        for paper in re.findall(r"arXiv ([0-9.]+)", rows[name][3]):
            assert paper in (inspect.getdoc(STREAMS[name]) or ""), (name, paper)


def test_data_sets_are_those_of_the_code() -> None:
    rows = table("data set")
    assert list(rows) == list(DATASETS)
    sizes = [load_dataset("digits", split=split).images.shape for split in ("train", "test")]
    assert rows["digits"][:2] == ["x".join(map(str, sizes[0][1:])) + ", 10", f"{sizes[0][0]:,}, {sizes[1][0]:,}"]


def test_models_are_those_of_the_code() -> None:
    rows, before = table("model"), ""
    assert list(rows) == list(MODELS)
    for name, (_, options) in rows.items():
        before = before if options == "the same" else options
        assert before == written(MODELS[name]), name
        size = re.search(r"width (\d+), (\d+) heads", rows[name][0])
        if size is not None:
            kind: Any = MODELS[name]
            assert (int(size[1]), int(size[2])) == (kind.default_width, kind.default_heads)


def test_the_trainer_is_looked_into_between_tasks() -> None:
    """The lines of the page, with a run of seconds in place of theirs, give the records of `run`."""
    torch.set_num_threads(1)
    (lines,) = re.findall(r"^    trainer = Trainer\(.*\n(?:    .*\n)+", TEXT, re.MULTILINE)
    config = RunConfig(**{**TINY, "tasks": 2, "method": "spectral"})
    looked: dict[str, Any] = {"records": [], "RunConfig": lambda **fields: config, "Trainer": Trainer}
    exec(re.sub(r"^    ", "", lines, flags=re.MULTILINE) + "    records.append(record)\n", looked)
    assert looked["trainer"].task == 2
    theirs = run(config)
    for ours, record in zip(looked["records"], theirs, strict=True):
        assert ours.keys() == record.keys()
        assert all(ours[key] == value for key, value in record.items() if not key.endswith("_seconds"))


def test_all_that_is_public_is_documented() -> None:
    without = []
    for name in continual.__all__:
        kind = getattr(continual, name)
        members = {} if not isinstance(kind, type) else {n: m for n, m in vars(kind).items() if n[0] != "_"}
        called = {n: m for n, m in members.items() if isinstance(m, property | classmethod) or inspect.isfunction(m)}
        # A method that is one of a base class is documented there.
        without += [f"{name}.{n}" for n in called if not inspect.getdoc(getattr(kind, n))]
        without += [] if inspect.getdoc(kind) else [name]
    assert without == []


@pytest.mark.parametrize("name", ["run", "run_together", "Trainer"])
def test_examples_need_no_other_names(name: str) -> None:
    """They train, and so are not run with those of other docstrings."""
    text = (inspect.getdoc(getattr(continual, name)) or "").partition("Example:\n")[2]
    used = [node for node in ast.walk(ast.parse(inspect.cleandoc(text))) if isinstance(node, ast.Name)]
    set_here = {node.id for node in used if isinstance(node.ctx, ast.Store)}
    assert used and {node.id for node in used} - set_here <= {*continual.__all__, *dir(builtins)}


def test_a_stream_and_a_model_of_one_s_own_are_run_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(Stream):
        def task(self, task: int, model: Any = None) -> Task:
            return Task(self.x, self.y)

    class Linear(MLP):
        def __init__(self, input_shape: tuple[int, ...], classes: int, *, bias: bool = True):
            super().__init__(input_shape, classes, hidden=())

    monkeypatch.setitem(STREAMS, "mine", Same)
    monkeypatch.setitem(MODELS, "mine", Linear)
    (record,) = run(RunConfig(stream="mine", model="mine", model_options={"bias": False}, **TINY))
    assert 0 <= record["accuracy"] <= 1 and record["held_out_accuracy"] is None


def test_by_rows_is_a_matter_of_the_class_that_forward_is_from() -> None:
    assert MLP.by_rows and not Model.by_rows
    assert [kind.by_rows for kind in MODELS.values()] == [name == "mlp" for name in MODELS]
