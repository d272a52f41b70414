"""Where the data sets are fetched from: addresses and MD5 of the originals, as torchvision has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from spectral_ops.continual.data import tiny_imagenet
from spectral_ops.continual.data.cifar import CIFAR
from spectral_ops.continual.data.svhn import find_svhn, svhn_file


class Source(NamedTuple):
    """One file to fetch, or an archive of one folder.

    Args:
        urls: addresses of the same file, the first that answers is taken.
        md5: of the file.
        folder: below the data root, where the file goes, or the folder that the archive holds.
        is_there: whether a data root already has what this gives; then it is not fetched.
        archive: a .tar.gz or .zip to unpack into the data root.
    """

    urls: tuple[str, ...]
    md5: str
    folder: str
    is_there: Callable[[Path], bool]
    archive: bool = False

    @property
    def file(self) -> str:
        return self.urls[0].rpartition("/")[2]


def _has_idx(folder: str, file: str, root: Path) -> bool:
    return any((root / folder / name).is_file() for name in (file, file.removesuffix(".gz")))


def _idx_sources(folder: str, mirrors: tuple[str, ...], md5s: tuple[str, str, str, str]) -> tuple[Source, ...]:
    stems = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [f"{stem}-ubyte.gz" for stem in stems]
    return tuple(
        Source(tuple(mirror + file for mirror in mirrors), md5, folder, partial(_has_idx, folder, file))
        for file, md5 in zip(files, md5s, strict=True)
    )


def _cifar_source(name: str, file: str, md5: str) -> tuple[Source]:
    urls = (f"https://www.cs.toronto.edu/~kriz/{file}",)
    return (Source(urls, md5, CIFAR[name].python, CIFAR[name].is_complete, archive=True),)


def _svhn_source(split: str, md5: str) -> Source:
    urls = (f"http://ufldl.stanford.edu/housenumbers/{svhn_file(split)}",)
    return Source(urls, md5, "", lambda root: find_svhn(root, split) is not None)


_CIFAR_100 = _cifar_source("cifar-100", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")

SOURCES: dict[str, tuple[Source, ...]] = {
    "digits": (),  # ships with scikit-learn
    "mnist": _idx_sources(
        "MNIST/raw",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": _idx_sources(
        "FashionMNIST/raw",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "cifar-10": _cifar_source("cifar-10", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
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
