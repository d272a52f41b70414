"""csrc from the inside: threads, instruction sets, and proof that every path through the table is reached."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from helpers import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NAMES,
    eps,
    error,
    gaussian,
    relative_error,
    same_bits,
    step_in_float64,
    svd,
    unit,
)
from layout_samples import SAMPLES, channels_last, spread, transposed, window
from torch import Tensor

from spectral_ops import backends, power_iteration, spectral_norm, spectral_penalty
from spectral_ops.ops.accumulate_grad import accumulate_grad
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout, pack, vector_dtype

OPS = torch.ops.spectral_ops
ISAS = ("baseline", "avx2", "avx512")
COLUMN_BLOCK = 4096  # csrc/table.h


@pytest.fixture(autouse=True)
def native() -> Iterator[ModuleType]:
    reason = backends.available()["native"]
    if reason is not None:
        pytest.skip(f"native not usable: {reason}")
    module = backends.native()
    before = module.isa()
    with backends.use_backend("native"):
        yield module
    assert module.select_isa(before)


def table_of(w: Tensor, layout: Layout) -> ModuleType:
    return LayerTable([layout], [1.0], [1.0]).native.at([w]).table


# ---- the number of threads changes no bit ----


def everything(dtype: torch.dtype) -> tuple[list[Tensor], list[Layout], Tensor]:
    """Every layout, vectors, and matrices of many strips and column blocks, with something odd in each range."""
    tensors = [sample.tensor(dtype) for sample in SAMPLES]
    layouts = [sample.layout for sample in SAMPLES]
    vectors = [x for sample in SAMPLES for x in sample.vectors(dtype)]
    large = [gaussian("large", 700, 400), gaussian("wide", 40, 9000), torch.zeros(50, 5000, dtype=F64)]
    large += [1e4 * gaussian("again", 300, 600)] + ([1e-15 * gaussian("small", 300, 600)] if dtype != F16 else [])
    spoilt = gaussian("spoilt", 300, 600)
    spoilt[299, 599] = math.nan
    for i, w in enumerate([*large, spoilt]):
        tensors.append(w.to(dtype))
        layouts.append(Layout())
        vectors.append(unit(f"large{i}", w.shape[1]).to(vector_dtype(dtype)))
    for kind in (Kind.BIAS, Kind.SCALE, Kind.SHIFT):
        tensors.append(gaussian(kind.name, 999).to(dtype))
        layouts.append(Layout(kind, 3))
    return tensors, layouts, torch.cat(vectors)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_step_has_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    tensors, layouts, v = everything(dtype)
    count = sum(layout.parts for layout in layouts if layout.is_matrix)
    numbers = ([0.9] * len(tensors), [1.3] * len(tensors), 2.0)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        zeros = torch.zeros(count, dtype=torch.int32)
        out = list(OPS.spectral_penalty(tensors, v, zeros, pack(layouts), *numbers))
        out += OPS.spectral_penalty_backward(torch.tensor(0.3), tensors, *out[1:4], pack(layouts), *numbers)
        out += OPS.power_iteration(tensors, v, zeros, pack(layouts), 2)
        state = [v.clone(), zeros.clone(), torch.zeros(count, dtype=v.dtype)]
        gradients = [0.1 * torch.ones_like(w.contiguous()) for w in tensors]
        out.append(accumulate_grad(gradients, tensors, *state, LayerTable(layouts, *numbers[:2]), 2.0, 0.1))
        results.append([*out, *state, *gradients])
    for others in results[1:]:
        for x, y in zip(results[0], others, strict=True):
            assert torch.equal(x, y) if x.dtype == torch.int32 else same_bits(x, y)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=NAMES.get)
@pytest.mark.parametrize("shared", ["each_with_one_thread", "strips_shared"])
def test_spectral_norm_has_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, shared: str) -> None:
    """Many matrices are dealt out whole, one large one is cut into strips: csrc/spectral_norm.cpp, run."""
    shapes = [(300, 600)] if shared == "strips_shared" else [(30 + i, 90 - i) for i in range(12)]
    weights = [gaussian(str(shape), *shape).to(dtype) for shape in [*shapes, (6, 5)]]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OPS.spectral_norm(weights, pack([Layout()] * len(weights)), 1e-6, 256))
    for others in results[1:]:
        for x, y in zip(results[0], others, strict=True):
            assert torch.equal(x, y) if x.dtype == torch.int32 else same_bits(x, y)


# ---- instruction sets ----


def test_the_best_set_is_chosen_and_an_unknown_one_refused(native: ModuleType) -> None:
    supported = [isa for isa in ISAS if native.isa_supported(isa)]
    assert supported[0] == "baseline"
    for isa in supported:
        assert native.select_isa(isa) and native.isa() == isa
    for unknown in ("sse9", "", "AVX2"):
        assert not native.isa_supported(unknown) and not native.select_isa(unknown)
        assert native.isa() == supported[-1], "a refused set has replaced the one in use"


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("isa", ISAS)
def test_every_set_gives_every_small_shape(native: ModuleType, isa: str, dtype: torch.dtype) -> None:
    """1 to 18 rows (strips of 8, 4, 1) by 1 to 70 columns (registers of 2 to 16, tails), among NaN, in one call."""
    if not native.select_isa(isa):
        pytest.skip(f"this processor or build has no {isa}")
    shapes = [(m, n) for m in range(1, 19) for n in [*range(1, 40), 47, 48, 63, 64, 65, 70]]
    weights = [window(gaussian(f"{m} {n}", m, n).to(dtype)) for m, n in shapes]
    v = [unit(f"{m} {n}", n).to(vector_dtype(dtype)) for m, n in shapes]
    expected = [step_in_float64(w, x) for w, x in zip(weights, v, strict=True)]
    assert native.isa() == isa
    sigma, u, _ = power_iteration(weights, v)
    # An error of eps ||W|| in y turns u by eps ||W|| / ||y||, which is large where v is almost orthogonal to the rows.
    for i, (w, (s, left, right)) in enumerate(zip(weights, expected, strict=True)):
        size = w.double().norm().item()
        y = (w.double() @ unit(f"{shapes[i][0]} {shapes[i][1]}", shapes[i][1])).norm().item()
        allowed = 4 * eps(dtype) * size / y  # measured 1.7
        assert relative_error(u[i], left) <= allowed, shapes[i]
        assert relative_error(v[i], right) <= allowed * size / s.item(), shapes[i]
        assert error(sigma[i], s) <= allowed * size, shapes[i]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_the_sets_agree_to_rounding_and_are_not_one_and_the_same(native: ModuleType, dtype: torch.dtype) -> None:
    supported = [isa for isa in ISAS if native.isa_supported(isa)]
    w = gaussian("sets", 300, 501).to(dtype)
    layouts, v = pack([Layout()]), unit("sets", 501).to(vector_dtype(dtype))
    results = []
    for isa in supported:
        assert native.select_isa(isa)
        out = OPS.spectral_penalty([w], v, torch.zeros(1, dtype=torch.int32), layouts, [1.0], [1.0], 2.0)
        gradient = OPS.spectral_penalty_backward(torch.tensor(1.0), [w], *out[1:4], layouts, [1.0], [1.0], 2.0)
        results.append((*out[:4], gradient[0], *OPS.spectral_norm([w], layouts, 1e-6, 256)[:1]))
    for i, others in enumerate(results[1:]):
        for x, y in zip(results[0], others, strict=True):
            # Measured: 3 roundings; gradients in the weight's dtype may fall on its next number.
            assert relative_error(y, x.double()) <= 8 * eps(dtype) + (
                torch.finfo(dtype).eps if x.shape == w.shape else 0
            )
        # Sums in registers of another width are taken in another order: 300 of them do not all come out alike.
        assert not same_bits(results[i][2], others[2]), f"{supported[i]} and {supported[i + 1]} are one and the same"


# ---- every path through the table is reached ----


@pytest.mark.parametrize(
    ("shape", "dtype", "strips"),
    [
        ((1000, 1024), F32, 32),  # 128 KiB of rows, and no fewer than 32
        ((1000, 1024), BF16, 16),
        ((100, 100000), F32, 4),  # 32 rows, whatever they weigh
        ((33, 1024), F64, 2),  # the last strip of one row
        ((5000, 17), F32, 5),  # 1024 rows, however short they are
        ((5, 5), F32, 1),
        ((0, 5), F32, 0),
        ((5, 0), F32, 0),
    ],
)  # fmt: skip
def test_tall_matrices_are_read_in_strips(shape: tuple[int, int], dtype: torch.dtype, strips: int) -> None:
    w = gaussian("tall", *shape).to(dtype) if shape[1] < 10000 else torch.ones(shape)
    assert table_of(w, Layout()).read_tiles == strips
    if strips > 1:
        v = unit("tall", shape[1]).to(vector_dtype(dtype)) if shape[1] < 10000 else torch.full((shape[1],), 1e-5**0.5)
        s, u, after = step_in_float64(w, v)
        sigma, (found,), _ = power_iteration([w], [v])
        assert error(sigma[0], s) <= 16 * eps(dtype) * s.item()
        assert relative_error(found, u) <= 64 * eps(dtype) and relative_error(v, after) <= 64 * eps(dtype)


@pytest.mark.parametrize("shape", [(2049, 9), (5000, 17), (100000, 1)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=NAMES.get)
def test_long_columns_of_equal_numbers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Whose sums round the same way at every row. Measured 1.8e-6; 7e-4 where z takes rows one by one, 7000 a strip."""
    w = torch.full(shape, 0.1).to(dtype)
    sigma = spectral_norm(w)
    assert error(sigma, w.double().norm()) <= 4e-6 * sigma.item()


