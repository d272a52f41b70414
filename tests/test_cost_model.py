"""bench/cost_model.py and the shapes it is about: published sizes, hand-computed times, what grows with what."""

from __future__ import annotations

import math

import pytest
from bench_fixtures import ROOT

from bench import cost_model, record
from bench.case import FLOOR
from bench.cost_model import (
    GRADIENT,
    H200_MEMORY,
    H200_NETWORK,
    ITEM,
    OPS,
    OURS,
    TORCH,
    VALUE,
    Memory,
    Network,
    added_seconds,
    all_reduce_seconds,
    collective_bytes,
    launches,
    memory_from_floors,
    moved_bytes,
    step_seconds,
    training_seconds,
)
from bench.vit_shapes import LADDER, VITS, ViT

STEPS = ROOT / "bench" / "results" / "nvidia-h200-2026-11-28-steps.json"
# One block of width 2 and MLP 8: 16 + 32 parameters, parts of 2, 2, 2, 2, 2 and 8 columns.
TINY = ViT(2, 1, 8, "none")
MEMORY = Memory({VALUE: 100.0, GRADIENT: 50.0, OURS: 10.0}, launch_s=1.0, pass_s=2.0)
NETWORK = Network(per_node=4, node_rate=10.0, network_rate=5.0, base_s=100.0, node_s=3.0, network_s=7.0)
RANKS = (1, 2, 8, 16, 64, 1024)


@pytest.mark.parametrize("name", VITS)
def test_block_matrices_are_the_published_models(name: str) -> None:
    """What they lack are embeddings, biases, norms and heads: 4 % of ViT-S and of ViT-e (30,000 classes), else 2."""
    shape = VITS[name]
    assert shape.published is not None
    assert shape.parameters == pytest.approx(shape.published, rel=0.065 if name == "vit-ti" else 0.035)
    assert sum(m * n for m, n in shape.parts) == sum(m * n for m, n in shape.matrices)
    assert shape.source and "arXiv" in shape.source


def test_the_ladder_goes_up() -> None:
    assert LADDER == ("vit-s", "vit-b", "vit-l", "vit-h", "vit-g", "vit-G", "vit-e", "vit-22b")
    sizes = [VITS[name].parameters for name in LADDER]
    assert sizes == sorted(sizes)
    assert (VITS["vit-l"].tokens, VITS["vit-22b"].tokens) == (196, 256)


def test_bytes_by_hand() -> None:
    assert TINY.parameters == 48 and TINY.columns == 18
    for dtype, value, gradient, ours, torchs in (("float32", 4, 12, 28, 28), ("bfloat16", 2, 6, 22, 14)):
        found = [moved_bytes(op, TINY.parameters, dtype) for op in OPS]
        assert found == [48 * each for each in (value, gradient, ours, torchs)]
    assert collective_bytes(TINY) == 8 * (18 + 2 * 6)  # z of six parts, and two sums of each


def test_bytes_are_those_of_the_benchmarks() -> None:
    """As stored cases counted them from real tensors."""
    seen = set()
    for case in record.read(STEPS)["cases"]:
        op = {"accumulate_grad": GRADIENT, "spectral_penalty/value": VALUE, "adamw": OURS}.get(
            case["name"].rsplit("/", 2)[0]
        )
        if op is not None:
            seen.add(op)
            assert case["bytes"] == moved_bytes(op, case["parameters"], case["dtype"])
            assert case["parameters"] == VITS[case["name"].split("/")[-2]].parameters
    assert seen == {VALUE, GRADIENT, OURS}


def test_times_by_hand() -> None:
    on_one = [step_seconds(op, TINY, "float32", MEMORY) for op in OPS]
    moved = (4 * 48 / 100, 12 * 48 / 50, 28 * 48 / 10, 28 * 48 / 10)
    # One launch and one pass; torch's: one launch of elements and one of step counts.
    assert on_one == pytest.approx([1 + 2 + moved[0], 1 + 2 + moved[1], 1 + 2 + moved[2], 2 * 1 + 2 + moved[3]])
    # On two ranks half of the bytes, a second launch and pass, and the all-reduce of 240 bytes, torch's without it.
    reduced = 100 + 2 * 3 + 240 / 10
    assert all_reduce_seconds(240, 2, NETWORK) == pytest.approx(reduced)
    on_two = [step_seconds(op, TINY, "float32", MEMORY, 2, NETWORK) for op in OPS]
    expected = [2 * (1 + 2) + x / 2 + reduced for x in moved[:3]] + [2 * 1 + 2 + moved[3] / 2]
    assert on_two == pytest.approx(expected)


def test_the_all_reduce_by_hand() -> None:
    # Two nodes of four: 3 hops in the node and one between, there and back; 3/4 twice within, a quarter between.
    latency = 100 + 2 * (3 * 3 + 7)
    assert all_reduce_seconds(240, 8, NETWORK) == pytest.approx(latency + 1.5 * 240 / 10 + 60 / 5)
    # Five nodes: a tree of depth 3, and 8/5 of a quarter.
    assert all_reduce_seconds(240, 20, NETWORK) == pytest.approx(100 + 2 * (9 + 21) + 36 + 1.6 * 60 / 5)
    assert all_reduce_seconds(1e9, 1, NETWORK) == 0.0


