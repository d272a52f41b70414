"""Builds the compiled module spectral_ops._native (csrc/, with CMake) and installs kernels/ as spectral_ops.kernels.

SPECTRAL_OPS_NATIVE   unset: built where there is a C++17 compiler, else a warning; 1: else an error; 0: left out
SPECTRAL_OPS_CUDA     unset: with CUDA where nvcc works; 1: else an error; 0: without
CXX, CXXFLAGS, CUDACXX, CUDA_HOME, CMAKE_BUILD_PARALLEL_LEVEL   as everywhere
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

WITHOUT_NATIVE = """
spectral_ops: WARNING: installing WITHOUT the compiled CPU kernels (spectral_ops._native): {reason}.
  Lost: the fused CPU kernels. Everything still works on plain torch, more slowly.
  Remedy: install a C++17 compiler (apt install g++, dnf install gcc-c++, xcode-select --install), then this again.
  SPECTRAL_OPS_NATIVE=1 turns this warning into an error, SPECTRAL_OPS_NATIVE=0 silences it.
"""

PROBE = """
#include <vector>
int probe(const std::vector<int>& x) { if constexpr (sizeof(int) > 1) return x[0]; }
"""


def setting(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"setup: expected {name} to be 0, 1 or unset, got {value!r}. Correct this variable.")
    return value


class Unavailable(Exception):
    """This machine lacks something that building needs; says what. Never raised for a fault in our own sources."""


def find_compiler() -> str:
    """A command that compiles C++17 with the standard library into a shared object."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    with tempfile.TemporaryDirectory() as folder:
        for candidate in candidates:
            options = ["-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", f"{folder}/probe"]
            command = [*shlex.split(candidate), *options]
            try:
                if subprocess.run(command, input=PROBE, text=True, capture_output=True).returncode == 0:
                    return candidate
            except OSError:
                continue
    raise Unavailable(f"no working C++17 compiler (tried {', '.join(candidates)})")


def find_tool(name: str) -> str:
    """cmake or ninja: of the Python package of that name, which the build environment holds, else from PATH."""
    spec = importlib.util.find_spec(name)
    if spec is not None:
        module = importlib.import_module(name)
        binary = Path(getattr(module, "CMAKE_BIN_DIR" if name == "cmake" else "BIN_DIR", "")) / name
        if binary.is_file():
            return str(binary)
    found = shutil.which(name)
    if found is None:
        raise Unavailable(f"{name} not found (pip install {name})")
    return found


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        raise Unavailable("pybind11 not found (pip install pybind11)") from None
    return pybind11.get_cmake_dir()


def require_python_headers() -> None:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise Unavailable(f"Python's own header {header} not found (apt install python3-dev)")


def find_nvcc() -> str | None:
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/bin/nvcc" for home in homes if home]
    return shutil.which("nvcc") or next((place for place in places if os.access(place, os.X_OK)), None)


class CMakeBuild(build_ext):
    """One extension, built by csrc/CMakeLists.txt in a folder that stays, so that a second build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            module = self.build_native()
        except Unavailable as reason:
            if setting("SPECTRAL_OPS_NATIVE") == "1":
                raise CompileError(f"SPECTRAL_OPS_NATIVE=1 but {reason}") from None
            print(WITHOUT_NATIVE.format(reason=reason), file=sys.stderr, flush=True)
            # An older build must not be shipped, nor used in place, with newer Python code.
            target.unlink(missing_ok=True)
            if getattr(self, "editable_mode", False):
                (ROOT / "spectral_ops" / target.name).unlink(missing_ok=True)
            ext.optional = True  # what setuptools does later then takes the missing file as it is
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target)

    def build_native(self) -> Path:
        require_python_headers()
        compiler, cmake, ninja, pybind11 = find_compiler(), find_tool("cmake"), find_tool("ninja"), find_pybind11()
        cuda = {"": "AUTO", "0": "OFF", "1": "ON"}[setting("SPECTRAL_OPS_CUDA")]
        nvcc = find_nvcc() if cuda != "OFF" else None
        if nvcc is None and cuda == "ON":
            raise CompileError("SPECTRAL_OPS_CUDA=1 but nvcc was not found. Put it on PATH or set CUDACXX.")
        env = os.environ | {"CXX": compiler} | ({"CUDACXX": nvcc} if nvcc else {})
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake,
            f"-S{ROOT / 'csrc'}",
            f"-B{folder}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DSPECTRAL_OPS_CUDA={cuda if nvcc else 'OFF'}",
        ]
        # Build isolation puts cmake and pybind11 into a new temporary folder each time, and CMake's cache would keep
        # pointing at the last one: start afresh when anything it remembers has changed.
        remembered = folder / "configured_with.txt"
        variables = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX")
        description = "\n".join([*configure, *(f"{name}={env.get(name, '')}" for name in variables)])
        if not remembered.is_file() or remembered.read_text() != description:
            remembered.unlink(missing_ok=True)
            configure.insert(1, "--fresh")
        if subprocess.run(configure, env=env).returncode != 0:
            if cuda == "ON":
                raise CompileError("SPECTRAL_OPS_CUDA=1 but CMake could not configure csrc/; its output is above.")
            raise Unavailable(f"CMake could not configure csrc/ with {compiler} (its output is above)")
        remembered.write_text(description)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        if subprocess.run([cmake, "--build", str(folder), "--parallel", jobs], env=env).returncode != 0:
            # A compiler that works failed on our sources: a defect to be seen, not a machine to be lenient with.
            remedy = "SPECTRAL_OPS_NATIVE=0 installs without the compiled kernels."
            raise CompileError(f"{compiler} works, but compiling csrc/ failed; its output is above. {remedy}")
        (module,) = (folder / "module").glob("_native*")
        # An undefined symbol shows at import, and should do so here rather than at the user's. The folder is named, for
        # PYTHONSAFEPATH keeps the current one off the path.
        importing = "import sys; sys.path.insert(0, sys.argv[1]); import _native"
        if subprocess.run([sys.executable, "-c", importing, str(module.parent)]).returncode != 0:
            raise CompileError(f"{module.name} was built but cannot be imported; the error is above.")
        return module


setup(
    packages=[
        *find_packages(include=["spectral_ops", "spectral_ops.*"]),
        "spectral_ops.kernels",
        *(f"spectral_ops.kernels.{name}" for name in find_packages("kernels")),
    ],
    # On PyPI the name `kernels` is another package's; ours is only the folder's.
    package_dir={"": ".", "spectral_ops.kernels": "kernels"},
    ext_modules=[] if setting("SPECTRAL_OPS_NATIVE") == "0" else [Extension("spectral_ops._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
