"""What the tests of bench/ share: where it is, one thread, quick settings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # last: an installed spectral_ops goes first
    sys.path.append(str(ROOT))

from bench.case import Settings  # noqa: E402
from bench.device import Device  # noqa: E402
from spectral_ops import backends  # noqa: E402

WITHOUT_FLOOR = backends.available()["native"] is not None
needs_native = pytest.mark.skipif(WITHOUT_FLOOR, reason="the floor of a CPU is csrc's, and it is not built")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two wait for each other on a busy machine; tests/conftest.py sets the number back."""
    torch.set_num_threads(1)


@pytest.fixture
def settings() -> Settings:
    return Settings(Device("cpu", 1), quick=True)
