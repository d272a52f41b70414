"""Where the data sets lie."""

from __future__ import annotations

import os
from pathlib import Path

DATA_VARIABLE = "SPECTRAL_OPS_DATA"


def choose_data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The data root, whether it exists or not: `root` if given, otherwise the environment variable SPECTRAL_OPS_DATA.

    Raises:
        ValueError: neither is given.
    """
    chosen = root if root is not None else os.environ.get(DATA_VARIABLE)
    if not chosen:
        raise ValueError(
            f"find_data_root: expected a data root, got root={root!r} and {DATA_VARIABLE} unset or empty. "
            f"Set {DATA_VARIABLE} (or pass --data-root) to the folder of the data sets, which spectral-ops download "
            "fills; digits needs none."
        )
    return Path(chosen)


def find_data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The data root: `root` if given, otherwise the environment variable SPECTRAL_OPS_DATA.

    Raises:
        ValueError: neither is given.
        FileNotFoundError: the folder does not exist.
    """
    path = choose_data_root(root)
    if not path.is_dir():
        source = "root" if root is not None else DATA_VARIABLE
        raise FileNotFoundError(
            f"find_data_root: expected {source} to be an existing folder, got {path}. "
            f"Point {DATA_VARIABLE} or --data-root at the folder of the data sets, or make it: spectral-ops download."
        )
    return path
