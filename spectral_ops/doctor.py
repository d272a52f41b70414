"""`spectral-ops doctor`: versions, what is built and chosen here and why, and a self-test against a float64 SVD."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import spectral_ops
from spectral_ops import backends

# Against the float64 SVD of the same float32 matrix. spectral_norm stops at a residual of 1e-6 and rounds once more in
# sums of a few hundred terms; ten times that tells a wrong result from a rounded one.
TOLERANCE = 1e-5
STEPS = 3


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cuda_version_text(number: int) -> str | None:
    """13000 -> '13.0'; 0, which CUDA reports without a driver, -> None."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def describe_versions() -> dict[str, Any]:
    packages = {name: package_version(name) for name in ("spectral_ops", "torch", "triton", "numpy")}
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, **packages, "torch built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"}


def describe_native() -> dict[str, Any] | None:
    """What the compiled module says of itself; None where there is none."""
    if backends.available()["native"] is not None:
        return None
    module = backends.native()
    facts: dict[str, Any] = {"file": module.__file__, "isa": module.isa()}
    if hasattr(module, "built_with"):
        facts |= module.built_with()
    if hasattr(module, "cuda_versions"):  # in a module built with CUDA
        error, driver, runtime, devices = module.cuda_versions()
        facts |= {"cuda_driver": cuda_version_text(driver), "cuda_runtime": cuda_version_text(runtime)}
        facts |= {"cuda_devices": devices, "cuda_error": module.cuda_error_text(error) if error else None}
    return facts


def describe_devices() -> dict[str, str]:
    threads = f"{os.cpu_count()} processors, torch uses {torch.get_num_threads()} threads"
    found = {"cpu": f"{platform.machine()}, {threads}"}
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
    return found


def describe_choices(devices: list[str]) -> dict[str, dict[str, str]]:
    """Per device, the backend of power_iteration and why; an explicit choice that cannot serve it is an 'error'."""
    choices: dict[str, dict[str, str]] = {}
    for device in devices:
        try:
            backend, why = backends.explain(torch.device(device), "power_iteration")
            choices[device] = {"backend": backend, "why": why}
        except (RuntimeError, ValueError) as error:
            choices[device] = {"error": str(error)}
    return choices


def matrices() -> dict[str, Tensor]:
    """Small float32 matrices, random and hard, each named for what it could break."""
    generator = torch.Generator().manual_seed(0)

    def normal(m: int, n: int) -> Tensor:
        return torch.randn(m, n, generator=generator, dtype=torch.float64)

    def with_singular_values(values: Tensor, m: int, n: int) -> Tensor:
        k = len(values)
        return torch.linalg.qr(normal(m, k))[0] * values @ torch.linalg.qr(normal(n, k))[0].T

    decay = 0.8 ** torch.arange(20, dtype=torch.float64)
    close = torch.cat([torch.tensor([1.0, 0.97], dtype=torch.float64), 0.5 * decay])
    found = {
        "random 64x48": normal(64, 48),
        "wide 3x1025": normal(3, 1025),  # no multiple of a register
        "tall 700x5": normal(700, 5),
        "one row": normal(1, 37),
        "one column": normal(37, 1),
        "rank one": with_singular_values(torch.ones(1, dtype=torch.float64), 40, 30),
        "close pair": with_singular_values(close, 60, 50),
        "tie": torch.eye(24, dtype=torch.float64),
        "huge": 1e17 * normal(20, 30),  # sigma^4 is beyond float32
        "tiny": 1e-17 * normal(20, 30),
        "zero": torch.zeros(8, 9, dtype=torch.float64),
    }
    return {name: w.float() for name, w in found.items()}


