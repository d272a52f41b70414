"""Every example in a docstring of the package runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import spectral_ops

# The command line, compiled code, and kernels that need Triton.
NOT_IMPORTED = ("spectral_ops.__main__", "spectral_ops._native", "spectral_ops.kernels")
MODULES = ["spectral_ops"] + [
    module.name
    for module in pkgutil.walk_packages(spectral_ops.__path__, "spectral_ops.")
    if not module.name.startswith(NOT_IMPORTED)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # an optional dependency
        pytest.skip(f"{name} needs {error.name}")
    result = doctest.testmod(module)
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(spectral_ops.__all__))
def test_public_names_show_an_example(name: str) -> None:
    finder = doctest.DocTestFinder(recurse=False)
    assert any(test.examples for test in finder.find(getattr(spectral_ops, name), name))
