"""What gets built and installed, and what happens where it cannot be: by the build backend itself, on a copy."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

import spectral_ops

ROOT = Path(__file__).resolve().parents[1]

# A module that builds in seconds, in place of csrc/; the real one is built by `make install` and by .ci/run.
BINDINGS = """
#include <pybind11/pybind11.h>
const char* isa();
PYBIND11_MODULE(_native, m) { m.def("isa", &isa); }
"""
KERNELS = """
#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
const char* JOIN(isa_, SPECTRAL_ISA)() { return STRING(SPECTRAL_ISA); }
"""
OTHER = """
const char* isa_baseline();
#if defined(SPECTRAL_X86)
const char* isa_avx2();
const char* isa_avx512();
const char* isa() { return isa_avx2() == isa_avx512() ? isa_baseline() : isa_avx512(); }
#else
const char* isa() { return isa_baseline(); }
#endif
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build reads, with a small module for csrc/."""
    for tool, version in {"setuptools": 77, "pybind11": 2, "cmake": 3, "ninja": 1}.items():
        found = pytest.importorskip(tool, reason=f"{tool} is needed to build without isolation").__version__
        if int(found.partition(".")[0]) < version:
            pytest.skip(f"{tool} {found} is older than the build asks for")
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("spectral_ops", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ("pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, copy / file)
    (copy / "README.md").write_text("A copy.\n")
    csrc = copy / "csrc"
    csrc.mkdir()
    shutil.copy(ROOT / "csrc" / "CMakeLists.txt", csrc)
    for name, text in {"bindings.cpp": BINDINGS, "kernels.cpp": KERNELS, "other.cpp": OTHER}.items():
        (csrc / name).write_text(text)
    # Whoever imports torch while building, finds this.
    (tmp_path / "no_torch").mkdir()
    (tmp_path / "no_torch" / "torch.py").write_text("raise ImportError('the build must not import torch')\n")
    return copy


def build(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A wheel into dist/, by the hook that pip calls."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith("SPECTRAL_OPS_") and key != "CXX"
    }
    env = inherited | {"SPECTRAL_OPS_CUDA": "0", "PYTHONPATH": str(source.parent / "no_torch")} | variables
    code = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    shutil.rmtree(source / "dist", ignore_errors=True)
    return subprocess.run([sys.executable, "-c", code], cwd=source, env=env, text=True, capture_output=True)


def wheel_of(source: Path, **variables: str) -> tuple[str, set[str], str]:
    """(file name, the files inside, what the build printed)"""
    done = build(source, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel.name, set(zipfile.ZipFile(wheel).namelist()), done.stdout + done.stderr


def has_native(files: set[str]) -> bool:
    return any(file.startswith("spectral_ops/_native.") for file in files)


def installed() -> Message:
    return metadata.metadata("spectral_ops")  # type: ignore[return-value]


def requirements(extra: str) -> dict[str, Requirement]:
    """What is installed on Linux x86-64, without an extra or what one adds."""
    found = map(Requirement, metadata.requires("spectral_ops") or [])
    machine = {"platform_system": "Linux", "platform_machine": "x86_64"}

    def applies(marker: Marker | None, extra: str) -> bool:
        return marker is None or marker.evaluate({**machine, "extra": extra})

    wanted = [r for r in found if applies(r.marker, extra) and not (extra and applies(r.marker, ""))]
    return {r.name: r for r in wanted}


def test_metadata() -> None:
    assert installed()["Version"] == spectral_ops.__version__
    assert installed()["License-Expression"] == "Apache-2.0"
    assert installed()["Requires-Python"] == ">=3.10"
    (entry,) = metadata.entry_points(group="console_scripts", name="spectral-ops")
    assert callable(entry.load())


def test_requirements() -> None:
    assert requirements("").keys() == {"torch", "numpy", "tyro", "triton"}
    assert str(requirements("")["torch"].specifier) == ">=2.11"
    continual = {"scikit-learn", "scipy", "matplotlib", "tqdm", "pillow", "pooch"}
    assert requirements("continual").keys() - {"tomli"} == continual  # tomli: where Python has no tomllib
    assert {"pytest", "hypothesis", "expecttest", "transformers"} <= requirements("test").keys()
    triton = requirements("")["triton"].marker
    assert triton is not None
    for system, machine, wanted in [
        ("Linux", "aarch64", True),
        ("Linux", "ppc64le", False),
        ("Darwin", "arm64", False),
    ]:
        assert triton.evaluate({"platform_system": system, "platform_machine": machine}) is wanted


def test_build_requires_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("requires = ")]
    assert "torch" not in line and "setuptools>=77" in line


def test_kernels_are_a_subpackage() -> None:
    kernels = importlib.import_module("spectral_ops.kernels")
    assert Path(kernels.__file__ or "").name == "__init__.py"
    assert importlib.util.find_spec("spectral_ops.kernels") is not None


def test_wheel_without_native(source: Path) -> None:
    """Every module, under its installed name, and nothing else; pure, as nothing in it is compiled."""
    name, files, text = wheel_of(source, SPECTRAL_OPS_NATIVE="0")
    assert name.endswith("-py3-none-any.whl") and "WARNING: installing" not in text
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "spectral_ops").rglob("*.py")} | {
        "spectral_ops/py.typed"
    }
    expected |= {f"spectral_ops/{file.relative_to(ROOT)}" for file in (ROOT / "kernels").rglob("*.py")}
    expected |= {str(file.relative_to(ROOT)) for file in (ROOT / "spectral_ops").rglob("presets/*.toml")}
    assert {file for file in files if ".dist-info/" not in file} == expected
    assert any(file.endswith("/LICENSE") for file in files)


@pytest.mark.slow
def test_wheel_with_native_and_what_a_later_build_makes_of_it(source: Path, tmp_path: Path) -> None:
    """Compiled, importable, small; and not shipped stale once there is no compiler any more."""
    _, files, _ = wheel_of(source, SPECTRAL_OPS_NATIVE="1")
    assert has_native(files)
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import importlib.util as u; print(u.find_spec('spectral_ops._native').origin)"
    (module,) = (tmp_path / "site" / "spectral_ops").glob("_native.*")
    done = subprocess.run(
        [sys.executable, "-c", "import _native; print(_native.isa())"],
        cwd=module.parent,
        text=True,
        capture_output=True,
    )
    assert done.stdout.strip() in ("avx512", "baseline"), done.stderr
    assert module.stat().st_size < 1 << 20, code
    _, files, text = wheel_of(source, CXX="/nonexistent/c++")
    assert not has_native(files)
    assert text.count("WARNING: installing WITHOUT the compiled CPU kernels") == 1


def test_no_compiler_is_one_clear_warning(source: Path) -> None:
    _, files, text = wheel_of(source, CXX="/nonexistent/c++")
    assert not has_native(files)
    assert text.count("WARNING: installing WITHOUT the compiled CPU kernels") == 1
    assert "no working C++17 compiler (tried /nonexistent/c++)" in text
    assert "Remedy: install a C++17 compiler" in text


def test_no_compiler_is_an_error_when_native_is_required(source: Path) -> None:
    done = build(source, CXX="/nonexistent/c++", SPECTRAL_OPS_NATIVE="1")
    assert done.returncode != 0
    assert "SPECTRAL_OPS_NATIVE=1 but no working C++17 compiler" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("kernels.cpp", "#error a mistake of ours", "works, but compiling csrc/ failed"),
        ("other.cpp", "// isa() is nowhere", "was built but cannot be imported"),
    ],
)
def test_our_own_mistakes_are_not_taken_for_a_missing_compiler(
    source: Path, file: str, text: str, message: str
) -> None:
    (source / "csrc" / file).write_text(text)
    done = build(source)
    assert done.returncode != 0
    assert message in done.stderr and "WARNING: installing WITHOUT" not in done.stdout + done.stderr


@pytest.mark.slow
def test_required_cuda_without_nvcc_is_an_error(source: Path) -> None:
    done = build(source, SPECTRAL_OPS_CUDA="1", CUDACXX="/nonexistent/nvcc")
    assert done.returncode != 0
    assert "SPECTRAL_OPS_CUDA=1 but" in done.stderr


@pytest.mark.slow
def test_a_broken_nvcc_leaves_cuda_out(source: Path) -> None:
    _, files, text = wheel_of(source, SPECTRAL_OPS_CUDA="", CUDACXX="/nonexistent/nvcc")
    assert has_native(files)
    assert "the CUDA kernels are left out" in " ".join(text.split())  # CMake folds lines


@pytest.mark.parametrize("name", ["SPECTRAL_OPS_NATIVE", "SPECTRAL_OPS_CUDA"])
def test_settings_are_checked(source: Path, name: str) -> None:
    done = build(source, **{"CXX": "c++", name: "yes"})
    assert done.returncode != 0
    assert f"setup: expected {name} to be 0, 1 or unset, got 'yes'." in done.stderr


def weak_symbols(file: Path) -> set[str]:
    lines = subprocess.run(
        ["nm", "--defined-only", str(file)], text=True, capture_output=True, check=True
    ).stdout.splitlines()
    return {line.split()[-1] for line in lines if line.split()[-2] in "VWu"}


def test_no_inline_function_can_come_from_a_wider_instruction_set() -> None:
    """The linker keeps one copy of a weak symbol; were that the AVX-512 one, older processors would stop in it."""
    builds = sorted((ROOT / "build").glob("native-*"), key=lambda folder: folder.stat().st_mtime)
    if not builds or not shutil.which("nm"):
        pytest.skip("needs nm and the objects of `pip install -e .`, in build/native-*")
    objects = list(builds[-1].glob("CMakeFiles/**/*.o"))
    wide = {file for file in objects if file.parent.name in ("isa_avx2.dir", "isa_avx512.dir")}
    if not wide:
        pytest.skip("this processor has one instruction set")
    others = set().union(*(weak_symbols(file) for file in objects if file not in wide))
    for file in wide:
        assert not weak_symbols(file) & others, file


def test_ci_entry_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_make_lists_its_targets() -> None:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    text = subprocess.run(["make", "-s"], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    for target in ("demo", "test", "test-fast", "check", "bench", "wheel", "gpu", "clean"):
        assert f"  make {target} " in text