def largest(*errors: float) -> float:
    """The largest; infinite where one is NaN."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def verdict(errors: dict[str, float]) -> tuple[bool, str]:
    """(every error within TOLERANCE, the largest one in words)."""
    name = max(errors, key=lambda key: largest(errors[key]))
    return largest(errors[name]) <= TOLERANCE, f"largest error {errors[name]:.1e} ({name})"


def relative(value: float, truth: float) -> float:
    return abs(value - truth) / truth if truth > 0 else abs(value)


def check_spectral_norm(device: torch.device) -> tuple[bool, str]:
    found = matrices()
    sigma = spectral_ops.spectral_norm([w.to(device) for w in found.values()]).tolist()
    truth = {name: torch.linalg.matrix_norm(w.double(), 2).item() for name, w in found.items()}
    return verdict({name: relative(s, truth[name]) for s, name in zip(sigma, found, strict=True)})


def check_power_iteration(device: torch.device) -> tuple[bool, str]:
    """Steps against the same steps in float64, and what must hold of any step: units, never falling, never above."""
    found = matrices()
    generator = torch.Generator().manual_seed(1)
    v = [torch.nn.functional.normalize(torch.randn(w.shape[1], generator=generator), dim=0) for w in found.values()]
    exact = [x.double() for x in v]
    v = [x.to(device) for x in v]
    weights = [w.to(device) for w in found.values()]
    errors: dict[str, float] = {}
    before = [0.0] * len(found)
    for _ in range(STEPS):
        sigma, u, v = spectral_ops.power_iteration(weights, v)
        for i, (name, w) in enumerate(found.items()):
            s = sigma[i].item()
            units = max(abs(x.double().norm().item() - 1) for x in ([v[i]] if name == "zero" else [u[i], v[i]]))
            y = w.double() @ exact[i]
            z = w.double().T @ y
            s_exact = (z.norm() / y.norm()).item() if name != "zero" else 0.0
            exact[i] = z / z.norm() if name != "zero" else exact[i]
            fell = max(0.0, relative(before[i], s)) if s < before[i] else 0.0
            top = torch.linalg.matrix_norm(w.double(), 2).item()
            above = relative(s, top) if s > top else 0.0
            errors[name] = largest(errors.get(name, 0.0), relative(s, s_exact), units, fell, above)
            before[i] = s
    return verdict(errors)


CHECKS: dict[str, Callable[[torch.device], tuple[bool, str]]] = {
    "spectral_norm": check_spectral_norm,
    "power_iteration": check_power_iteration,
}


def self_test() -> list[dict[str, Any]]:
    """Every check on every backend and device that it is usable on; an exception is a failed check."""
    places: list[tuple[backends.Backend, str]] = [("reference", "cpu"), ("native", "cpu")]
    if torch.cuda.is_available():
        places += [("reference", "cuda"), ("triton", "cuda")]
    usable = backends.available()
    results: list[dict[str, Any]] = []
    for backend, device in places:
        if usable[backend] is not None:
            continue
        for op, check in CHECKS.items():
            try:
                with backends.use_backend(backend):
                    ok, detail = check(torch.device(device))
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                ok, detail = False, f"{type(error).__name__}: {error} ({os.path.basename(at.filename)}:{at.lineno})"
            results.append({"op": op, "backend": backend, "device": device, "ok": ok, "detail": detail})
    return results


def examine() -> dict[str, Any]:
    """The whole report, as plain data; 'ok' is False where a check failed or an explicit choice cannot be had."""
    devices = describe_devices()
    choices = describe_choices(["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    checks = self_test()
    return {
        "ok": all(check["ok"] for check in checks) and not any("error" in choice for choice in choices.values()),
        "versions": describe_versions(),
        "devices": devices,
        "native": describe_native(),
        "backends": backends.available(),
        "chosen": choices,
        "checks": checks,
    }


def render(report: dict[str, Any]) -> str:
    lines: list[str] = []

    def section(title: str, rows: dict[str, Any]) -> None:
        width = max(map(len, rows))
        lines.extend(["", title, *(f"  {key:<{width}}  {value}" for key, value in rows.items())])

    section("versions", {key: value or "not installed" for key, value in report["versions"].items()})
    section("devices", report["devices"])
    if report["native"] is not None:
        facts = report["native"].items()
        section("compiled module", {key: value or "none" for key, value in facts})
    reasons = report["backends"].items()
    section("backends", {key: "usable" if reason is None else f"not usable: {reason}" for key, reason in reasons})
    chosen = report["chosen"].items()
    section("chosen", {key: choice.get("error") or f"{choice['backend']} ({choice['why']})" for key, choice in chosen})
    names = [f"{check['op']} on {check['backend']}, {check['device']}" for check in report["checks"]]
    texts = [f"{'ok' if check['ok'] else 'FAILED'}: {check['detail']}" for check in report["checks"]]
    section("self-test against a float64 SVD", dict(zip(names, texts, strict=True)))
    compiled = report["backends"]["native"] is None
    well = "all is well" if compiled else "it works, without the compiled kernels: see backends"
    lines.extend(["", well if report["ok"] else "SOMETHING FAILED, see above"])
    return "\n".join(lines[1:])


def main(json: bool = False, require: tuple[str, ...] = ()) -> int:
    """Shows what is built and usable on this machine and why, and tests it. Exit status 1 where a test fails.

    Args:
        json: print one JSON object.
        require: backends that must be usable, for example native; status 1 where one is not.
    """
    for name in require:
        if name not in backends.BACKENDS:
            known = ", ".join(backends.BACKENDS)
            raise ValueError(f"doctor: expected require to name one of {known}, got {name!r}. Name one of these.")
    report = examine()
    missing = [name for name in require if report["backends"].get(name) is not None]
    report["ok"] = report["ok"] and not missing
    print(as_json(report) if json else render(report))
    for name in missing:
        print(f"doctor: expected {name} to be usable, got {report['backends'][name]}.", file=sys.stderr)
    return 0 if report["ok"] else 1


def as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)
