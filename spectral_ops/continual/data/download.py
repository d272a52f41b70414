"""`spectral-ops download`: fetches a data set into the folders that torchvision writes.

Everything is fetched, checked and unpacked in a hidden folder of the data root and only then moved into place, so that
what is in place is complete. What is there already is kept, never overwritten; the command says which files are not the
originals.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import IO

import tyro

from spectral_ops.continual.choices import choose
from spectral_ops.continual.data.root import choose_data_root
from spectral_ops.continual.data.sources import SOURCES, Source
from spectral_ops.continual.described import described
from spectral_ops.continual.optional import require

_BLOCK = 1 << 20  # bytes read at once

# (address, MD5, path): writes the file at `path`; OSError or ValueError when that fails or the MD5 is another.
Fetch = Callable[[str, str, Path], None]


@dataclass(frozen=True)
@described()
class DownloadConfig:
    """Fetch a data set, check it against the published checksums and put it where the readers look."""

    name: tyro.conf.Positional[str]
    """mnist, fashion-mnist, cifar-10, cifar-100, svhn or tiny-imagenet."""
    data_root: Path | None = None
    """Folder of the data sets, made where it is missing; None: the environment variable SPECTRAL_OPS_DATA."""


def main(config: DownloadConfig) -> int:
    """Fetch a data set, check it against the published checksums and put it where the readers look."""
    try:
        choose("data", config.name, SOURCES)  # a wrong name first, whatever the root
        root = choose_data_root(config.data_root)
        fetched = download_dataset(config.name, root)
        differing = altered(config.name, root)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Files that were complete are kept, the next call fetches the others.", file=sys.stderr)
        return 130
    if differing:
        if fetched:
            print(f"{config.name}: {', '.join(fetched)} fetched into {root}.")
        print("\n".join(differing), file=sys.stderr)
        return 2
    done = f"{', '.join(fetched)} fetched into {root}" if fetched else "nothing to fetch, all of it is there"
    print(f"{config.name}: {done}.")
    return 0


def fetch_with_pooch(url: str, md5: str, path: Path) -> None:
    """Download `url` to `path` with a progress bar and check its MD5."""
    pooch = require("pooch", "download")
    require("tqdm", "download")  # pooch draws its bar with it
    pooch.retrieve(url, known_hash=f"md5:{md5}", fname=path.name, path=path.parent, progressbar=True)


def download_dataset(name: str, root: Path, fetch: Fetch = fetch_with_pooch) -> list[str]:
    """The files of a data set that had to be fetched; none where all of it is there.

    Args:
        name: of the data set.
        root: the data root, made where it is missing.
        fetch: how one file is fetched.

    Raises:
        ValueError: an unknown name, or an archive with a path outside of its folder.
        RuntimeError: pooch is missing and something has to be fetched.
        OSError: no address gave the file with its checksum, or it cannot be written.

    Example:
        download_dataset("mnist", Path("/data"))      # /data/MNIST/raw/train-images-idx3-ubyte.gz and three others
    """
    missing = [source for source in choose("data", name, SOURCES) if not source.is_there(root)]
    for source in missing:
        root.mkdir(parents=True, exist_ok=True)
        # In the root, since only within a file system is moving a rename.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as staging:
            _download(source, root, Path(staging), fetch)
    return [source.file for source in missing]


def altered(name: str, root: Path) -> list[str]:
    """A line for each file in place that is not the original; files whose MD5 is not known are not looked at."""
    lines = []
    for source in choose("data", name, SOURCES):
        for file, md5 in source.originals.items():
            path = root / file
            if path.is_file() and (got := _md5_of(path)) != md5:
                lines.append(
                    f"download: expected {path} with MD5 {md5}, got {got}. It is kept, and something else or damaged: "
                    "to have the original move it away and give the command again."
                )
    return lines


def _md5_of(path: Path) -> str:
    made = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            made.update(block)
    return made.hexdigest()


def _download(source: Source, root: Path, staging: Path, fetch: Fetch) -> None:
    file = staging / source.file
    _fetch_from_any(source, root, file, fetch)
    if source.archive:
        unpacked = staging / "unpacked"
        unpack(file, unpacked, source.folder)
        _move(unpacked / source.folder, root / source.folder)
    else:
        (root / source.folder).mkdir(parents=True, exist_ok=True)
        file.chmod(0o666 & ~_umask())  # a temporary file, as fetched, is its owner's alone
        _move(file, root / source.folder / source.file)


def _fetch_from_any(source: Source, root: Path, file: Path, fetch: Fetch) -> None:
    failures = []
    for url in source.urls:
        try:
            return fetch(url, source.md5, file)
        except (OSError, ValueError) as error:  # requests' errors are OSError
            failures.append(f"{type(error).__name__}: {error} ({url})")
    action = "unpack it in" if source.archive else "put it into"
    raise OSError(
        f"download: expected {source.file} with MD5 {source.md5}, got {'; '.join(failures)}. "
        f"Try again later, or fetch it by other means and {action} {root if source.archive else root / source.folder}."
    )


def unpack(archive: Path, target: Path, folder: str) -> None:
    """Unpack the files of a .zip or .tar.gz into `target`.

    Raises:
        ValueError: a member that is no plain file, or lies outside of `folder`; those before it have been written.
    """
    for name, content in _zip_files(archive) if archive.suffix == ".zip" else _tar_files(archive):
        parts = PurePosixPath(name).parts
        if content is None or "\\" in name or ".." in parts or len(parts) < 2 or parts[0] != folder:
            raise ValueError(
                f"download: expected {archive.name} to hold plain files in {folder}/ alone, got {name!r}. "
                "It is not the original archive: fetch that by other means."
            )
        path = target.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            copyfileobj(content, file)


def _tar_files(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isdir():
                yield member.name, tar.extractfile(member) if member.isfile() else None


def _zip_files(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    with zipfile.ZipFile(archive) as files:
        for member in files.infolist():
            if not member.is_dir():
                with files.open(member) as content:
                    yield member.filename, content


def _umask() -> int:
    """Of this process, which says it only in exchange for another."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _move(staged: Path, target: Path) -> None:
    """Move into place what is not there yet: in one rename where nothing is, else file by file."""
    if not target.exists():
        staged.rename(target)
    elif staged.is_dir():
        for path in staged.iterdir():
            _move(path, target / path.name)
