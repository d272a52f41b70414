"""What the README and docs/design.md point to is there, and figures are those of the files they are from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
EPYC = "amd-epyc-2-cores-2026-11-25"


def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"`[^`\n]+`", "", (ROOT / page).read_text())  # code: kernel[grid](*args)
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("http")]
    gone = [t for t in targets if t and not ((ROOT / page).parent / t).exists()]
    assert not gone
    assert page != "README.md" or len(targets) > 30  # the pattern finds them


def test_machine_loads() -> None:
    named = re.search(r"Load ([\d.]+) and ([\d.]+) when the two runs began", readme())
    assert named is not None
    for kind, load in zip(("penalty", "norm"), named.groups(), strict=True):
        assert f"BUSY MACHINE: load {load} when" in (RESULTS / f"{EPYC}-{kind}.md").read_text()


def test_ratio_to_max_autotune() -> None:
    section = (RESULTS / f"{EPYC}-penalty.md").read_text().partition("`accumulate_grad/mlp/float32`")[2]
    row = next(line for line in section.splitlines() if line.startswith("| usual, max-autotune |"))
    within_rounds = float(row.split("|")[6])  # the column "x base"
    named = re.search(r"max-autotune ([\d.]+)x", readme())
    assert named is not None and float(named[1]) == round(within_rounds, 1)


def test_folders_of_the_layout() -> None:
    line = next(x for x in (ROOT / "docs" / "design.md").read_text().splitlines() if "the reference trainer: data" in x)
    parts = [part.strip() for part in line.partition("the reference trainer:")[2].split(",")]
    assert len(parts) >= 7
    for part in parts:
        assert (ROOT / "spectral_ops" / "continual" / (part if part.endswith("/") else f"{part}.py")).exists(), part
