"""What every test has: two threads, seeds of its own, the backends of this machine, the data sets."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which decides once
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter  # noqa: E402

from spectral_ops import backends  # noqa: E402

# Continuous integration has two processors; results do not depend on the number. Two processes of two threads each wait
# for one another at every end of an operation: with pytest-xdist some tests take 100 times as long.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-interpreted", action="store_true", help="every test of the Triton kernels, not a sample")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    if os.environ.get("TRITON_INTERPRET") == "1" and backends.available()["triton"] is None:
        interpreter.round_bfloat16()


@pytest.hookimpl(tryfirst=True)  # before -m looks for slow ones
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    if not config.getoption("--all-interpreted"):
        items[:], left_out = interpreter.sample(items)
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        if interpreter.is_interpreted(item):  # tests/test_triton_*.py are the fast ones
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch.cuda.is_available() is False")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Tests that take float64, by a parameter or throughout, are no tests of Triton, which has no such kernels."""
    try:
        return (yield)
    except RuntimeError as error:
        callspec = getattr(item, "callspec", None)
        if callspec is None or callspec.params.get("backend") != "triton" or "no float64 kernel" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def _no_worlds_left() -> Iterator[None]:
    """Other modules look at the children of this process."""
    yield
    if "sharding_run" in sys.modules:
        sys.modules["sharding_run"].close()


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


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs on CPU tensors, chosen while the test runs; its name."""
    reason = backends.available()[request.param]
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = "it serves CUDA tensors, see tests/test_cuda.py"
    if reason is not None:
        pytest.skip(f"{request.param} not usable: {reason}")
    with backends.use_backend(request.param), pytest.MonkeyPatch.context() as patch:
        if request.param == "triton":  # tests/test_triton_norm.py has a regularizer that starts by itself
            interpreter.start_with_reference(patch)
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
