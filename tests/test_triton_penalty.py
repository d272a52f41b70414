"""The one-launch kernel, on a device or else in Triton's interpreter: every path against float64, and really taken.

What all backends must do is tested with theirs (the `backend` fixture); here is what only this kernel has.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import BF16, F16, F32, F64, eps, error, gaussian, relative_error, same_bits
from torch import Tensor

pytest.importorskip("triton")

from spectral_ops import backends, power_iteration, spectral_penalty  # noqa: E402
from spectral_ops.kernels import combine, table  # noqa: E402
from spectral_ops.ops import triton_debug, triton_table  # noqa: E402
from spectral_ops.ops.layout import Kind, Layout, as_matrices, sizes  # noqa: E402
from spectral_ops.ops.triton_table import State, TritonTable  # noqa: E402

STRENGTH, EXPONENT, TARGET = 0.37, 2.0, 0.8
MATRIX = Layout()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
looks_inside = pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")


def on_device(t: Tensor) -> Tensor:
    """The same numbers at the same strides and the same distance from an aligned address."""
    store = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(DEVICE)
    return store.as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with backends.use_backend("triton"):
        yield


@dataclass
class Problem:
    """Parameters, gradients that are not zero, vectors that are not converged, and a table."""

    weights: list[Tensor]
    layouts: list[Layout]
    gradient_dtype: torch.dtype | None = None
    exponent: float = EXPONENT
    exponents: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weights = [on_device(w) for w in self.weights]
        self.gradients = [(0.1 * torch.randn(w.shape)).to(self.gradient_dtype or w.dtype) for w in self.weights]
        self.gradients = [g.contiguous().to(DEVICE) for g in self.gradients]
        shapes = [sizes(w.shape, x) for w, x in zip(self.weights, self.layouts, strict=True) if x.is_matrix]
        # Of one sign: hardly ever nearly orthogonal to all rows, which would cost y its digits.
        units = [torch.nn.functional.normalize(0.1 + torch.rand(s.parts, s.n), dim=1).flatten() for s in shapes]
        self.v = torch.cat([*units, torch.empty(0)]).to(DEVICE)
        count = sum(s.parts for s in shapes)
        self.exponents = torch.zeros(count, dtype=torch.int32, device=DEVICE)
        self.sigma = torch.full((count,), -1.0, device=DEVICE)
        self.remember()
        ones = [1.0] * len(self.weights)
        self.table = TritonTable(self.layouts, [TARGET if x.is_matrix else 1.0 for x in self.layouts], ones)

    def remember(self) -> None:
        """What the next step starts from."""
        self.before = [g.double().cpu() for g in self.gradients]
        self.start = self.v.cpu().clone()

    def step(self, **options: Any) -> Tensor:
        state = State(self.v, self.v, self.exponents, self.exponents, self.sigma, None)
        return self.table.step(self.weights, self.gradients, state, self.exponent, STRENGTH, **options)

    def truth(self, factor: float = STRENGTH) -> tuple[float, Tensor, list[Tensor], Tensor]:
        """R, sigmas, what is added to each gradient, and the next v, of one step in float64."""
        value, sigmas, added, vs, at = 0.0, [], [], [], 0
        for w, layout in zip(self.weights, self.layouts, strict=True):
            x = w.detach().cpu().double().requires_grad_()
            if layout.is_matrix:
                parts, _, n = sizes(w.shape, layout)
                v = self.start[at : at + parts * n].view(parts, n).double()
                at += parts * n
                matrices = as_matrices(x, layout).flatten(2)
                y = torch.einsum("pmn,pn->pm", matrices, v)
                u = (y / y.norm(dim=1, keepdim=True)).detach()
                z = torch.einsum("pmn,pm->pn", matrices, u)
                term = ((z.norm(dim=1) ** self.exponent - TARGET**self.exponent) ** 2).sum()
                sigmas.append(z.norm(dim=1).detach())
                vs.append((z / z.norm(dim=1, keepdim=True)).detach().flatten())
            elif layout.kind is Kind.BIAS:
                term = (as_matrices(x, layout).flatten(1).square().sum(dim=1) ** self.exponent).sum()
            elif layout.kind is Kind.SCALE:
                term = ((x.abs() ** self.exponent - 1) ** 2).sum()
            else:
                term = (x.square() ** self.exponent).sum()
            added.append(factor * torch.autograd.grad(term, x)[0])
            value += term.item()
        none = torch.empty(0, dtype=F64)
        return value, torch.cat([*sigmas, none]), added, torch.cat([*vs, none])

    def check(self, value: Tensor, factor: float = STRENGTH) -> None:
        r, sigmas, added, v = self.truth(factor)
        # Sums of a few thousand float32 products: measured 3 roundings.
        assert relative_error(self.sigma.cpu(), sigmas) <= 16 * eps(F32)
        assert error(self.v.cpu(), v) <= 16 * eps(F32)
        assert abs(value.item() - STRENGTH * r) <= 64 * eps(F32) * STRENGTH * max(r, 1.0)
        for gradient, before, more in zip(self.gradients, self.before, added, strict=True):
            largest = (before + more).abs().max().item()
            rounding = 0.5 * torch.finfo(gradient.dtype).eps * largest  # once, to the gradient's dtype
            cancelled = 64 * eps(F32) * max(largest, more.abs().max().item(), TARGET)
            assert error(gradient.cpu(), before + more) <= rounding + cancelled

    def rows(self) -> list[Any]:
        return [rows for cuts in self.table._cuts.values() for rows in cuts.rows]

    def modes(self) -> set[int]:
        return {variant[0] for rows in self.rows() for variant in rows.cut.read_variants}


def columns_last(m: int, n: int) -> Tensor:
    return gaussian("columns", n, m).float().t()


def make(m: int, n: int, dtype: torch.dtype = F32) -> Tensor:
    return (gaussian("w", m, n) / math.sqrt(max(m, n))).to(dtype)


PATHS = {
    # One sweep: aligned, unaligned, in pieces; one row, one column, several strips, several blocks of columns.
    "aligned": (lambda: [make(37, 48)], [MATRIX], {table.ONE_SWEEP}),
    "unaligned": (lambda: [make(20, 33)], [MATRIX], {table.ONE_SWEEP}),
    "two pieces": (lambda: [make(9, 384)], [MATRIX], {table.ONE_SWEEP}),
    "three pieces": (lambda: [make(9, 760)], [MATRIX], {table.ONE_SWEEP}),
    "one row": (lambda: [make(1, 70)], [MATRIX], {table.ONE_SWEEP}),
    "one column": (lambda: [make(70, 1)], [MATRIX], {table.ONE_SWEEP}),
    "one element": (lambda: [make(1, 1)], [MATRIX], {table.ONE_SWEEP}),
    "strips": (lambda: [make(300, 40)], [MATRIX], {table.ONE_SWEEP}),
    "blocks": (lambda: [make(5, 1300)], [MATRIX], {table.ONE_SWEEP}),
    "rows with gaps": (lambda: [make(20, 50)[:, :33]], [MATRIX], {table.ONE_SWEEP}),
    "odd address": (lambda: [make(1, 641).flatten()[1:].view(20, 32)], [MATRIX], {table.ONE_SWEEP}),
    "channels_last": (
        lambda: [make(8, 144).view(8, 16, 3, 3).to(memory_format=torch.channels_last)],
        [MATRIX],
        {table.ONE_SWEEP},
    ),
    "groups": (lambda: [make(8, 36).view(8, 4, 3, 3)], [Layout(Kind.MATRIX, 4, 0, 0)], {table.ONE_SWEEP}),
    # Two sweeps: rows too long for registers; strides.
    "chunked": (lambda: [make(5, 9000)], [MATRIX], {table.CHUNKED}),
    "chunked, unaligned": (lambda: [make(5, 8201)], [MATRIX], {table.CHUNKED}),
    "by column": (lambda: [columns_last(130, 70)], [MATRIX], {table.BY_COLUMN}),
    "Conv1D": (lambda: [make(24, 72)], [Layout(Kind.MATRIX, 3, 1, 1)], {table.BY_COLUMN}),
    "strided": (lambda: [make(40, 300)[:, ::3]], [MATRIX], {table.STRIDED}),
    "expanded": (lambda: [make(1, 30).expand(40, 30)], [MATRIX], {table.ONE_SWEEP}),
    "expanded columns": (lambda: [make(40, 1).expand(40, 30)], [MATRIX], {table.BY_COLUMN}),
    "transposed conv": (lambda: [make(8, 144).view(8, 16, 3, 3)], [Layout(Kind.MATRIX, 2, 0, 1)], {table.STRIDED}),
    # Everything in one launch.
    "mixed": (
        lambda: [
            make(37, 48),
            torch.randn(9),
            make(20, 33),
            columns_last(70, 40),
            1 + 0.1 * torch.randn(1500),
            torch.randn(11),
        ],
        [MATRIX, Layout(Kind.BIAS, 3), MATRIX, MATRIX, Layout(Kind.SCALE), Layout(Kind.SHIFT)],
        {table.ONE_SWEEP, table.BY_COLUMN},
    ),
}


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
    ["strips", "blocks", "channels_last", "transposed conv", "by column", "two pieces", "three pieces"],
)
def test_the_cut_is_what_the_name_of_the_path_says(name: str) -> None:
    weights, layouts, _ = PATHS[name]
    problem = Problem(weights(), layouts)
    problem.step()
    (rows,) = problem.rows()
    share = rows.cut.shares[0]
    first = rows.template[0]
    if name.endswith("pieces"):
        assert rows.cut.read_variants[0][2] == {"two": 2, "three": 3}[name.split()[0]]
    assert share.strips > 1 or name not in ("strips", "by column")
    assert (share.blocks > 1) == (name in ("blocks", "three pieces"))
    assert (first[table.W_ORDER.value] != 0) == (name == "channels_last")
    assert (first[table.W_PLACES.value] != 0) == (name == "transposed conv")


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype"), [(BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16)], ids=str
)
def test_dtypes(dtype: torch.dtype, gradient_dtype: torch.dtype) -> None:
    bias, matrices = torch.randn(9).to(dtype), [make(70, 48, dtype), make(20, 33, dtype)]
    problem = Problem([*matrices, bias], [MATRIX, MATRIX, Layout(Kind.BIAS)], gradient_dtype)
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
    right = rows.tiles
    rows.tiles = right.flip(0).contiguous()  # gradients first
    problem.table._memories.clear()
    with pytest.raises(RuntimeError, match=r"ticket 0, the gradient of strip 4 of weights\[0\] \(row 0, iteration 1\)"):
        problem.step()
    combining = [tile for tile in right.tolist() if tile[0] == table.COMBINE_TILE.value]
    others = [tile for tile in right.tolist() if tile[0] != table.COMBINE_TILE.value]
    rows.tiles = torch.tensor([*combining, *others], dtype=torch.int32, device=DEVICE)
    problem.table._memories.clear()
    with pytest.raises(RuntimeError, match=r"combining block 0 .* waited for 5 strips read, found 0"):
        problem.step()
    rows.tiles = right
    problem.table._memories.clear()
    problem.remember()
    problem.check(problem.step())


# ---- the table on the host ----


def test_memory_does_not_grow_with_shapes_that_alternate() -> None:
    problem = Problem([make(20, 32)], [MATRIX])
    shapes = [(20, 32), (30, 32), (20, 32), (30, 32), (20, 32)]
    for m, n in shapes:
        problem.weights[0] = on_device(make(m, n))
        problem.gradients[0] = torch.zeros(m, n, device=DEVICE)
        problem.step()
        assert len(problem.table._memories) == 1


def test_the_value_is_a_tensor_of_its_own() -> None:
    w = on_device(make(5, 6))
    value = spectral_penalty([w.requires_grad_()], [torch.full((6,), 6**-0.5, device=DEVICE)])
    assert value._base is None
    value += 1  # in place, as a loss is added up
    value.backward()


def test_rows_are_uploaded_only_when_an_address_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem([make(20, 33), torch.randn(9)], [MATRIX, Layout(Kind.BIAS)])
    problem.step()
    (rows,) = problem.rows()
    uploads = []
    addressed = rows.addressed
    monkeypatch.setattr(rows, "addressed", lambda *args: (uploads.append(1), addressed(*args))[1])
    problem.step()
    assert uploads == []
    problem.gradients[1] = torch.zeros(9, device=DEVICE)
    problem.step()
    assert uploads == [1] and problem.gradients[1].abs().max() > 0
    problem.weights[0] = problem.weights[0].clone()
    problem.step()
    assert uploads == [1, 1] and problem.rows() == [rows]


def test_the_table_is_cut_anew_for_other_strides_alignment_or_dtypes() -> None:
    problem = Problem([make(20, 32)], [MATRIX])
    problem.step()
    seen = problem.rows()
    store = torch.empty(20 * 32 + 1, device=DEVICE)
    for other in (on_device(columns_last(20, 32)), store[1:].view(20, 32), store[1:].view(20, 32).to(BF16)):
        problem.weights[0] = other.copy_(make(20, 32))
        problem.gradients[0] = torch.zeros(20, 32, dtype=problem.weights[0].dtype, device=DEVICE)
        problem.remember()
        problem.check(problem.step())
        assert problem.rows()[0] is not seen[0]
        seen = problem.rows()


def test_a_launch_that_failed_leaves_the_next_one_right(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem([make(300, 40)], [MATRIX])
    problem.step()
    launch = triton_table.launch_penalty

    def fail(work: Any, *args: Any) -> None:
        work.counters.fill_(7)  # as a launch that ended halfway leaves them
        raise RuntimeError("out of memory")

    monkeypatch.setattr(triton_table, "launch_penalty", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        problem.step()
    monkeypatch.setattr(triton_table, "launch_penalty", launch)
    problem.remember()
    problem.check(problem.step())


@pytest.mark.parametrize(
    ("gradient", "kind", "text"),
    [
        (torch.zeros(4, 3), ValueError, "of shape"),
        (torch.zeros(3, 4, dtype=F64), TypeError, "float32, bfloat16 or float16"),
        (torch.zeros(3, 1, device=DEVICE).expand(3, 4), ValueError, "memory for every element"),
        (torch.zeros(3, 4).to_sparse(), TypeError, "dense"),
    ],
    ids=["shape", "dtype", "expanded", "sparse"],
)
def test_a_wrong_gradient_is_named_before_anything_is_launched(gradient: Tensor, kind: Any, text: str) -> None:
    problem = Problem([make(5, 6), make(3, 4)], [MATRIX, MATRIX])
    kept = [x.clone() for x in (problem.v, *problem.gradients)]
    right, problem.gradients[1] = problem.gradients[1], gradient.to(DEVICE)
    with pytest.raises(kind, match=text):
        problem.step()
    problem.gradients[1] = right
    assert all(same_bits(a, b) for a, b in zip(kept, (problem.v, *problem.gradients), strict=True))


def test_float64_has_no_kernel_and_says_so() -> None:
    w = torch.randn(3, 4, dtype=F64, device=DEVICE)
    with pytest.raises(RuntimeError, match="'triton', which has no float64 kernel. Use 'auto' or 'reference'"):
        spectral_penalty([w], [torch.ones(4, dtype=F64, device=DEVICE) / 2])
    with backends.use_backend("auto"):
        spectral_penalty([w], [torch.ones(4, dtype=F64, device=DEVICE) / 2])


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
    flat = [number for layout in layouts for number in (int(layout.kind), *layout[1:])]
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
