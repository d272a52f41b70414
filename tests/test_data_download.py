"""Downloads without a network: what is fetched, where it comes to lie, and what an interruption leaves."""

import hashlib
import io
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro

from spectral_ops.continual.data import DATASETS, download, load_dataset, tiny_imagenet
from spectral_ops.continual.data.download import DownloadConfig, download_dataset, fetch_with_pooch, unpack
from spectral_ops.continual.data.sources import SOURCES
from spectral_ops.continual.data.svhn import find_svhn


class Server:
    """A stand-in for the network: content by address; a call is one fetch, with pooch's check of the MD5."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.asked: list[str] = []

    def __call__(self, url: str, md5: str, path: Path) -> None:
        self.asked.append(url)
        if url not in self.content:
            raise ConnectionError("unreachable")
        if hashlib.md5(self.content[url]).hexdigest() != md5:
            raise ValueError("MD5 does not match the known hash")
        path.write_bytes(self.content[url])


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
BATCHES = {f"cifar-10-batches-py/{name}": name.encode() for name in (*CIFAR_FILES, "batches.meta")}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Serves the sets below in place of the originals, with their MD5 in SOURCES."""
    server = Server()
    replaced = {
        "mnist": [f"{source.file} here".encode() for source in SOURCES["mnist"]],
        "cifar-10": [tar(BATCHES)],
        "svhn": [b"train", b"test"],
        "tiny-imagenet": [
            zipped({"tiny-imagenet-200/wnids.txt": b"n", "tiny-imagenet-200/train/n/images/a.JPEG": b"a"})
        ],
    }
    for name, contents in replaced.items():
        local = tuple(source._replace(md5=md5(c), also={}) for source, c in zip(SOURCES[name], contents, strict=True))
        monkeypatch.setitem(SOURCES, name, local)
        server.content |= {source.urls[0]: content for source, content in zip(local, contents, strict=True)}
    return server


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_every_data_set_has_a_source_of_its_own_checksums():
    assert SOURCES.keys() == DATASETS.keys()
    every = {source.md5: source for group in SOURCES.values() for source in group}
    assert len(every) == 4 + 4 + 1 + 1 + 2 + 1  # the two readings of CIFAR-100 share one archive
    for checksum, source in every.items():
        assert len(checksum) == 32 and int(checksum, 16)
        assert len({url.rpartition("/")[2] for url in source.urls}) == 1 and all("://" in url for url in source.urls)
        assert source.archive == source.file.endswith((".tar.gz", ".zip"))


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_checksums_are_those_of_the_originals(data_root, name):
    for source in SOURCES[name]:
        assert md5((data_root / source.folder / source.file).read_bytes()) == source.md5
        assert source.is_there(data_root)


def test_files_come_to_lie_in_torchvisions_folders(tmp_path, server):
    root = tmp_path / "not" / "yet" / "there"
    assert len(download_dataset("mnist", root, server)) == 4
    stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    assert files(root) == {f"MNIST/raw/{stem}-ubyte.gz" for stem in stems}
    assert (root / "MNIST/raw/train-images-idx3-ubyte.gz").read_bytes() == b"train-images-idx3-ubyte.gz here"
    download_dataset("svhn", root, server)
    assert find_svhn(root, "train") == root / "train_32x32.mat" and find_svhn(root, "test").read_bytes() == b"test"
    assert [path.name for path in root.glob(".*")] == []  # nothing of the staging is left


def test_others_may_read_what_was_downloaded(tmp_path, server):
    def fetch(url, checksum, path):  # as pooch does, through a temporary file
        server(url, checksum, path)
        path.chmod(0o600)

    download_dataset("mnist", tmp_path, fetch)
    (tmp_path / "made").touch()
    usual = (tmp_path / "made").stat().st_mode
    assert all(path.stat().st_mode == usual for path in (tmp_path / "MNIST" / "raw").iterdir())


@pytest.mark.parametrize("name, expected", [("cifar-10", set(BATCHES)), ("tiny-imagenet", None)])
def test_archives_are_unpacked(tmp_path, server, name, expected):
    assert download_dataset(name, tmp_path, server) == [SOURCES[name][0].file]
    expected = expected or {"tiny-imagenet-200/wnids.txt", "tiny-imagenet-200/train/n/images/a.JPEG"}
    assert files(tmp_path) == expected  # neither the archive nor the staging


