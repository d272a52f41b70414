"""Where the data sets are fetched from: addresses and MD5 of the originals, as torchvision has them.

Those of unpacked IDX files are of what gunzip makes of the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spectral_ops.continual.data import tiny_imagenet
from spectral_ops.continual.data.cifar import CIFAR
from spectral_ops.continual.data.svhn import SVHN_FOLDERS, find_svhn, svhn_file


class Source(NamedTuple):
    """One file to fetch, or an archive of one folder.

    Args:
        urls: addresses of the same file, the first that answers is taken.
        md5: of the file.
        folder: below the data root, where the file goes, or the folder that the archive holds.
        is_there: whether a data root already has what this gives; then it is not fetched.
        archive: a .tar.gz or .zip to unpack into the data root.
        also: MD5 of further files by their paths below the data root: other forms of the file, or members of the
            archive.
    """

    urls: tuple[str, ...]
    md5: str
    folder: str
    is_there: Callable[[Path], bool]
    archive: bool = False
    also: Mapping[str, str] = {}

    @property
    def file(self) -> str:
        return self.urls[0].rpartition("/")[2]

    @property
    def originals(self) -> dict[str, str]:
        """The MD5 that a file in place has, by its path below the data root; of some files none is known."""
        return dict(self.also) if self.archive else {f"{self.folder}/{self.file}".lstrip("/"): self.md5, **self.also}


def _has_idx(folder: str, file: str, root: Path) -> bool:
    return any((root / folder / name).is_file() for name in (file, file.removesuffix(".gz")))


def _idx_sources(folder: str, mirrors: tuple[str, ...], md5s: tuple[tuple[str, str], ...]) -> tuple[Source, ...]:
    """md5s: of each file, compressed and unpacked."""
    made = []
    for stem, (md5, unpacked) in zip(_IDX_STEMS, md5s, strict=True):
        urls, there = tuple(f"{mirror}{stem}.gz" for mirror in mirrors), partial(_has_idx, folder, f"{stem}.gz")
        made.append(Source(urls, md5, folder, there, also={f"{folder}/{stem}": unpacked}))
    return tuple(made)


def _cifar_source(name: str, file: str, md5: str, *members: str) -> tuple[Source]:
    """members: MD5 of its files, in their order."""
    urls, kind = (f"https://www.cs.toronto.edu/~kriz/{file}",), CIFAR[name]
    also = {f"{kind.python}/{member}": of_it for member, of_it in zip(kind.all_files, members, strict=True)}
    return (Source(urls, md5, kind.python, kind.is_complete, archive=True, also=also),)


def _svhn_source(split: str, md5: str) -> Source:
    file = svhn_file(split)
    urls, also = (f"http://ufldl.stanford.edu/housenumbers/{file}",), {f"{of}/{file}": md5 for of in SVHN_FOLDERS if of}
    return Source(urls, md5, "", lambda root: find_svhn(root, split) is not None, also=also)


_IDX_STEMS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CIFAR_100 = _cifar_source(
    "cifar-100",
    "cifar-100-python.tar.gz",
    "eb9058c3a382ffc7106e4002c42a8d85",
    "16019d7e3df5f24257cddd939b257f8d",
    "f0ef6b0ae62326f3e7ffdfab6717acfc",
)

SOURCES: dict[str, tuple[Source, ...]] = {
    "digits": (),  # ships with scikit-learn
    "mnist": _idx_sources(
        "MNIST/raw",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        (
            ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
            ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
            ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
            ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
        ),
    ),
    "fashion-mnist": _idx_sources(
        "FashionMNIST/raw",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        (
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
            ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
            ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
            ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
        ),
    ),
    "cifar-10": _cifar_source(
        "cifar-10",
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "c99cafc152244af753f735de768cd75f",
        "d4bba439e000b95fd0a9bffe97cbabec",
        "54ebc095f3ab1f0389bbae665268c751",
        "634d18415352ddfa80567beed471001a",
        "482c414d41f54cd18b22e5b47cb7c3cb",
        "40351d587109b95175f43aff81a1287e",
    ),
    "cifar-100": _CIFAR_100,
    "cifar-100-coarse": _CIFAR_100,
    "svhn": (
        _svhn_source("train", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        _svhn_source("test", "eb5a983be6a315427106f1b164d9cef3"),
    ),
    "tiny-imagenet": (  # not in torchvision; the MD5 is the one in general use for this archive
        Source(
            ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
            "90528d7ca1a48142e341f4ef8d21d0de",
            tiny_imagenet.FOLDER,
            tiny_imagenet.is_complete,
            archive=True,
        ),
    ),
}
