"""The script `spectral-ops`: where it finds modules, a command that there is not, a reader that goes away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import spectral_ops
from spectral_ops import cli

SCRIPT = "import sys\nfrom spectral_ops.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
METHOD = "from spectral_ops.continual.methods import Method\nclass Mine(Method):\n    pass\n"
TINY = "--data digits --samples 40 --held-out-samples 20 --steps 2 --tasks 1 --batch 8".split()


def script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run as installed: from a folder that is not the working directory."""
    file = folder / "bin" / "spectral-ops"
    file.parent.mkdir()
    file.write_text(SCRIPT)
    there = {"PYTHONPATH": str(Path(spectral_ops.__file__).parents[1])}  # and no empty entry, which is the folder too
    return subprocess.run(
        [sys.executable, str(file), *arguments],
        cwd=folder,
        env={**os.environ, **there, **environment},
        text=True,
        capture_output=True,
    )


@pytest.mark.slow
def test_methods_in_the_working_directory_are_found_by_the_script_and_its_workers(tmp_path):
    (tmp_path / "mymeth.py").write_text(METHOD)
    (tmp_path / "statistics.py").write_text("raise SystemExit('the folder was looked into first')")
    options = ["--methods", "mymeth:Mine", "--seeds", "10", "11", "--workers", "2", "--out", "out"]
    done = script(tmp_path, "compare", *options, *TINY)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs finished" in done.stdout


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    assert cli.main(["tran"]) == 2
    assert "got 'tran'. The nearest is 'train'.\n" in capsys.readouterr().err
    assert cli.main(["zzz"]) == 2
    assert "got 'zzz'. Name one of these.\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_what_a_value_looks_like_and_not_that_there_may_be_none(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: spectral-ops {command} " in text
    assert "{None}" not in text


@pytest.mark.parametrize("options", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_goes_away_is_no_traceback(options):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *options, "-m", "spectral_ops", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == cli.BROKEN_PIPE and done.stderr == ""


def test_a_pipe_of_something_else_that_breaks_is_told(monkeypatch, capsys):
    monkeypatch.setattr(cli, "usage", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["--help"])

    def breaks():
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(cli, "usage", breaks)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.main(["--help"])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python knows of no safe path before 3.11")
def test_a_safe_path_stays_safe(tmp_path):
    (tmp_path / "mymeth.py").write_text(METHOD)
    done = script(tmp_path, "train", "--method", "mymeth:Mine", "--out", "out", *TINY, PYTHONSAFEPATH="1")
    assert done.returncode == 2 and "No module named 'mymeth'" in done.stderr