def test_what_is_there_is_neither_fetched_nor_overwritten(tmp_path, server):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte").write_bytes(b"mine")  # not compressed
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"mine")
    fetched = download_dataset("mnist", tmp_path, server)
    assert fetched == ["train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    assert (folder / "t10k-images-idx3-ubyte.gz").read_bytes() == b"mine"
    server.asked.clear()
    assert download_dataset("mnist", tmp_path, server) == [] and server.asked == []
    assert download_dataset("digits", tmp_path, server) == []


def test_a_folder_with_files_missing_is_filled_up(tmp_path, server):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"mine")
    (folder / "notes").write_bytes(b"kept")
    assert download_dataset("cifar-10", tmp_path, server)
    assert files(folder) == {*CIFAR_FILES, "batches.meta", "notes"}
    assert (folder / "data_batch_1").read_bytes() == b"mine" and (folder / "test_batch").read_bytes() == b"test_batch"
    assert download_dataset("cifar-10", tmp_path, server) == []


def test_the_binary_layout_is_complete_too(tmp_path, server):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in CIFAR_FILES:
        (folder / f"{name}.bin").write_bytes(b"")
    assert download_dataset("cifar-10", tmp_path, server) == []


def test_mirrors_are_tried_in_turn(tmp_path, server):
    for source in SOURCES["mnist"]:
        first, second = source.urls
        server.content[second] = server.content.pop(first)
    server.content[SOURCES["mnist"][1].urls[0]] = b"<!DOCTYPE html>"  # of another MD5
    assert len(download_dataset("mnist", tmp_path, server)) == 4
    assert server.asked == [url for source in SOURCES["mnist"] for url in source.urls]
    assert (tmp_path / "MNIST/raw/train-labels-idx1-ubyte.gz").read_bytes() == b"train-labels-idx1-ubyte.gz here"


def test_failure_of_every_address_is_told(tmp_path, server):
    server.content = {url: b"altered" for url in server.content}
    with pytest.raises(OSError, match="expected train-images-idx3-ubyte.gz with MD5 [0-9a-f]{32}, got ") as caught:
        download_dataset("mnist", tmp_path, server)
    said = str(caught.value)
    assert "ValueError: MD5 does not match" in said and "ConnectionError: unreachable (http://yann" in said
    assert said.endswith(f"fetch it by other means and put it into {tmp_path / 'MNIST/raw'}.")
    with pytest.raises(OSError, match=f"fetch it by other means and unpack it in {tmp_path}"):
        download_dataset("cifar-10", tmp_path, server)
    assert files(tmp_path) == set()


