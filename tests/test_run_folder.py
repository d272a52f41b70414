"""The folder of a run: what may be in it, and a log that is never half a line longer than what is safe."""

import contextlib
import errno
import json
import threading
from pathlib import Path

import pytest
from ensemble_samples import SMALL

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.lock import locked
from spectral_ops.continual.run_folder import Log, check_folder, from_json, make_folder, read_run, to_json, write_text
from spectral_ops.continual.trainer import run

CONFIG = RunConfig(data="digits", options={"a": (1, 2)}, tasks=2)


def logged(folder, *records):
    folder.mkdir(exist_ok=True)
    log = Log(folder)
    log.write({"kind": "header", "config": to_json(CONFIG)})
    for record in records:
        log.write(record)
    log.close()


def test_a_new_folder_holds_the_whole_configuration(tmp_path):
    assert check_folder(tmp_path / "a" / "b", CONFIG, resume=False) is False
    assert not (tmp_path / "a").exists()
    make_folder(tmp_path / "a" / "b", CONFIG)
    content = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert content == to_json(CONFIG) and content["options"] == {"a": [1, 2]} and content["lr"] == 1e-3
    assert from_json(content) == RunConfig(data="digits", options={"a": [1, 2]}, tasks=2)


def test_a_field_of_another_version_is_refused():
    with pytest.raises(ValueError, match="expected the fields of this version, got colour beside them"):
        from_json({**to_json(CONFIG), "colour": 1})


def test_a_run_of_another_configuration_is_refused_with_the_difference(tmp_path):
    make_folder(tmp_path, CONFIG)
    other = RunConfig(data="digits", options={"a": (1, 2)}, tasks=3, lr=0.1)
    with pytest.raises(ValueError, match=r"lr: 0\.001 there, 0\.1 here; tasks: 2 there, 3 here"):
        check_folder(tmp_path, other, resume=True)


def test_where_data_lie_is_not_of_the_configuration(tmp_path):
    make_folder(tmp_path, CONFIG)
    moved = RunConfig(data="digits", options={"a": (1, 2)}, tasks=2, data_root=tmp_path, checkpoint_seconds=1.0)
    assert check_folder(tmp_path, moved, resume=True) is False


def test_an_unfinished_run_goes_on_only_when_asked_to(tmp_path):
    make_folder(tmp_path, CONFIG)
    logged(tmp_path, {"kind": "task", "task": 0})
    with pytest.raises(ValueError, match=r"expected .* to be empty or finished, got an unfinished run\. Pass --resume"):
        check_folder(tmp_path, CONFIG, resume=False)
    assert check_folder(tmp_path, CONFIG, resume=True) is True


@pytest.mark.parametrize("log", ["", '{"kind": "hea'])
def test_a_run_without_a_whole_header_has_not_begun(tmp_path, log):
    make_folder(tmp_path, CONFIG)
    (tmp_path / "log.jsonl").write_text(log)
    assert check_folder(tmp_path, CONFIG, resume=False) is False
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"")  # then it had
    with pytest.raises(ValueError, match="to begin with a header"):
        check_folder(tmp_path, CONFIG, resume=False)


def test_a_log_begins_with_its_header(tmp_path):
    logged(tmp_path, {"kind": "task", "task": 0})
    log = Log.begin(tmp_path, {"kind": "header", "name": "\xe9"})
    assert read_run(tmp_path).header == {"kind": "header", "name": "\xe9"}
    assert log.size == len((tmp_path / "log.jsonl").read_bytes())
    log.write({"kind": "task", "task": 0})
    log.close()
    assert len(read_run(tmp_path).tasks) == 1


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="to be empty or a run's, got logs of something else"):
        check_folder(tmp_path, CONFIG, resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json to be JSON"):
        check_folder(tmp_path, CONFIG, resume=True)


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.previous.pt"])
def test_somebody_elses_checkpoint_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"to be empty or a run's, got {name} without config\.json"):
        run(CONFIG, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("below", [(), ("a", "b")])
def test_a_file_is_no_folder(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file.* to be a folder, got .*file, which is a file\. Choose another"):
        run(CONFIG, (tmp_path / "file").joinpath(*below), resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "config.json to be JSON, got 'utf-8' codec can't decode"),
        (b"[1, 2]", r"config.json to hold the options of a run, got \[1, 2\]"),
    ],
)
def test_a_configuration_that_is_none_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{message}.*Choose another folder"):
        run(CONFIG, tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_log_is_read_back(tmp_path):
    logged(tmp_path, {"kind": "task", "task": 0, "loss": float("nan"), "sigma": {"a": float("inf")}}, {"kind": "end"})
    run = read_run(tmp_path)
    assert run.finished and run.config == to_json(CONFIG)
    assert run.tasks == [{"kind": "task", "task": 0, "loss": None, "sigma": {"a": None}}]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    logged(tmp_path, {"kind": "task", "task": 0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "ta')
    run = read_run(tmp_path)
    assert len(run.tasks) == 1 and not run.finished


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "to begin with a header"),
        (b'{"kind": "task"}\n', "to begin with a header"),
        (b"\xff\xfe\n", r"log\.jsonl to be text in UTF-8, got 'utf-8' codec .*Restore the file"),
        (b'{"kind": "header"}\nx\n{"kind": "end"}\n', "line 2 of .* to be JSON, got 'x'"),
    ],
)
def test_a_damaged_log_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_no_log_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a log at .*log\.jsonl, got none"):
        read_run(tmp_path)


