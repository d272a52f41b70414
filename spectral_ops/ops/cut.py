"""How the work of a launch is cut: strips of rows, the shapes of panels, and the order of tiles.

Plain numbers, no tensors. The constants are the ones to tune on a device; docs/performance.md says what each should do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spectral_ops.kernels import combine, table

# A strip leaves up to MOST_SHARES partial sums of 4 bytes a column: with 64 rows of bf16 12 % of what it reads, with
# 512 rows 2 %.
MIN_STRIP_ROWS, MAX_STRIP_ROWS = 64, 512
# A tile costs 7-9 us beside its bytes (H200, docs/performance.md); at ~10 GB/s and program, 1 MiB takes ~100 us.
MAX_STRIP_BYTES = 1 << 20
# Below this a launch is bound by latency, and strips may be as short as a panel: the parts of z stay in L2.
SMALL_BYTES = 4 << 20
# So many strips per program are to be left wherever one begins: strips get shorter towards the end of the list, and the
# last ones to end do not leave the others idle for long.
STRIPS_PER_PROGRAM = 1
# In tiles per program.
COMBINE_AFTER = 2

# Up to these widths a row is swept once; WRITING, and READING.
WRITING_WIDTH, READING_WIDTH, MAX_WIDTH = 3072, 6144, 8192
CHUNK_COLUMNS = 1024
# Adding c u v': so many bytes of the gradient per thread are on their way. The others wait for nothing meanwhile.
GRADIENT_BYTES_PER_THREAD = 128
# Without vectors to load, every element has a 64-bit address of its own.
SINGLE_ELEMENTS_PER_THREAD = 8
MOST_PANEL_ROWS = 64
# Distinct read variants in one kernel; with more widths than this, narrow ones are read as wider ones.
MAX_READ_VARIANTS = 8

# What repeated iterations count on finding in L2 again: half of an A100's.
L2_BYTES = 20 << 20

Variant = tuple[int, int, int, int, bool]  # kernels/table.py: (mode, A, pieces, P, aligned)
Tile = tuple[int, int, int, int]  # (what, row, part of it, iteration)
ReadVariant = tuple[int, int, int, int, bool, int]  # ... and copies of z


class Shape(NamedTuple):
    """Of a launch's programs."""

    warps: int
    registers: int  # that a thread gets at most
    per_multiprocessor: int  # programs that then share one
    elements: int  # of a panel per thread: what leaves room for v, z and loads in flight
    held: int  # columns of v and of z that a thread keeps; of wider rows more warps share one


# Of few large programs reading gains, of many the gradient: float32's read and write enough to gain more than they lose
# (ViT-B, gradient in float32: 291 us against 309; the value 150 against 141: docs/performance.md).
READING, WRITING, WIDE = Shape(4, 168, 3, 48, 40), Shape(4, 128, 4, 32, 24), Shape(16, 128, 1, 48, 16)


@dataclass(frozen=True)
class Rows:
    """How rows lie: dense, or strided with rows side by side (by_column), or any; aligned: see kernels/strips.py."""

    dense: bool
    by_column: bool
    aligned: bool


@dataclass(frozen=True)
class Matrix:
    """What cutting needs to know of one matrix; `gradient` None: none is asked for."""

    m: int
    n: int
    element_size: int
    weight: Rows
    gradient: Rows | None = None
    gradient_size: int = 4  # of an element

    @property
    def bytes(self) -> int:
        return self.m * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return max(self.n * self.element_size, 1)


@dataclass(frozen=True)
class Share:
    """The work of one matrix."""

    read: int  # of the launch's read variants
    gradient: int  # of its gradient variants, -1 for none
    strip_rows: int
    strips: int
    partials: int  # shares of z
    blocks: int


@dataclass(frozen=True)
class Cut:
    """The work of a launch. Rows are matrices, then vectors, then what has no term of R."""

    shape: Shape
    read_variants: tuple[ReadVariant, ...]
    gradient_variants: tuple[Variant, ...]
    shares: tuple[Share, ...]
    tiles: list[Tile]