def stop_while_fetching(monkeypatch: pytest.MonkeyPatch, server: Server) -> Callable[[str, str, Path], None]:
    def fetch(url: str, md5: str, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    return fetch


def stop_while_unpacking(monkeypatch: pytest.MonkeyPatch, server: Server) -> Callable[[str, str, Path], None]:
    copies = []

    def copy(source: object, target: object) -> None:
        copies.append(source)
        if len(copies) == 3:
            raise KeyboardInterrupt
        shutil.copyfileobj(source, target)

    monkeypatch.setattr(download, "copyfileobj", copy)
    return server


@pytest.mark.parametrize("stop", [stop_while_fetching, stop_while_unpacking])
def test_an_interrupted_download_leaves_nothing_and_is_redone(tmp_path, server, monkeypatch, stop):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        download_dataset("cifar-10", tmp_path, stop(patch, server))
    assert list(tmp_path.iterdir()) == []
    assert download_dataset("cifar-10", tmp_path, server)
    assert files(tmp_path) == set(BATCHES)


def test_what_a_killed_download_leaves_is_not_taken_for_the_data(tmp_path, server):
    staging = tmp_path / ".download-x" / "unpacked" / "cifar-10-batches-py"
    staging.mkdir(parents=True)
    (staging / "data_batch_1").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        load_dataset("cifar-10", tmp_path, samples=1)
    assert download_dataset("cifar-10", tmp_path, server)


OUTSIDE = [
    "../evil",
    "cifar/../../evil",
    "/tmp/evil",
    "elsewhere/evil",
    "cifar",
    "cifar/..\\..\\evil",
    "./../cifar/evil",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("pack, suffix", [(tar, ".tar.gz"), (zipped, ".zip")])
def test_archives_write_nothing_outside_of_their_folder(tmp_path, name, pack, suffix):
    archive = tmp_path / f"archive{suffix}"
    archive.write_bytes(pack({"cifar/good": b"1", name: b"2"}))
    with pytest.raises(
        ValueError, match=rf"expected archive{suffix} to hold plain files in cifar/ alone, got '.*\. It is"
    ):
        unpack(archive, tmp_path / "deep" / "target", "cifar")
    assert files(tmp_path) == {archive.name, "deep/target/cifar/good"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("cifar/link")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ValueError, match="hold plain files in cifar/ alone, got 'cifar/link'"):
        unpack(tmp_path / "archive.tar.gz", tmp_path / "target", "cifar")
    assert files(tmp_path) == {"archive.tar.gz"}


def test_folders_in_archives_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        (tmp_path / "cifar" / "empty").mkdir(parents=True)
        archive.add(tmp_path / "cifar", "cifar")
    unpack(tmp_path / "archive.tar.gz", tmp_path / "target", "cifar")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("cifar/", b"")
    unpack(tmp_path / "archive.zip", tmp_path / "target", "cifar")
    assert files(tmp_path) == {"archive.tar.gz", "archive.zip"}


def test_tiny_imagenet_is_complete_with_all_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_imagenet, "_CLASSES", 2)
    monkeypatch.setattr(tiny_imagenet, "_TRAIN_PER_CLASS", 3)
    monkeypatch.setattr(tiny_imagenet, "_VALIDATION", 2)
    folder, wnids = tmp_path / tiny_imagenet.FOLDER, ("n00000001", "n00000002")
    needed = [folder / "train" / w / "images" / f"{w}_{k}.JPEG" for w in wnids for k in range(3)]
    needed += [folder / "val" / "images" / f"val_{k}.JPEG" for k in range(2)]
    lists = {
        folder / "wnids.txt": "\n".join(wnids),
        folder / "val" / "val_annotations.txt": "".join(f"val_{k}.JPEG\t{w}\n" for k, w in enumerate(wnids)),
    }
    assert not tiny_imagenet.is_complete(tmp_path)
    for path in (*needed, *lists):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lists.get(path, ""))
    assert tiny_imagenet.is_complete(tmp_path)
    for path in (*needed, *lists):
        text = path.read_text()
        path.unlink()
        assert not tiny_imagenet.is_complete(tmp_path), path
        path.write_text(text)
    (folder / "wnids.txt").write_text(wnids[0])
    (folder / "val" / "val_annotations.txt").write_text("".join(f"val_{k}.JPEG\t{wnids[0]}\n" for k in range(2)))
    assert not tiny_imagenet.is_complete(tmp_path)  # all there is of one class is not all classes


def test_unknown_name_is_refused(tmp_path, server):
    with pytest.raises(
        ValueError, match="data: expected one of digits, mnist, .* got 'cifar10'. The nearest is 'cifar-10'"
    ):
        download_dataset("cifar10", tmp_path, server)


def pooch_stand_in(calls: list[tuple[str, dict[str, object]]]) -> SimpleNamespace:
    return SimpleNamespace(retrieve=lambda url, **options: calls.append((url, options)))


def test_pooch_is_given_checksum_path_and_bar(tmp_path, monkeypatch):
    calls: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setitem(sys.modules, "pooch", pooch_stand_in(calls))
    fetch_with_pooch("https://a/b.gz", "0" * 32, tmp_path / "b.gz")
    options = {"known_hash": "md5:" + "0" * 32, "fname": "b.gz", "path": tmp_path, "progressbar": True}
    assert calls == [("https://a/b.gz", options)]


@pytest.mark.parametrize("module", ["pooch", "tqdm"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "pooch", pooch_stand_in([]))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=rf"download: expected {module} .* pip install '.\[continual\]'"):
        download_dataset("mnist", tmp_path)
    assert files(tmp_path) == set()