def test_what_came_after_the_checkpoint_is_cut_off(tmp_path):
    logged(tmp_path, {"kind": "task", "task": 0})
    log = Log(tmp_path, len((tmp_path / "log.jsonl").read_bytes()))
    size = log.size
    log.write({"kind": "task", "task": 1})
    log.close()
    log = Log(tmp_path, size)
    assert log.size == size  # what a checkpoint before the next line would hold
    log.write({"kind": "task", "task": 1, "again": True})
    assert log.size == len((tmp_path / "log.jsonl").read_bytes())
    log.close()
    assert read_run(tmp_path).tasks == [{"kind": "task", "task": 0}, {"kind": "task", "task": 1, "again": True}]


def test_a_log_shorter_than_the_checkpoint_knows_is_refused(tmp_path):
    logged(tmp_path)
    content = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"to hold the 10000 bytes that the checkpoint knows of, got {len(content)}"):
        Log(tmp_path, 10_000)
    assert (tmp_path / "log.jsonl").read_bytes() == content


def test_a_file_is_written_whole(tmp_path):
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def full(monkeypatch):
    """Within `with full():` files cannot grow, as on a full disk."""
    resource = pytest.importorskip("resource", reason="no limits of this kind on this system")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


FULL = r"^write: expected {} to be writable with space for it, got .*File too large.*run again.*--resume"


def test_a_full_disk_is_reported_with_the_file_and_leaves_it(tmp_path, full):
    write_text(tmp_path / "a", "one")
    with pytest.raises(OSError, match=FULL.format(tmp_path / "a")), full():
        write_text(tmp_path / "a", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "one"


@pytest.mark.parametrize("room", ["never", "later"])
def test_a_full_disk_is_reported_with_the_log(tmp_path, full, room):
    logged(tmp_path, {"kind": "task", "task": 0})
    before = (tmp_path / "log.jsonl").read_bytes()
    log = Log(tmp_path, len(before))
    with pytest.raises(OSError, match=FULL.format(tmp_path / "log.jsonl")), full():
        with contextlib.closing(log) if room == "never" else contextlib.nullcontext():
            log.write({"kind": "task", "task": 1})
    log.close()
    assert [task["task"] for task in read_run(tmp_path).tasks] == [0] + [1] * (room == "later")
    log = Log(tmp_path, len(before))  # as a resume does
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_full_disk_at_the_beginning_leaves_a_run_that_begins_again(tmp_path, full):
    with pytest.raises(OSError, match=FULL.format(tmp_path / "run" / "config.json")), full():
        run(SMALL, tmp_path / "run")
    assert check_folder(tmp_path / "run", SMALL, resume=False) is False
    assert len(run(SMALL, tmp_path / "run")) == SMALL.tasks


@pytest.mark.parametrize("name", ["mkdir", "open"])  # of the folder, of its lock
def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch, name):
    def forbidden(*_, **__):  # root, which tests may be, may do anything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, name, forbidden)
    message = rf"^write: expected {tmp_path / 'run'} to be writable .*, got .*Permission denied\. .* or allow it"
    with pytest.raises(OSError, match=message):
        with locked(tmp_path / "run", threading.Event()):
            pass