def cut(matrices: Sequence[Matrix], vectors: int, iterations: int, programs_of: Callable[[Shape], int]) -> Cut:
    """Args: the matrices and the number of vectors of a launch; iterations; how many programs of a shape run."""
    shape = shape_for(matrices)
    programs, warps = programs_of(shape), shape.warps
    reads, read_of = read_variants(matrices, shape)
    gradient_of = [
        None if x.gradient is None else gradient_variant(x.n, x.gradient, x.gradient_size, warps) for x in matrices
    ]
    gradients = list(dict.fromkeys(variant for variant in gradient_of if variant is not None))
    rows = strip_rows(matrices, programs, [reads[i] for i in read_of])
    shares = tuple(
        Share(
            read,
            -1 if gradient is None else gradients.index(gradient),
            count,
            strips := -(-x.m // count) if x.n > 0 else 0,
            strips * min(reads[read][5], table.MOST_SHARES.value),
            max(1, -(-x.n // combine.COMBINE_COLUMNS)),
        )
        for x, read, gradient, count in zip(matrices, read_of, gradient_of, rows, strict=True)
    )
    vector_tiles = [(table.VECTOR_TILE.value, len(matrices) + i, 0, 0) for i in range(vectors)]
    tiles = order_tiles(matrices, shares, vector_tiles, iterations, programs)
    return Cut(shape, tuple(reads), tuple(gradients), shares, tiles)


def order_tiles(
    matrices: Sequence[Matrix], shares: Sequence[Share], free: Sequence[Tile], iterations: int, programs: int
) -> list[Tile]:
    """In the order of their tickets: whatever a tile waits for comes before it. free: tiles that wait for nothing."""
    tiles: list[Tile] = []
    for group in l2_groups(matrices, iterations):
        for iteration in range(iterations):
            # A matrix is combined once the strips of others have been begun by all programs twice over: its own have
            # ended by then, nobody waits, and little is left to combine when the last strip has been read.
            waiting: list[tuple[int, int]] = []  # (matrix, how many tiles there must be)
            for i in group:
                what = table.READ_TILE.value + shares[i].read
                tiles += [(what, i, strip, iteration) for strip in range(shares[i].strips)]
                waiting.append((i, len(tiles) + COMBINE_AFTER * programs))
                while waiting and waiting[0][1] <= len(tiles):
                    tiles += combine_tiles(waiting.pop(0)[0], shares, iteration)
            tiles += free  # between reading and combining: they fill the wait for the last strips
            free = ()
            for i, _ in waiting:
                tiles += combine_tiles(i, shares, iteration)
    tiles += free
    for i, share in enumerate(shares):
        if share.gradient >= 0:
            what = table.GRADIENT_TILE.value + share.gradient
            tiles += [(what, i, strip, iterations) for strip in range(share.strips)]
    return tiles


def combine_tiles(i: int, shares: Sequence[Share], iteration: int) -> list[Tile]:
    if iteration > 0 and shares[i].strips == 0:  # without strips nothing keeps iterations apart: one is all
        return []
    return [(table.COMBINE_TILE.value, i, block, iteration) for block in range(shares[i].blocks)]


def power_of_two_from(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def pieces(n: int, element_size: int, aligned: bool, shape: Shape) -> tuple[int, int]:
    """(A, how many) pieces of a panel that hold n columns. Products are added up piece by piece before threads meet.

    Best is a row for each warp, or a few: no warp waits for another, and a panel takes 43-48 instructions per 16 bytes
    of bf16 where rows that two warps share take 62 (sm_90, Triton 3.6). A thread holds `vector` columns of every piece.
    """
    if not aligned:
        whole = max(power_of_two_from(n), 16)
        if whole <= 256:
            return whole, 1
        return (whole // 4, 3) if whole >= 1024 and 3 * (whole // 4) >= n else (whole // 2, 2)
    vector = 16 // element_size
    warp, most = 32 * vector, shape.warps * 32 * vector
    found = []
    columns = 16
    while columns <= most:
        count = max(-(-n // columns), 1)
        if count * vector <= shape.held or columns == most:
            found.append((columns * count, max(columns, warp) // min(columns, warp), columns))
        columns *= 2
    width, _, columns = min(found)  # few idle lanes first, then as near to a row for each warp as may be
    return columns, width // columns


def panel_rows(columns: int, warps: int, per_thread: int) -> int:
    """P of a panel of that many columns: a power of two."""
    rows = max(per_thread * 32 * warps // columns, 1)
    return min(1 << (rows.bit_length() - 1), MOST_PANEL_ROWS)


def shape_for(matrices: Sequence[Matrix]) -> Shape:
    """Of a launch: as many warps as its widest single sweep needs."""
    widest = max((x.n for x in matrices if x.weight.dense and x.n <= MAX_WIDTH), default=0)
    if widest > READING_WIDTH:
        return WIDE
    writes = any(x.gradient is not None and x.element_size == 4 for x in matrices)
    return WRITING if writes and widest <= WRITING_WIDTH else READING


def copies(variant: Variant, element_size: int, warps: int) -> int:
    """Of z, in a single sweep: as many as a load of all threads spans rows."""
    mode, a, _, rows, aligned = variant
    if mode != table.ONE_SWEEP.value:
        return 1
    return min(max(32 * warps * (16 // element_size if aligned else 1) // a, 1), rows)


def read_variants(matrices: Sequence[Matrix], shape: Shape) -> tuple[list[ReadVariant], list[int]]:
    """The distinct variants of a launch, and which of them reads each matrix."""
    warps = shape.warps
    wanted: list[Variant] = []
    for x in matrices:
        per_thread = shape.elements if x.weight.aligned else SINGLE_ELEMENTS_PER_THREAD
        if x.weight.dense and x.n <= MAX_WIDTH:
            a, count = pieces(x.n, x.element_size, x.weight.aligned, shape)
            rows = panel_rows(a * count, warps, per_thread)
            wanted.append((table.ONE_SWEEP.value, a, count, rows, x.weight.aligned))
        elif x.weight.dense:
            rows = panel_rows(CHUNK_COLUMNS, warps, per_thread)
            wanted.append((table.CHUNKED.value, CHUNK_COLUMNS, 1, rows, x.weight.aligned))
        elif x.weight.by_column:
            wanted.append((table.BY_COLUMN.value, panel_rows(64, warps, SINGLE_ELEMENTS_PER_THREAD), 1, 64, False))
        else:
            wanted.append((table.STRIDED.value, 256, 1, panel_rows(256, warps, SINGLE_ELEMENTS_PER_THREAD), False))
    while len(set(wanted)) > MAX_READ_VARIANTS:
        narrow, wide = _cheapest_merge(sorted(set(wanted)))
        wanted = [wide if variant == narrow else variant for variant in wanted]
    variants = sorted(set(wanted))
    size = matrices[0].element_size if matrices else 1  # rows of one launch share it
    return [(*x, copies(x, size, warps)) for x in variants], [variants.index(variant) for variant in wanted]


def _cheapest_merge(variants: Sequence[Variant]) -> tuple[Variant, Variant]:
    """Which single sweep to read as which wider one, alike in alignment: where the width grows least.

    Other modes have four variants at most, so more than MAX_READ_VARIANTS hold at least five single sweeps, three of
    them alike.
    """
    sweeps = [variant for variant in variants if variant[0] == table.ONE_SWEEP.value]
    pairs = [(x, y) for x in sweeps for y in sweeps if x[4] == y[4] and x[1] * x[2] < y[1] * y[2]]
    return min(pairs, key=lambda pair: (pair[1][1] * pair[1][2]) / (pair[0][1] * pair[0][2]))


def gradient_variant(n: int, rows: Rows, element_size: int, warps: int) -> Variant:
    """Panels for adding c u v': the most columns, up to 1024, that leave few lanes idle."""
    if rows.by_column:
        return (table.BY_COLUMN.value, panel_rows(64, warps, SINGLE_ELEMENTS_PER_THREAD), 1, 64, False)
    mode = table.CHUNKED.value if rows.dense else table.STRIDED.value
    columns = max(min(power_of_two_from(n), 128), 16)
    for wider in (256, 512, 1024):
        if n % wider == 0 or n > 8 * wider:
            columns = wider
    per_thread = GRADIENT_BYTES_PER_THREAD // element_size if rows.aligned else SINGLE_ELEMENTS_PER_THREAD // 2
    return (mode, columns, 1, panel_rows(columns, warps, per_thread), rows.aligned)


def strip_rows(matrices: Sequence[Matrix], programs: int, variants: Sequence[ReadVariant]) -> list[int]:
    """Rows per strip of every matrix, a multiple of its panel's."""
    total = left = sum(x.bytes for x in matrices)
    out = []
    for x, variant in zip(matrices, variants, strict=True):
        target = min(MAX_STRIP_BYTES, left // max(STRIPS_PER_PROGRAM * programs, 1))
        left -= x.bytes
        panel = variant[3]
        least = panel if total <= SMALL_BYTES else max(MIN_STRIP_ROWS, panel)
        rows = min(max(target // x.row_bytes, least), MAX_STRIP_ROWS)
        out.append(-(-rows // panel) * panel)
    return out


def l2_groups(matrices: Sequence[Matrix], iterations: int) -> list[list[int]]:
    """Matrices whose reads follow one another: all, or as many as L2 holds where they are read again."""
    if iterations == 1:
        return [list(range(len(matrices)))] if matrices else []
    groups: list[list[int]] = []
    held = 0
    for i, x in enumerate(matrices):
        if not groups or held + x.bytes > L2_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += x.bytes
    return groups
