"""The folder of a run: its configuration, its log, and what may be done with it.

config.json                 every option of the run
log.jsonl                   a header, a line for each task, and an end where the run is finished
checkpoint.pt, checkpoint.previous.pt; checkpoint.damaged.pt where one could not be read
lock                        held by the process that writes the others
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from spectral_ops.continual.checkpoint import CURRENT, PREVIOUS
from spectral_ops.continual.config import RunConfig

CONFIG, LOG = "config.json", "log.jsonl"
# They decide where data lie and how often a run is saved, not what it computes.
NOT_OF_THE_RUN = ("data_root", "checkpoint_seconds")

Record = dict[str, Any]


class Run(NamedTuple):
    """A run's log: `end` is None where it was not finished."""

    folder: Path
    header: Record
    tasks: list[Record]
    end: Record | None

    @property
    def config(self) -> dict[str, Any]:
        """The fields of its `RunConfig` as JSON has them, paths as text."""
        return self.header["config"]

    @property
    def finished(self) -> bool:
        """Whether all of its tasks are in the log."""
        return self.end is not None


def read_run(folder: str | os.PathLike[str]) -> Run:
    """The run in a folder, finished or not. A last line cut off by a crash is left out.

    Raises:
        FileNotFoundError: no log there.
        ValueError: the log does not begin with a header, an earlier line is not JSON, or it is no text at all.
    """
    path = Path(folder) / LOG
    if not path.is_file():
        raise FileNotFoundError(f"read_run: expected a log at {path}, got none. Name the folder of a run.")
    records: list[Record] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"read_run: expected {path} to be text in UTF-8, got {error}. Restore the file, or delete the folder and "
            "run again."
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"read_run: expected line {number} of {path} to be JSON, got {line[:40]!r}. Restore the file, or "
                "delete the folder and run again."
            ) from error
    if not records or records[0].get("kind") != "header":
        raise ValueError(
            f"read_run: expected {path} to begin with a header, got {str(records[:1])[:60]}. Delete the folder and run "
            "again."
        )
    end = next((r for r in records if r["kind"] == "end"), None)
    return Run(Path(folder), records[0], [r for r in records if r["kind"] == "task"], end)


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON has it: paths as text, tuples as lists."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return json.loads(json.dumps(plain))


def from_json(content: Mapping[str, Any]) -> RunConfig:
    """The configuration written by `to_json`. ValueError for fields that this version does not know."""
    unknown = set(content) - {field.name for field in fields(RunConfig)}
    if unknown:
        raise ValueError(
            f"config: expected the fields of this version, got {', '.join(sorted(unknown))} beside them. "
            "Use the version that wrote it."
        )
    root = content.get("data_root")
    return RunConfig(**{**content, "data_root": None if root is None else Path(root)})


def check_folder(folder: Path, config: RunConfig, *, resume: bool) -> bool:
    """Whether a run of this configuration is in the folder already. Nothing is written.

    Raises:
        ValueError: a run of another configuration, or one that is not finished and resume is not asked for; files of
            something else; a path that is no folder's.
    """
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"run: expected {folder} to be a folder, got {file}, which is a file. Choose another folder.")
    path = folder / CONFIG
    if path.exists():
        try:
            there = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"run: expected {path} to be JSON, got {error}. Choose another folder.") from error
        if not isinstance(there, dict):
            raise ValueError(
                f"run: expected {path} to hold the options of a run, got {str(there)[:60]}. Choose another folder."
            )
        new = to_json(config)
        keys = sorted(set(there) | set(new))
        other = [key for key in keys if key not in NOT_OF_THE_RUN and there.get(key) != new.get(key)]
        if other:
            shown = "; ".join(f"{key}: {there.get(key)!r} there, {new.get(key)!r} here" for key in other)
            raise ValueError(
                f"run: expected {folder} to be empty or to hold a run of this configuration, got one of another "
                f"({shown}). Choose another folder."
            )
        if _begun(folder):
            if not resume and not read_run(folder).finished:
                raise ValueError(
                    f"run: expected {folder} to be empty or finished, got an unfinished run. Pass --resume to go on "
                    "with it, or choose another folder."
                )
            return True
    elif any(folder.glob("*.jsonl")):
        raise ValueError(f"run: expected {folder} to be empty or a run's, got logs of something else. Choose another.")
    elif others := [name for name in (CURRENT, PREVIOUS) if (folder / name).exists()]:
        raise ValueError(
            f"run: expected {folder} to be empty or a run's, got {', '.join(others)} without {CONFIG}. Choose another "
            f"folder, or restore {CONFIG}."
        )
    return False


def _begun(folder: Path) -> bool:
    """Whether there is anything to go on with. Logs that were not begun by `Log.begin` may lack a whole header."""
    path = folder / LOG
    if not path.exists():
        return False
    with path.open("rb") as file:
        whole = file.readline().endswith(b"\n")
    return whole or any((folder / name).exists() for name in (CURRENT, PREVIOUS))


def make_folder(folder: Path, config: RunConfig) -> None:
    """The folder with its config.json. OSError where it cannot be made or written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, json.dumps(to_json(config), indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """The whole file or none of it, whatever happens meanwhile. OSError where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()  # the disk may be full
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError in here says what to do, and for which path: that of a full disk is raised by writes, which know none.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"write: expected {path} to be writable with space for it, got {error}. Make room there or allow it, then "
            "run again, an unfinished run with --resume: what was saved of it is as it was."
        ) from error


class Log:
    """The log of a run that is going on. Lines are there as soon as they are written; `size` is what is safe.

    Args:
        size: bytes to keep of what is there; what a run that was cut off wrote after its checkpoint comes again.

    Raises:
        ValueError: there are fewer, so that tasks would be missing.
    """

    def __init__(self, folder: Path, size: int = 0):
        self.path = folder / LOG
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < size:
            raise ValueError(
                f"run: expected {self.path} to hold the {size} bytes that the checkpoint knows of, got {there}. "
                "Restore the file, or delete the folder and run again."
            )
        with writing(self.path):
            self._file = self.path.open("ab")
            self._file.truncate(size)
        self._file.seek(size)  # where the next line goes in any case; `size` asks for the place

    @classmethod
    def begin(cls, folder: Path, header: Record) -> Log:
        """A new log in place of what is there. It has its header from its first moment on: a crash leaves no empty one,
        which `read_run` refuses."""
        text = _line(header)
        write_text(folder / LOG, text)
        return cls(folder, len(text))

    @property
    def size(self) -> int:
        """Bytes, all of them on the disk."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def write(self, record: Record) -> None:
        line = _line(record).encode()
        with writing(self.path):
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        with writing(self.path):  # what could not be written is tried once more
            self._file.close()


def _line(record: Record) -> str:
    return json.dumps(plain(record), allow_nan=False) + "\n"  # ASCII: as many bytes as characters


def plain(value: Any) -> Any:
    """The value as JSON has it: null for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