def test_one_rank_has_no_collective() -> None:
    free = Network(8, math.inf, math.inf, 0.0, 0.0, 0.0)
    for op in OPS:
        alone = step_seconds(op, VITS["vit-l"], "float32", H200_MEMORY)
        assert step_seconds(op, VITS["vit-l"], "float32", H200_MEMORY, 1, H200_NETWORK) == alone
        assert step_seconds(op, VITS["vit-l"], "float32", H200_MEMORY, 1, free) == alone


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ITEM)
def test_larger_models_take_longer(op: str, dtype: str) -> None:
    for ranks in RANKS:
        times = [step_seconds(op, VITS[name], dtype, H200_MEMORY, ranks, H200_NETWORK) for name in LADDER]
        assert times == sorted(times) and len(set(times)) == len(times)
    assert moved_bytes(VALUE, 10, dtype) < moved_bytes(GRADIENT, 10, dtype) < moved_bytes(OURS, 10, dtype)


def test_the_collective_grows_with_ranks_and_bytes() -> None:
    for size in (1e3, 1e6, 1e9):
        times = [all_reduce_seconds(size, ranks, H200_NETWORK) for ranks in RANKS]
        assert times == sorted(times) and len(set(times)) == len(times)
        assert all_reduce_seconds(2 * size, 64, H200_NETWORK) > all_reduce_seconds(size, 64, H200_NETWORK)


def test_more_ranks_take_less_of_what_is_no_collective() -> None:
    shape = VITS["vit-22b"]
    left = [
        step_seconds(GRADIENT, shape, "float32", H200_MEMORY, ranks, H200_NETWORK)
        - all_reduce_seconds(collective_bytes(shape), ranks, H200_NETWORK)
        for ranks in RANKS
    ]
    assert left == sorted(left, reverse=True)


def test_launches() -> None:
    """torch's as the H200's profiler counted them in the stored results."""
    counted = {}
    for case in record.read(STEPS)["cases"]:
        if case["name"].startswith("adamw/"):
            rows = {row["name"]: row for row in case["rows"]}
            counted[case["name"].split("/")[1]] = rows["AdamW(fused)"]["launches"]
    assert counted == {name: launches(TORCH, VITS[name].parameters) for name in ("vit-l", "vit-b")}
    assert [launches(op, 10**9) for op in (VALUE, GRADIENT, OURS)] == [1, 1, 1]
    assert [launches(op, 10**9, 8) for op in (VALUE, GRADIENT, OURS)] == [2, 2, 2]


def test_the_rates_are_the_stored_floors() -> None:
    """H200_MEMORY is what the file says, to the three digits it is written with."""
    names = {"spectral_penalty/value": VALUE, "accumulate_grad": GRADIENT, "adamw": OURS}
    floors = {}
    for case in record.read(STEPS)["cases"]:
        op, model, dtype = case["name"].rsplit("/", 2)
        if op in names and (model, dtype) == ("vit-l", "float32"):
            seconds = next(row["seconds"]["median"] for row in case["rows"] if row["name"] == FLOOR)
            floors[names[op]] = (case["bytes"], seconds)
    found = memory_from_floors(
        floors, launch_s=H200_MEMORY.launch_s, pass_s=0.0, measuring_s=cost_model.CUDA_MEASURING_S
    )
    assert found.rates == pytest.approx(H200_MEMORY.rates, rel=2e-3)


def test_rates_from_floors() -> None:
    found = memory_from_floors({VALUE: (100.0, 3.0)}, launch_s=0.5, pass_s=0.25, measuring_s=0.5)
    assert found == Memory({VALUE: 50.0}, 0.5, 0.25)
    with pytest.raises(ValueError, match="memory_from_floors: expected the floor of 'value' to take longer than a"):
        memory_from_floors({VALUE: (100.0, 1.0)}, launch_s=0.5, pass_s=0.0, measuring_s=0.5)


def test_the_training_step() -> None:
    flops = 6 * 48 * 196 + 12 * 1 * 2 * 196**2
    assert TINY.flops_per_image == flops
    assert training_seconds(TINY, images=3, flops=100.0, utilisation=0.5) == pytest.approx(3 * flops / 50)


def test_what_the_penalty_adds() -> None:
    shape = VITS["vit-b"]
    place = (shape, "float32", H200_MEMORY, 8, H200_NETWORK)
    assert added_seconds(GRADIENT, *place) == step_seconds(GRADIENT, *place)
    assert added_seconds(OURS, *place) == step_seconds(OURS, *place) - step_seconds(TORCH, *place) > 0
    assert added_seconds(OURS, shape, "float32", H200_MEMORY) == 0.0  # one launch for torch's six


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(ValueError, match="check_ranks: expected ranks to be at least 1, got 0. Use 1"):
        all_reduce_seconds(1.0, 0, NETWORK)
    with pytest.raises(ValueError, match="to be at most 4 or a multiple of it, got 6. Use whole nodes, such as 8."):
        step_seconds(TORCH, TINY, "float32", MEMORY, 6, NETWORK)
    with pytest.raises(ValueError, match="step_seconds: expected ranks to be 1 without a network, got 2"):
        step_seconds(VALUE, TINY, "float32", MEMORY, 2)
    with pytest.raises(ValueError, match="moved_bytes: expected op to be one of value, .* got 'norm'"):
        moved_bytes("norm", 1, "float32")
    with pytest.raises(ValueError, match="moved_bytes: expected dtype to be one of float32, bfloat16, got 'float64'"):
        moved_bytes(VALUE, 1, "float64")
