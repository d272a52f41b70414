"""RunConfig: what help() says of it."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest

from spectral_ops.continual import config, run
from spectral_ops.continual.config import RANGES, RunConfig
from spectral_ops.continual.data import DATASETS
from spectral_ops.continual.methods import METHODS
from spectral_ops.continual.models import MODELS
from spectral_ops.continual.streams import STREAMS
from spectral_ops.continual.streams.stream import task_batches


def shown() -> dict[str, str]:
    """The entry of every field in help(RunConfig), on one line."""
    lines = [line.removeprefix(" |  ") for line in pydoc.plain(pydoc.render_doc(RunConfig)).splitlines()]
    begin = lines.index("Args:")
    entries: list[str] = []
    for line in lines[begin + 1 : lines.index("Methods defined here:")]:
        if line.startswith(" " * 8):
            entries[-1] += " " + line.strip()
        elif line.strip():
            entries.append(line.strip())
    return {entry.partition(" ")[0]: entry for entry in entries}


def test_help_shows_every_field_with_type_default_and_text() -> None:
    entries = shown()
    assert list(entries) == [field.name for field in fields(RunConfig)]
    for field in fields(RunConfig):
        default: Any = {} if field.default is MISSING else field.default
        assert entries[field.name].startswith(f"{field.name} ({field.type}, default {default!r}): "), field.name
        assert len(entries[field.name].partition("): ")[2]) >= 10, field.name
    assert entries["lr"] == "lr (float, default 0.001): Learning rate. From 0 to 100."
    assert "Optimizer steps per task. At least 1." in entries["steps"]
    assert max(map(len, (RunConfig.__doc__ or "").splitlines())) <= 116


@pytest.mark.parametrize(
    ("name", "known"), [("stream", STREAMS), ("data", DATASETS), ("model", MODELS), ("method", METHODS)]
)
def test_help_names_all_there_are(name: str, known: dict[str, Any]) -> None:
    text = shown()[name].partition(": ")[2].partition(": ")[2].partition(";")[0].rstrip(".")
    assert text.replace(" or ", ", ").split(", ") == list(known), f"the text under RunConfig.{name} is to be completed"


def test_what_is_said_of_a_large_batch_and_of_held_out_samples_is_so() -> None:
    assert "More than the task has, and some count several times in a step." in shown()["batch"]
    for rows in task_batches(seed=3, task=1, samples=7, steps=4, batch=20):
        assert {2, 3} <= set(rows.bincount(minlength=7).tolist()) <= {2, 3, 4}
    assert "A stream that holds nothing out, as random-labels, does not look at it." in shown()["held_out_samples"]
    assert not STREAMS["random-labels"].holds_out
    config = RunConfig(data="digits", tasks=1, samples=40, steps=1, batch=50, held_out_samples=10**7)
    assert run(config)[0]["held_out_accuracy"] is None
    with pytest.raises(ValueError, match="expected samples <= 300, the images of digits"):
        run(replace(config, stream="next-label"))


def test_ranges_are_of_fields() -> None:
    assert set(RANGES) <= {field.name for field in fields(RunConfig)}


def test_without_its_source_it_can_be_imported() -> None:
    code = (
        "import inspect, spectral_ops.continual.field_texts\n"
        "def none(*_): raise OSError('could not get source code')\n"
        "inspect.getsource = none\n"
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('alone', {config.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['alone'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print(module.RunConfig.__doc__)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "One network trained on one stream of tasks by one method.\n"
