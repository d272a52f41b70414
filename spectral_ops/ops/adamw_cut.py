"""How the work of an optimizer step is cut: strips of rows that are updated, and elements without a term of R.

A strip moves 4 to 7 times the bytes of the penalty's, so its panels are smaller and the other numbers its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spectral_ops.kernels import combine, table
from spectral_ops.kernels.update import PLAIN_CHUNK
from spectral_ops.ops import cut
from spectral_ops.ops.layout import Kind

# Weight, gradient and both moments of each element are in registers at a time.
USUAL, WIDE = cut.Shape(8, 128, 2, 8, 16), cut.Shape(16, 128, 1, 8, 16)
USUAL_WIDTH, MAX_WIDTH = 4096, 8192
# Of every array a thread takes 16 bytes of float32, or 8 of 16 bits.
VECTOR = 4

MIN_STRIP_ROWS, MAX_STRIP_ROWS = 16, 512
# Of all that a strip reads and writes.
MAX_STRIP_BYTES = 4 << 20
# Below this, strips may be as short as a panel.
SMALL_BYTES = 16 << 20


def adamw_cut(
    matrices: Sequence[cut.Matrix],
    moved: Sequence[int],
    others: Sequence[tuple[Kind, int]],
    programs_of: Callable[[cut.Shape], int],
) -> cut.Cut:
    """Args: matrices; bytes moved for an element of each; (kind, elements) of the other rows; programs of a shape."""
    widest = max((x.n for x in matrices if x.weight.dense and x.n <= MAX_WIDTH), default=0)
    shape = USUAL if widest <= USUAL_WIDTH else WIDE
    wanted = [variant(x, shape) for x in matrices]
    variants = sorted(set(wanted))
    programs = programs_of(shape)
    rows = strip_rows(matrices, moved, programs, [x[3] for x in wanted])
    shares = []
    for x, mine, count in zip(matrices, wanted, rows, strict=True):
        strips = -(-x.m // count) if x.n > 0 else 0
        partials = strips * min(mine[5], table.MOST_SHARES.value)
        blocks = max(1, -(-x.n // combine.COMBINE_COLUMNS))
        shares.append(cut.Share(variants.index(mine), -1, count, strips, partials, blocks))
    free = []
    for number, (kind, count) in enumerate(others, start=len(matrices)):
        if kind == Kind.PLAIN:
            free += [(table.PLAIN_TILE.value, number, chunk, 0) for chunk in range(-(-count // PLAIN_CHUNK))]
        else:
            free.append((table.VECTOR_TILE.value, number, 0, 0))
    tiles = cut.order_tiles(matrices, shares, free, 1, programs)
    return cut.Cut(shape, tuple(variants), (), tuple(shares), tiles)


def variant(x: cut.Matrix, shape: cut.Shape) -> cut.ReadVariant:
    """How the strips of a matrix are updated."""
    warps = shape.warps
    single = cut.SINGLE_ELEMENTS_PER_THREAD
    if not x.weight.dense:
        if x.weight.by_column:
            return (table.BY_COLUMN.value, cut.panel_rows(64, warps, single), 1, 64, False, 1)
        return (table.STRIDED.value, 256, 1, cut.panel_rows(256, warps, single), False, 1)
    per_thread = shape.elements if x.weight.aligned else single
    if x.n > MAX_WIDTH:
        rows = cut.panel_rows(cut.CHUNK_COLUMNS, warps, per_thread)
        return (table.CHUNKED.value, cut.CHUNK_COLUMNS, 1, rows, x.weight.aligned, 1)
    vector = VECTOR if x.weight.aligned else 1
    columns, count = pieces(x.n, vector, shape)
    rows = cut.panel_rows(columns * count, warps, per_thread)
    copies = min(max(32 * warps * vector // columns, 1), rows)
    return (table.ONE_SWEEP.value, columns, count, rows, x.weight.aligned, copies)


def pieces(n: int, vector: int, shape: cut.Shape) -> tuple[int, int]:
    """(A, how many) pieces of a panel that hold n columns: few idle lanes, then few columns for each thread."""
    threads = 32 * shape.warps
    found = []
    columns = 16
    while columns <= threads * vector:
        count = max(-(-n // columns), 1)
        if count * vector <= shape.held or columns == threads * vector:
            found.append((columns * count, -columns))
        columns *= 2
    width, columns = min(found)
    return -columns, width // -columns


def strip_rows(
    matrices: Sequence[cut.Matrix], moved: Sequence[int], programs: int, panels: Sequence[int]
) -> list[int]:
    """Rows per strip of every matrix, a multiple of its panel's; strips get shorter towards the end."""
    sizes = [x.m * x.n * each for x, each in zip(matrices, moved, strict=True)]
    total = left = sum(sizes)
    out = []
    for x, each, size, panel in zip(matrices, moved, sizes, panels, strict=True):
        target = min(MAX_STRIP_BYTES, left // max(programs, 1))
        left -= size
        least = panel if total <= SMALL_BYTES else max(MIN_STRIP_ROWS, panel)
        rows = min(max(target // max(x.n * each, 1), least), MAX_STRIP_ROWS)
        out.append(-(-rows // panel) * panel)
    return out
