"""Methods by name. A new one is a file with a subclass of Method and a line here."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path

from spectral_ops.continual.choices import choose
from spectral_ops.continual.methods.continual_backprop import ContinualBackprop
from spectral_ops.continual.methods.fire import Fire
from spectral_ops.continual.methods.l2 import L2
from spectral_ops.continual.methods.l2_decoupled import L2Decoupled
from spectral_ops.continual.methods.l2_init import L2Init
from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.methods.no_method import NoMethod
from spectral_ops.continual.methods.optimizer_reset import OptimizerReset
from spectral_ops.continual.methods.parseval import Parseval
from spectral_ops.continual.methods.redo import ReDo
from spectral_ops.continual.methods.reset import Reset
from spectral_ops.continual.methods.shrink_and_perturb import ShrinkAndPerturb
from spectral_ops.continual.methods.spectral import Spectral
from spectral_ops.continual.methods.spectral_norm import SpectralNorm
from spectral_ops.continual.methods.wasserstein import Wasserstein
from spectral_ops.continual.methods.weight_clipping import WeightClipping

METHODS: dict[str, type[Method]] = {
    "none": NoMethod,
    "l2": L2,
    "l2-decoupled": L2Decoupled,
    "l2-init": L2Init,
    "wasserstein": Wasserstein,
    "parseval": Parseval,
    "spectral": Spectral,
    "spectral-norm": SpectralNorm,
    "weight-clipping": WeightClipping,
    "shrink-and-perturb": ShrinkAndPerturb,
    "redo": ReDo,
    "continual-backprop": ContinualBackprop,
    "fire": Fire,
    "optimizer-reset": OptimizerReset,
    "reset": Reset,
}

__all__ = ["METHODS", "Context", "Method", "find_method"]


def find_method(name: str) -> type[Method]:
    """The class of that name, or the one that "package.module:Class" names.

    Raises:
        ValueError: an unknown name; a module that is not found or fails when it is imported, or has no such class.
        TypeError: a class that is no subclass of Method.

    Example:
        >>> find_method("l2") is find_method("spectral_ops.continual.methods.l2:L2")
        True
    """
    if ":" not in name:
        return choose("method", name, METHODS)
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # what is not found, and whatever the module's own code ends in
        raise ValueError(
            f"method: expected package.module:Class with a module that can be imported, got {name!r}: "
            f"{_why_not_imported(module_name, error)}"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(
            f"method: expected package.module:Class with a class of that module, got {name!r}. "
            f"Name a class that is in {module_name}."
        )
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise TypeError(
            f"method: expected {class_name} to be a subclass of Method, got {found!r}. "
            "Derive it from spectral_ops.continual.methods.Method."
        )
    return found


def _why_not_imported(module: str, error: Exception) -> str:
    """The cause and the remedy; of an error within the module its place, too, which no command's one line would say."""
    absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
    if absent or not module or module.startswith("."):
        return f"{error}. Install it, or run where Python finds it."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, SyntaxError) else f" ({Path(frame.filename).name}, line {frame.lineno})"
    return f"{type(error).__name__}: {error}{place}. Mend {module}, or what it imports."
