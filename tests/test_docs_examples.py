"""Every example in a docstring of the package runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import spectral_ops

# Run with a process or a file system of their own.
NOT_IMPORTED = ("spectral_ops.__main__", "spectral_ops._native", "spectral_ops.kernels")
MODULES = ["spectral_ops"] + [
    module.name
    for module in pkgutil.walk_packages(spectral_ops.__path__, "spectral_ops.")
    if not module.name.startswith(NOT_IMPORTED)
]
# Public names whose docstring must show one.
SHOWN = {"SpectralRegularizer", "Rule", "available", "power_iteration", "spectral_norm", "spectral_penalty", "use_backend"}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # an optional dependency
        pytest.skip(f"{name} needs {error.name}")
    result = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch"), "spectral_ops": spectral_ops})
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_public_names_show_an_example(name: str) -> None:
    assert set(spectral_ops.__all__) == SHOWN
    finder = doctest.DocTestFinder(recurse=False)
    assert any(test.examples for test in finder.find(getattr(spectral_ops, name), name))
