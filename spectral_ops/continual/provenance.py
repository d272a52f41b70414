"""What a result was made with: versions, commit, machine."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("spectral_ops", "torch", "numpy", "scikit-learn")


def provenance() -> dict[str, Any]:
    """{"versions", "commit", "machine"}; commit: None outside a checkout, with "-dirty" where files changed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.platform()}, {capability}, {os.cpu_count()} cores"
    return {"versions": versions, "commit": _commit(), "machine": machine}


def _commit() -> str | None:
    package = Path(__file__).resolve().parent
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        # Of this very file: a copy installed below somebody else's checkout has no commit.
        subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