@pytest.mark.parametrize(
    ("parts", "n", "tiles"),
    [(700, 9, 3), (256, 16, 1), (257, 16, 2), (700, 1024, 175), (700, 8192, 700)],
    ids=["700_of_36_bytes", "256_of_64", "257_of_64", "700_of_4_KiB", "700_of_32_KiB"],
)
def test_small_parts_are_taken_together(parts: int, n: int, tiles: int) -> None:
    w = gaussian("parts", parts, 1, 64)[:, :, :1].float().expand(parts, 1, n).contiguous()
    w[:, :, 0] = torch.arange(1, parts + 1)[:, None]  # each has its own sigma
    layout = Layout(parts=parts, row_dim=1)
    assert table_of(w, layout).read_tiles == tiles
    v = torch.full((parts, n), n**-0.5)
    sigma, *_ = OPS.power_iteration([w], v.flatten(), torch.zeros(parts, dtype=torch.int32), pack([layout]), 2)
    assert relative_error(sigma, w.double().norm(dim=(1, 2))) <= 4 * eps(F32)


@pytest.mark.parametrize("n", [COLUMN_BLOCK, COLUMN_BLOCK + 1, 2 * COLUMN_BLOCK, 2 * COLUMN_BLOCK + 17])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=NAMES.get)
def test_wide_matrices_are_combined_in_blocks_of_columns(n: int, dtype: torch.dtype) -> None:
    """Every block's columns arrive, exactly once: z is known in closed form, and so is its norm over all blocks."""
    m = 70
    w = torch.outer(torch.arange(1, m + 1, dtype=F64), (torch.arange(n) % 7 - 3).double() / 4).to(
        dtype
    )  # small integers: exact
    assert table_of(w, Layout()).combine_tiles == -(-n // COLUMN_BLOCK)
    v = torch.zeros(n, dtype=vector_dtype(dtype))
    v[-1] = 1.0
    first = (w.double()[:, -1:] * w.double()).sum(dim=0)
    if w[0, -1] == 0:
        v[-1], v[-2] = 0.0, 1.0
        first = (w.double()[:, -2:-1] * w.double()).sum(dim=0)
    sigma, _, _ = power_iteration([w], [v])
    assert error(v, first / first.norm()) <= eps(dtype)
    assert error(sigma[0], svd(w).sigma) <= 2 * eps(dtype) * svd(w).sigma


def test_strided_rows_are_packed() -> None:
    """No two elements of a row side by side, NaN between them; more rows than the 16 packed at once, several strips."""
    w = spread(gaussian("packed", 100, 700).float())
    assert w.stride() == (1401, 2) and table_of(w, Layout()).read_tiles == 3
    v = unit("packed", 700).float()
    s, u, after = step_in_float64(w, v)
    sigma, (found,), _ = power_iteration([w], [v])
    assert error(sigma[0], s) <= 16 * eps(F32) * s.item()
    assert relative_error(found, u) <= 64 * eps(F32) and relative_error(v, after) <= 64 * eps(F32)
    assert error(spectral_norm(w), svd(w).sigma) <= 2e-6 * svd(w).sigma


def test_dense_rows_in_another_order_are_read_in_place() -> None:
    """channels_last: v goes into memory order and comes back. With v in the wrong order the result is far off."""
    w = channels_last(gaussian("order", 64, 32, 3, 3).float())
    v = unit("order", 288).float()
    s, u, after = step_in_float64(w.flatten(1), v)
    wrong, _, _ = step_in_float64(w.permute(0, 2, 3, 1).flatten(1), v)
    sigma, (found,), _ = power_iteration([w], [v])
    assert error(sigma[0], s) <= 16 * eps(F32) * s.item()
    assert abs(wrong - s) >= 1e-3 * s
    assert relative_error(found, u) <= 64 * eps(F32) and relative_error(v, after) <= 64 * eps(F32)
    # The same numbers as for the same rows written out densely in that order: nothing was copied or padded.
    plain = w.permute(0, 2, 3, 1).flatten(1).contiguous()
    v_plain = unit("order", 288).float().view(32, 3, 3).permute(1, 2, 0).flatten().contiguous()
    sigma_plain, (u_plain,), _ = power_iteration([plain], [v_plain])
    assert same_bits(sigma, sigma_plain) and same_bits(found, u_plain)
    assert same_bits(v.view(32, 3, 3).permute(1, 2, 0).flatten(), v_plain)


@pytest.mark.parametrize("place", [torch.clone, transposed, channels_last, spread], ids=lambda f: f.__name__)
@pytest.mark.parametrize("power", [-100, -45, 64, 100], ids=lambda p: f"2^{p}")
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (40, 1200, 2, 2)], ids=["one_strip", "strips_and_blocks"])
def test_a_range_that_float32_cannot_square_is_rescued(place, power: int, shape: tuple[int, ...]) -> None:
    """No exponent is known, and the plain products leave float32: only reading again with another one can succeed."""
    small = gaussian("rescue", *shape).float()
    w = place(small * 2.0**power)
    n = math.prod(shape[1:])
    v = unit("rescue", n).float()
    plain = (w.flatten(1).T @ (w.flatten(1) @ v)).square().sum()
    assert plain == 0 or not plain.isfinite(), "float32 could have done it"
    one = LayerTable([Layout()], [0.0], [1.0])
    results = []
    for x, p in ((w, power), (place(small), 0)):
        state = (v.clone(), torch.zeros(1, dtype=torch.int32), torch.zeros(1))
        gradient = torch.zeros(shape)
        # k = 1, t = 0: dR/dW = 2 s u v', which scales as W does.
        accumulate_grad([gradient], [x], *state, one, 1.0, 1.0)
        results.append((state[0], torch.ldexp(state[2], torch.tensor(-p)), torch.ldexp(gradient, torch.tensor(-p))))
        assert state[1].item() == torch.frexp(state[2]).exponent.item() - 1
    # Exact powers of two all the way: not a bit differs from the matrix of size one.
    for x, y in zip(*results, strict=True):
        assert same_bits(x, y)
    s, _, after = step_in_float64(small.flatten(1), v)
    assert error(results[0][1][0], s) <= 16 * eps(F32) * s.item()
    assert relative_error(results[0][0], after) <= 64 * eps(F32)
    sigma_1 = svd(small.flatten(1)).sigma
    assert error(spectral_norm(w).double() * 2.0**-power, sigma_1) <= 2e-6 * sigma_1


# ---- nothing outside its tensors is touched ----


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("isa", ISAS)
def test_only_its_own_memory_is_written(native: ModuleType, isa: str, dtype: torch.dtype) -> None:
    """Registers are whole, rows are not: what lies behind a row, a vector or a gradient keeps its bits."""
    if not native.select_isa(isa):
        pytest.skip(f"this processor or build has no {isa}")
    for n in (1, 3, 7, 15, 16, 17, 33, 70):
        w = gaussian(f"guard{n}", 7, n).to(dtype)
        store = torch.full((9, n + 40), 999.0, dtype=dtype)
        gradient = store[1:8, 20 : 20 + n]
        gradient.zero_()
        line = torch.full((n + 40,), 999.0, dtype=vector_dtype(dtype))
        v = line[20 : 20 + n]
        v.copy_(unit(f"guard{n}", n))
        table = LayerTable([Layout()], [1.0], [1.0])
        state = (torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=v.dtype))
        accumulate_grad([gradient], [w], v, *state, table, 2.0, 0.1)
        assert gradient.count_nonzero() == gradient.numel()
        assert (store == store[0, 0]).sum() == store.numel() - gradient.numel() and (line == 999).sum() == 40
        assert spectral_penalty([w], [v.clone()]).isfinite()
