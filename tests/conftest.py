"""What every test has: two threads, seeds of its own, the backends of this machine, the data sets."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from spectral_ops import backends

THREADS = 2  # continuous integration has two processors; results do not depend on the number


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """The same numbers for a test whichever others run, in whatever order."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs on CPU tensors, chosen while the test runs; its name."""
    reason = backends.available()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param} not usable: {reason}")
    with backends.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the data sets. Unset, it fails where CI is set, so that no data test is skipped there unnoticed."""
    root = os.environ.get("SPECTRAL_OPS_DATA")
    if root and Path(root).is_dir():
        return Path(root)
    message = f"needs data sets: expected SPECTRAL_OPS_DATA to name a folder, got {root!r}"
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{message}, and CI is set")
    pytest.skip(message)
