"""Files in place against the MD5 of the originals, which a download names where they differ."""

import gzip
import hashlib

import pytest

from spectral_ops.continual.data import download
from spectral_ops.continual.data.sources import SOURCES


@pytest.mark.parametrize(
    "name, file",
    [
        ("fashion-mnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
        ("cifar-10", "cifar-10-batches-py/data_batch_3"),
        ("cifar-100-coarse", "cifar-100-python/test"),
        ("svhn", "train_32x32.mat"),
        ("svhn", "SVHN/test_32x32.mat"),
    ],
)
def test_files_of_every_set_are_compared_with_the_originals(tmp_path, name, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"mine")
    (line,) = download.altered(name, tmp_path)
    assert f"expected {tmp_path / file} with MD5 " in line and f"got {hashlib.md5(b'mine').hexdigest()}" in line


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar-10"])
def test_the_originals_are_the_originals(data_root, tmp_path, name):
    assert download.altered(name, data_root) == []
    for file, checksum in ((f, c) for source in SOURCES[name] for f, c in source.originals.items()):
        if (packed := data_root / f"{file}.gz").is_file():
            assert hashlib.md5(gzip.decompress(packed.read_bytes())).hexdigest() == checksum
