"""Help of options: as it stands under the fields, in whole lines, for every command of the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tyro

from spectral_ops import cli
from spectral_ops.continual.described import described
from spectral_ops.continual.field_texts import field_texts


@dataclass(frozen=True)
@described(names="Known: a, b.")
class Options:
    """Of a test."""

    names: tuple[str, ...] = ()
    """Names that are
    told."""
    limit: float | None = None
    """At most; default:
    none."""
    count: int = 3
    """How many."""
    untold: int = 4


def help_of(command, capsys: pytest.CaptureFixture[str]) -> str:
    """Every line as it is wrapped, without the frame."""
    with pytest.raises(SystemExit):
        command()
    return "\n".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())


def test_a_field_has_its_text_one_default_and_a_plain_value(capsys):
    text = help_of(lambda: tyro.cli(Options, args=["--help"]), capsys)
    assert "Names that are told. Known: a, b.\n" in text
    assert "--limit FLOAT" in text and "At most; default: none.\n" in text
    assert "How many. (default: 3)" in text and "(default: 4)" in text
    assert tyro.cli(Options, args=["--limit", "2", "--names", "x", "y"]) == Options(("x", "y"), 2.0)
    assert tyro.cli(Options, args=[]) == Options()
    assert field_texts(Options)["limit"].split() == ["At", "most;", "default:", "none."]


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("train", "Weight decay is a method: l2, or l2-decoupled, which makes AdamW of adam. (default: adam)"),
        ("compare", "up to 3 times faster, convolutions are not. Results are those of single runs"),
        ("sweep", "strength=1e-4,1e-3 and lr=1e-4,1e-3 are grids of its own, one value is fixed. Known: none, l2,"),
        ("ablate", "default: that of spectral in --config (best.toml of a sweep), else 1e-3.\n"),
        ("report", "those that an earlier report.md there shows are replaced. (default: runs/report)"),
        ("download", "None: the environment variable SPECTRAL_OPS_DATA.\n"),
    ],
)
def test_no_command_shows_two_defaults_or_breaks_its_lines(command, sentence, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # so that only a text's own line breaks are left
    text = help_of(lambda: cli.main([command, "--help"]), capsys)
    assert "None}" not in text and "(default: None)" not in text and "Default: " not in text
    assert sentence in text
