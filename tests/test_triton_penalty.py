"""The one-launch kernel, on a device or else in Triton's interpreter: every path against float64, and really taken.

What all backends must do is tested with theirs (the `backend` fixture); here is what only this kernel has.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, eps, error, relative_error, same_bits
from torch import Tensor

pytest.importorskip("triton")

from triton_problem import (
    DEVICE,
    EXPONENT,
    INTERPRETED,
    MATRIX,
    PATHS,
    STRENGTH,
    TARGET,
    Problem,
    _triton,  # noqa: F401
    columns_last,
    looks_inside,
    make,
    on_device,
)

from spectral_ops import power_iteration  # noqa: E402
from spectral_ops.kernels import combine, table  # noqa: E402
from spectral_ops.ops import triton_debug, triton_table  # noqa: E402
from spectral_ops.ops.layout import Kind, Layout, pack  # noqa: E402
from spectral_ops.ops.triton_table import State  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize(("weights", "layouts", "modes"), PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("fixed_order", [True, False], ids=["fixed_order", "atomics"])
def test_every_path(
    weights: Any, layouts: list[Layout], modes: set[int], fixed_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_table, "FIXED_ORDER", fixed_order)
    problem = Problem(weights(), layouts)
    value = problem.step()
    problem.check(value)
    assert problem.modes() == modes
    assert problem.table._cuts and len(problem.rows()) == 1  # one launch
    # What a launch leaves behind is what the next one expects.
    problem.remember()
    problem.check(problem.step())


@pytest.mark.parametrize(
    "name",
    [
        "strips",
        "blocks",
        "channels_last",
        "transposed conv",
        "by column",
        "two pieces",
        "six pieces",
        "two copies",
        "no copies",
    ],
)
def test_the_cut_is_what_the_name_of_the_path_says(name: str) -> None:
    weights, layouts, _ = PATHS[name]
    problem = Problem(weights(), layouts)
    problem.step()
    (rows,) = problem.rows()
    share = rows.cut.shares[0]
    first = rows.template[0]
    if name.endswith("pieces"):
        assert rows.cut.read_variants[0][2] == {"two": 2, "six": 6}[name.split()[0]]
    if name.endswith("copies"):
        assert rows.cut.read_variants[0][5] == {"two": 2, "no": 1}[name.split()[0]]
    assert share.strips > 1 or name not in ("strips", "by column")
    assert (share.blocks > 1) == (name in ("blocks", "six pieces", "two copies", "no copies"))
    assert (first[table.W_ORDER.value] != 0) == (name == "channels_last")
    assert (first[table.W_PLACES.value] != 0) == (name == "transposed conv")


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype"), [(BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16)], ids=str
)
def test_dtypes(dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    matrices = [make(m, n, dtype) for m, n in ((70, 48), (20, 33), (20, 264), (9, 1160))]
    problem = Problem([*matrices, torch.randn(9).to(dtype)], [MATRIX] * 4 + [Layout(Kind.BIAS)], gradient_dtype)
    problem.check(problem.step())


def test_one_launch_for_each_pair_of_dtypes() -> None:
    weights = [make(20, 33, BF16), 1 + 0.1 * torch.randn(9), make(12, 16, F16), torch.randn(9).to(BF16)]
    problem = Problem(weights, [MATRIX, Layout(Kind.SCALE), MATRIX, Layout(Kind.BIAS)])
    problem.check(problem.step())
    assert [rows.items for rows in problem.rows()] == [[0, 3], [1], [2]]


@pytest.mark.parametrize("exponent", [1.0, 1.5, 3.0])
def test_exponents(exponent: float) -> None:
    weights, layouts, _ = PATHS["mixed"]
    problem = Problem(weights(), layouts, exponent=exponent)
    problem.check(problem.step())


def test_scaled_and_skipped_steps() -> None:
    weights, layouts, _ = PATHS["mixed"]
    problem = Problem(weights(), layouts)
    problem.check(problem.step(grad_scale=8.0, found_inf=torch.tensor(0.0, device=DEVICE)), factor=8 * STRENGTH)
    left = [x.clone() for x in (problem.v, problem.exponents, problem.sigma, *problem.gradients)]
    problem.step(grad_scale=torch.tensor(8.0), found_inf=torch.tensor(1.0, device=DEVICE))
    now = (problem.v, problem.exponents, problem.sigma, *problem.gradients)
    assert all(same_bits(a, b) for a, b in zip(left, now, strict=True))


# ---- the second reading, when the range was left ----


@looks_inside
@pytest.mark.parametrize("name", ["aligned", "channels_last", "transposed conv", "by column", "chunked"])
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**70], ids=["small", "large"])
@pytest.mark.parametrize("fixed_order", [True, False], ids=["fixed_order", "atomics"])
def test_an_exponent_out_of_date_is_renewed(
    name: str, scale: float, fixed_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_table, "FIXED_ORDER", fixed_order)
    readings = []
    once_more = combine.read_again
    monkeypatch.setattr(combine, "read_again", lambda *args: (readings.append(1), once_more(*args)))
    weights, layouts, _ = PATHS[name]
    problem = Problem([w * scale for w in weights()], layouts)
    state = State(problem.v, problem.v, problem.exponents, problem.exponents, problem.sigma, None)
    problem.table.step(problem.weights, (), state, EXPONENT)
    _, sigmas, _, v = problem.truth()
    assert len(readings) == sum(layout.parts for layout in layouts)
    assert relative_error(problem.sigma, sigmas) <= 16 * eps(F32) and error(problem.v, v) <= 16 * eps(F32)
    assert torch.equal(problem.exponents, torch.frexp(problem.sigma).exponent - 1)
    problem.table.step(problem.weights, (), state, EXPONENT)  # known now: no second reading
    assert len(readings) == sum(layout.parts for layout in layouts)


@looks_inside
@pytest.mark.parametrize("power", [-26.5, -24.5, -23.5, -8.0, 16.0, 23.5, 24.5, 26.5])
def test_in_range_nothing_is_read_again(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once sigma is known, wherever it lies: also where scaling by its exponent begins."""
    matrix = make(37, 48)
    problem = Problem([matrix / torch.linalg.matrix_norm(matrix, 2) * 2.0**power], [MATRIX])
    problem.step()
    monkeypatch.setattr(combine, "largest_element", None)  # calling it would raise
    for _ in range(3):
        problem.step()


