"""Pickles of arrays of whole numbers, strings, lists and dicts, and nothing else: one may name any function to call."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from spectral_ops.continual.data.dataset import FETCH_AGAIN, damaged


def _encode(text: str, encoding: str) -> bytes:
    """In place of _codecs.encode, by which Python 3 writes bytes in the older protocols, always as latin1."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _Array:
    """In place of numpy.ndarray, which called with a shape would hand out memory as it finds it."""


def _empty_array(kind: object, shape: object, code: object) -> np.ndarray:
    """In place of numpy's function of that name: an array without elements, which its state then fills."""
    if kind is not _Array or shape != (0,):
        raise pickle.UnpicklingError(f"an array made of {kind!r} with shape {shape!r}")
    return _RECONSTRUCT(np.ndarray, (0,), b"b")


def _whole_numbers(code: object, *flags: object) -> np.dtype:
    """In place of numpy.dtype: the state of others can name objects, or a size that is not the memory's."""
    dtype = np.dtype(code)  # type: ignore[call-overload]
    if dtype.kind not in "iu":
        raise pickle.UnpicklingError(f"an array of {dtype}")
    return dtype


# Both are private in numpy, under a path that has changed; what an array reduces to leads to them in every version.
_RECONSTRUCT: Any = np.empty(0, np.uint8).__reduce__()[0]
_FROM_BUFFER = np.empty(1, np.uint8).__reduce_ex__(5)[0]  # protocol 5
_ALLOWED: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _whole_numbers,
    "numpy.core.multiarray._reconstruct": _empty_array,  # numpy 1, and the files of 2009
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.core.numeric._frombuffer": _FROM_BUFFER,
    "numpy._core.numeric._frombuffer": _FROM_BUFFER,
    "_codecs.encode": _encode,
}


class _ForeignClass(pickle.UnpicklingError):
    """The pickle names a class or function that plain data does not need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise _ForeignClass(f"{module}.{name}")
        return _ALLOWED[f"{module}.{name}"]


def load_pickle(reader: str, path: Path) -> Any:
    """The content of a pickle of plain data; strings of Python 2 are read as latin1.

    Raises:
        ValueError: no pickle, a damaged one, or one that names any other class or function; nothing of it is called.
    """
    with path.open("rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except _ForeignClass as error:
            raise ValueError(
                f"{reader}: expected {path} to hold numpy arrays, strings, lists and dicts alone, got {error}. "
                f"It is no file of this data set and may be harmful: {FETCH_AGAIN}."
            ) from error
        except Exception as error:  # damaged bytes are instructions, too: they fail in any way
            raise damaged(reader, path, "be a complete pickle", f"{type(error).__name__}: {error}") from error