def test_load_dataset_downloads_only_when_told_to(tmp_path, monkeypatch):
    asked: list[tuple[str, Path]] = []
    monkeypatch.setattr(download, "download_dataset", lambda name, root: asked.append((name, root)))
    for ask in (False, True):
        with pytest.raises(FileNotFoundError):
            load_dataset("mnist", tmp_path, download=ask)
        assert asked == [("mnist", tmp_path)] * ask
    monkeypatch.setenv("SPECTRAL_OPS_DATA", str(tmp_path / "variable"))
    with pytest.raises(FileNotFoundError):
        load_dataset("svhn", download=True)
    assert asked[1:] == [("svhn", tmp_path / "variable")]


def run(monkeypatch: pytest.MonkeyPatch, fetch: object, config: DownloadConfig) -> int:
    monkeypatch.setattr(download, "download_dataset", lambda name, root: download_dataset(name, root, fetch))
    return download.main(config)


def test_the_command_says_what_it_did(tmp_path, server, monkeypatch, capsys):
    assert run(monkeypatch, server, DownloadConfig("svhn", tmp_path)) == 0
    assert capsys.readouterr().out == f"svhn: train_32x32.mat, test_32x32.mat fetched into {tmp_path}.\n"
    monkeypatch.setenv("SPECTRAL_OPS_DATA", str(tmp_path))
    assert run(monkeypatch, server, DownloadConfig("svhn")) == 0
    assert capsys.readouterr().out == "svhn: nothing to fetch, all of it is there.\n"


def test_a_damaged_file_is_not_said_to_be_there(tmp_path, server, monkeypatch, capsys):
    """What a reader's "fetch it again" leads to: the file is named, kept until it is moved away, then fetched."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    broken = folder / "train-images-idx3-ubyte.gz"
    broken.write_bytes(b"train-images-idx3-ub")
    for fetched in (3, 0):
        assert run(monkeypatch, server, DownloadConfig("mnist", tmp_path)) == 2
        captured = capsys.readouterr()
        assert captured.out.count(".gz") == fetched and "nothing to fetch" not in captured.out
        assert captured.err.startswith(f"download: expected {broken} with MD5 ") and captured.err.count("\n") == 1
        assert "move it away and give the command again" in captured.err
    broken.unlink()
    assert run(monkeypatch, server, DownloadConfig("mnist", tmp_path)) == 0
    assert broken.read_bytes() == b"train-images-idx3-ubyte.gz here"


def test_the_command_fails_with_a_line_and_a_status(tmp_path, server, monkeypatch, capsys):
    assert run(monkeypatch, server, DownloadConfig("svnh", tmp_path)) == 2
    assert capsys.readouterr().err.startswith("data: expected one of digits, ")
    server.content.clear()
    assert run(monkeypatch, server, DownloadConfig("svhn", tmp_path)) == 2
    assert capsys.readouterr().err.startswith("download: expected train_32x32.mat with MD5 ")
    monkeypatch.delenv("SPECTRAL_OPS_DATA", raising=False)
    assert run(monkeypatch, server, DownloadConfig("svhn")) == 2
    assert "got root=None and SPECTRAL_OPS_DATA unset" in capsys.readouterr().err
    stop = stop_while_fetching(monkeypatch, server)
    assert run(monkeypatch, stop, DownloadConfig("svhn", tmp_path)) == 130
    assert capsys.readouterr().err.startswith("Interrupted. Files that were complete are kept")


def test_the_command_line_takes_a_name_and_a_root(tmp_path):
    def main(config: DownloadConfig) -> DownloadConfig:
        return config

    command = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(main)
    config = tyro.cli(command, args=["cifar-10", "--data-root", str(tmp_path)])
    assert config == DownloadConfig("cifar-10", tmp_path)


def test_a_wrong_name_comes_before_a_missing_root(monkeypatch, capsys):
    monkeypatch.delenv("SPECTRAL_OPS_DATA", raising=False)
    assert download.main(DownloadConfig(name="cifar")) == 2
    assert "cifar-10" in capsys.readouterr().err
    assert download.main(DownloadConfig(name="cifar-10")) == 2
    said = capsys.readouterr().err
    assert "Set SPECTRAL_OPS_DATA (or pass --data-root) to the folder of the data sets" in said and "MNIST" not in said