# ---- several iterations, several programs ----


@pytest.mark.slow
@pytest.mark.parametrize("n_iter", [2, 5])
def test_iterations_in_one_launch_are_steps(n_iter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [make(300, 40), make(5, 1300), columns_last(70, 40), torch.zeros(4, 6), torch.empty(0, 5), make(6, 6)]
    weights = [on_device(w) for w in weights]
    v = [torch.nn.functional.normalize(torch.randn(w.shape[1], device=DEVICE), dim=0) for w in weights]
    apart = [x.clone() for x in v]
    for _ in range(n_iter):
        sigma, u, _ = power_iteration(weights, apart)
    together = [x.clone() for x in v]
    launches = []
    launch = triton_table.launch_penalty
    monkeypatch.setattr(triton_table, "launch_penalty", lambda *args: (launches.append(args), launch(*args)))
    sigma_once, u_once, _ = power_iteration(weights, together, n_iter=n_iter)
    assert len(launches) == 1
    # The exponents of later steps are the first one's, a power of two: the same bits.
    assert same_bits(sigma_once, sigma)
    assert all(same_bits(a, b) for a, b in zip([*u_once, *together], [*u, *apart], strict=True))


def partitioned(problem: Problem, tiles_each: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A step in which a program takes so many tiles at most, and programs run one after another."""
    settings = {"debug": True, "looks": 5 if INTERPRETED else 1 << 20, "tiles_each": tiles_each}
    monkeypatch.setattr(triton_table, "debug_settings", lambda: settings)
    work = triton_table.Memory.work

    def with_programs(memory: Any, *args: Any) -> Any:
        found = work(memory, *args)
        return found._replace(programs=-(-found.tiles.shape[0] // tiles_each) + 2)  # two that find nothing left

    monkeypatch.setattr(triton_table.Memory, "work", with_programs)
    value = problem.step()
    monkeypatch.undo()
    return value


@pytest.mark.parametrize("tiles_each", [1, 2, 7])
def test_programs_share_the_tiles_and_change_no_bit(tiles_each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, layouts, _ = PATHS["mixed"]
    results = []
    for each in (None, tiles_each):
        torch.manual_seed(3)
        problem = Problem([*weights(), make(300, 40)], [*layouts, MATRIX])
        value = problem.step() if each is None else partitioned(problem, each, monkeypatch)
        problem.check(value)
        results.append([value, problem.v, problem.sigma, problem.exponents, *problem.gradients])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_delays_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, layouts, _ = PATHS["mixed"]
    results = []
    for delays in ("0", "7"):
        torch.manual_seed(3)
        monkeypatch.setenv("SPECTRAL_OPS_DEBUG", "1")
        monkeypatch.setenv("SPECTRAL_OPS_DELAYS", delays)
        problem = Problem(weights(), layouts)
        results.append([problem.step(), problem.v, problem.sigma, *problem.gradients])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@looks_inside  # the strips are an interpreted launch's
def test_a_wait_that_never_ends_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRAL_OPS_DEBUG", "1")
    monkeypatch.setattr(triton_debug, "LOOKS_INTERPRETED", 3)
    monkeypatch.setattr(triton_debug, "LOOKS", 1000)
    problem = Problem([make(300, 40)], [MATRIX])
    problem.step()  # with nothing to wait for in vain
    (rows,) = problem.rows()
    right, strips = rows.tiles, rows.cut.shares[0].strips
    rows.tiles = right.flip(0).contiguous()  # gradients first
    problem.table._memories.clear()
    with pytest.raises(RuntimeError, match=rf"ticket 0, the gradient of strip {strips - 1} of weights\[0\] \(row 0"):
        problem.step()
    combining = [tile for tile in right.tolist() if tile[0] == table.COMBINE_TILE.value]
    others = [tile for tile in right.tolist() if tile[0] != table.COMBINE_TILE.value]
    rows.tiles = torch.tensor([*combining, *others], dtype=torch.int32, device=DEVICE)
    problem.table._memories.clear()
    with pytest.raises(RuntimeError, match=f"combining block 0 .* waited for {strips} strips read, found 0"):
        problem.step()
    rows.tiles = right
    problem.table._memories.clear()
    problem.remember()
    problem.check(problem.step())


# ---- the autograd form ----


@pytest.mark.parametrize("name", PATHS)
def test_backward_is_one_launch_that_gives_the_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    for launcher in ("launch_penalty", "launch_penalty_backward"):
        launch = getattr(triton_table, launcher)
        monkeypatch.setattr(
            triton_table,
            launcher,
            lambda *args, launch=launch, launcher=launcher: (launches.append(launcher), launch(*args)),
        )
    weights, layouts, _ = PATHS[name]
    problem = Problem(weights(), layouts)
    leaves = [w.clone(memory_format=torch.preserve_format).requires_grad_() for w in problem.weights]
    flat = pack(layouts)
    ones = [1.0] * len(leaves)
    targets = [TARGET if layout.is_matrix else 1.0 for layout in layouts]
    value, *_ = torch.ops.spectral_ops.spectral_penalty(
        leaves, problem.v, problem.exponents, flat, targets, ones, EXPONENT
    )
    (STRENGTH * value).backward()
    _, _, added, _ = problem.truth()
    for leaf, true in zip(leaves, added, strict=True):
        assert leaf.grad is not None
        assert error(leaf.grad.cpu(), true) <= 64 * eps(F32) * max(true.abs().max().item(), TARGET)
    assert launches == ["launch_penalty", "launch_penalty_backward"]


@looks_inside
def test_the_kernels_are_interpreted() -> None:
    """Else everything above would have run something else."""
    module: ModuleType = combine
    assert type(module.finish).__name__ == "InterpretedFunction"
