"""How the work of a Triton launch is cut: plain numbers, no kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from spectral_ops.kernels import combine, table  # noqa: E402
from spectral_ops.ops import cut  # noqa: E402
from spectral_ops.ops.cut import Matrix, Rows  # noqa: E402
from spectral_ops.ops.triton_rows import useful_programs  # noqa: E402


def programs_of(shape: cut.Shape) -> int:
    return 132 * shape.per_multiprocessor  # of an H200


DENSE = Rows(dense=True, by_column=False, aligned=True)
UNALIGNED = Rows(dense=True, by_column=False, aligned=False)
STRIDED = Rows(dense=False, by_column=False, aligned=False)
BY_COLUMN = Rows(dense=False, by_column=True, aligned=False)


def matrix(m: int, n: int, rows: Rows = DENSE, size: int = 2) -> Matrix:
    return Matrix(m, n, size, rows, rows)


VIT_L = [matrix(3072, 1024), matrix(1024, 1024), matrix(4096, 1024), matrix(1024, 4096)] * 24
MLP = [matrix(256, 784, size=4), matrix(256, 256, size=4), matrix(10, 256, size=4)]
MIXED = [
    matrix(64, 147, UNALIGNED),
    matrix(5, 30000),
    matrix(40, 300, BY_COLUMN),
    matrix(40, 300, STRIDED),
    matrix(0, 8),
    matrix(8, 0),
    matrix(1, 1, UNALIGNED),
]
LISTS = {"vit-l": VIT_L, "mlp": MLP, "mixed": MIXED, "none": []}


@pytest.fixture(params=LISTS.values(), ids=LISTS.keys())
def matrices(request: pytest.FixtureRequest) -> list[Matrix]:
    return list(request.param)


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_tile_waits_for_earlier_tiles_only(matrices: list[Matrix], iterations: int) -> None:
    done = cut.cut(matrices, 2, iterations, programs_of)
    reads, combined, finished = ([0] * len(matrices) for _ in range(3))
    vectors = []
    for what, row, part, iteration in done.tiles:
        if what == table.VECTOR_TILE.value:
            vectors.append(row)
            continue
        share = done.shares[row]
        if what == table.COMBINE_TILE.value:
            assert reads[row] == share.strips * (iteration + 1) and part == combined[row] % share.blocks
            combined[row] += 1
            finished[row] += combined[row] == share.blocks * (iteration + 1)
        elif what >= table.GRADIENT_TILE.value:
            assert finished[row] == iterations == iteration
            assert what - table.GRADIENT_TILE.value == share.gradient
        else:
            assert finished[row] == iteration and part == reads[row] % share.strips
            assert what - table.READ_TILE.value == share.read
            reads[row] += 1
    assert vectors == [len(matrices), len(matrices) + 1]
    for i, share in enumerate(done.shares):
        # Without strips nothing would keep iterations apart, and one says it all.
        rounds = iterations if share.strips else 1
        assert (reads[i], combined[i], finished[i]) == (share.strips * iterations, share.blocks * rounds, rounds)
        gradients = [t for t in done.tiles if t[0] >= table.GRADIENT_TILE.value and t[1] == i]
        assert [t[2] for t in gradients] == list(range(share.strips))


def test_strips_hold_every_row_once_and_blocks_every_column(matrices: list[Matrix]) -> None:
    done = cut.cut(matrices, 0, 1, programs_of)
    for x, share in zip(matrices, done.shares, strict=True):
        if x.n > 0:
            assert (share.strips - 1) * share.strip_rows < max(x.m, 1) and share.strips * share.strip_rows >= x.m
        assert share.blocks * combine.COMBINE_COLUMNS >= x.n
        panel, copies = done.read_variants[share.read][3], done.read_variants[share.read][5]
        assert share.strip_rows % panel == 0
        assert panel % copies == 0 and share.partials == share.strips * min(copies, table.MOST_SHARES.value)


def test_panels_hold_the_row_they_sweep_once(matrices: list[Matrix]) -> None:
    done = cut.cut(matrices, 0, 1, programs_of)
    for x, share in zip(matrices, done.shares, strict=True):
        mode, a, count, _, aligned, _ = done.read_variants[share.read]
        if mode == table.ONE_SWEEP.value:
            assert x.weight.dense and a * count >= x.n
        assert (mode == table.BY_COLUMN.value) == (x.weight.by_column and not x.weight.dense)
        assert not aligned or x.weight.aligned  # rows that are not aligned must not be read as if they were


WIDTHS = [*range(0, 300, 7), 384, 768, 1152, 1280, 1408, 1536, 3072, 5120, 6144, 8192]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("n", WIDTHS)
def test_pieces_leave_few_lanes_idle(n: int, size: int) -> None:
    shape = cut.shape_for([matrix(4, n, size=size)])
    a, count = cut.pieces(n, size, True, shape)
    assert a & (a - 1) == 0 and a * count >= n
    assert a * count - n <= max(n / 3, 16)
    # What a thread holds of v and of z: its vector of 16 bytes in every piece.
    assert count * 16 // size <= (shape.held if n <= 3072 or size == 2 and n <= 5120 else 48)
    if n in (384, 768, 1280, 1536, 3072, 6144, 8192):
        assert a * count == n


@pytest.mark.parametrize(("n", "size"), [(256, 2), (768, 2), (1024, 2), (384, 4), (1024, 4), (1280, 4)])
def test_each_warp_sweeps_rows_of_its_own(n: int, size: int) -> None:
    variants, _ = cut.read_variants([matrix(64, n, size=size)], cut.READING)
    _, a, _, rows, _, copies = variants[0]
    assert a == 32 * 16 // size and copies == 4 and rows % 4 == 0


@pytest.mark.parametrize("n", WIDTHS)
def test_unaligned_rows_take_up_to_three_pieces(n: int) -> None:
    a, count = cut.pieces(n, 2, False, cut.READING)
    assert a & (a - 1) == 0 and 1 <= count <= 3 and a * count >= n
    assert n < 512 or a * count <= 1.5 * n  # at most half: 1025 takes 1536, 1537 takes 2048


def test_many_widths_share_the_next_wider_variant() -> None:
    widths = [20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 147]
    many = [matrix(8, n, UNALIGNED if n == 147 else DENSE) for n in widths]
    variants, of = cut.read_variants(many, cut.shape_for(many))
    assert len(variants) <= cut.MAX_READ_VARIANTS
    for x, i in zip(many, of, strict=True):
        assert variants[i][1] * variants[i][2] >= x.n and variants[i][4] == x.weight.aligned


def test_large_models_pay_little_for_partial_sums() -> None:
    done = cut.cut(VIT_L, 0, 1, programs_of)
    partial = sum(share.partials * x.n * 4 for x, share in zip(VIT_L, done.shares, strict=True))
    assert partial <= 0.05 * sum(x.bytes for x in VIT_L)
    # Enough strips that the last ones to end leave nobody idle for long.
    assert sum(share.strips for share in done.shares) >= 3 * programs_of(done.shape)
    # When the last strip has been begun, little is left to combine.
    last = max(i for i, tile in enumerate(done.tiles) if tile[0] >= table.READ_TILE.value and tile[0] < 64)
    behind = sum(tile[0] == table.COMBINE_TILE.value for tile in done.tiles[last:])
    assert behind < 0.4 * sum(share.blocks for share in done.shares)


def test_small_models_use_many_programs() -> None:
    done = cut.cut(MLP, 3, 1, programs_of)
    assert sum(share.strips for share in done.shares) >= 60


@pytest.mark.parametrize("gradients", [True, False])
def test_no_more_programs_than_work_at_a_time(gradients: bool) -> None:
    done = cut.cut(MLP if gradients else [replace(x, gradient=None) for x in MLP], 3, 1, programs_of)
    strips = sum(share.strips for share in done.shares)
    assert useful_programs(done.tiles) == strips  # read first, then gradients; blocks of z and vectors are fewer
    assert useful_programs([]) == 1


def test_repeated_iterations_read_what_l2_holds() -> None:
    groups = cut.l2_groups(VIT_L, 3)
    assert len(groups) > 1 and [i for group in groups for i in group] == list(range(len(VIT_L)))
    for group in groups:
        assert len(group) == 1 or sum(VIT_L[i].bytes for i in group) <= cut.L2_BYTES
    assert cut.l2_groups(VIT_L, 1) == [list(range(len(VIT_L)))]
