"""The work queue of the one-launch kernel (kernels/penalty.py) as a model: what each program does to shared memory.

    here                            in the kernel
    Protocol.turn, claim            the loop of the program; tl.atomic_add(ticket, 1, sem="relaxed")
    Protocol.wait, work, publish    one tile: spin with sem="acquire", then a barrier | loads, arithmetic, stores |
                                    a barrier, then tl.atomic_add(counter, 1, sem="release")
    Protocol.finish                 an iteration's last combine block normalises v: blocks counts with sem="acq_rel"
    Protocol.leave, total, reset    the end: exits counts with sem="acq_rel"; the last program out sums, then clears

A buffer holds the number of power iterations of this launch that are in it, OLD where it is left from an earlier
launch. `partial[m][s]` is the part of z from strip s, `y[m][s]` includes the part of ||y||^2, `z[m][b]` the block's
part of ||z||^2, `coefficient[m]` sigma. interleavings.py runs the model and says what it can and cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from interleavings import ACQ_REL, ACQUIRE, RELAXED, RELEASE, Add, Load, Start, Store, Wait, Work

OLD = -1
BEFORE_FIRST = -1  # in place of a ticket: none claimed yet


class Tile(NamedTuple):
    kind: str  # READ, COMBINE, GRADIENT, VECTOR
    matrix: int  # of a VECTOR: which vector
    part: int = 0  # strip of a READ or GRADIENT, block of columns of a COMBINE
    it: int = 0

    def __str__(self) -> str:
        return f"{self.kind}({self.matrix})" if self.kind == "VECTOR" else "{}({}, {}, {})".format(*self)


class Table(NamedTuple):
    matrices: Sequence[tuple[int, int]]  # (strips, combine blocks) of each
    tiles: Sequence[Tile]  # in the order of their tickets
    n_iter: int = 1


def build_table(
    *matrices: tuple[int, int],
    n_iter: int = 1,
    gradient: bool = False,
    vectors_at: Sequence[int] = (),
    group: int = 99,
    behind: int = 99,
) -> Table:
    """As the host orders tiles: per iteration and group of matrices reads, then combines; at the end all gradients.

    behind: how many matrices later one is combined, if there are so many in its group.
    """
    tiles = []
    for it in range(n_iter):
        for first in range(0, len(matrices), group):
            members = [(m, *matrices[m]) for m in range(first, min(first + group, len(matrices)))]
            for i in range(len(members) + behind):
                for m, strips, _ in members[i : i + 1]:
                    tiles += [Tile("READ", m, s, it) for s in range(strips)]
                for m, _, blocks in members[max(i - behind, 0) : max(i - behind + 1, 0)]:
                    tiles += [Tile("COMBINE", m, b, it) for b in range(blocks)]
    if gradient:
        tiles += [Tile("GRADIENT", m, s) for m, (strips, _) in enumerate(matrices) for s in range(strips)]
    for i, position in enumerate(vectors_at):
        tiles.insert(position, Tile("VECTOR", i))
    return Table(matrices, tiles, n_iter)


class Protocol:
    """What each program of the grid does. Mutants (test_queue_protocol.py) override one method or one order."""

    claim_order = RELAXED
    wait_order = ACQUIRE
    reads_order = RELEASE
    blocks_order = ACQ_REL
    finished_order = RELEASE
    exits_order = ACQ_REL

    def __init__(self, table: Table, n_programs: int) -> None:
        self.table = table
        self.n_programs = n_programs
        self.tickets, self.result = table.tiles, table.n_iter
        self.counters = ["ticket", "exits"]
        self.data = {"value": OLD}  # buffer -> its version when a launch begins
        for m in range(len(table.matrices)):
            self.counters += [f"reads[{m}]", f"blocks[{m}]", f"finished[{m}]"]
            self.data |= {f"v[{m}]": 0, f"coefficient[{m}]": OLD, f"term[{m}]": OLD}
        of_kind = {"READ": ("partial", "y"), "COMBINE": ("z",), "GRADIENT": ("gradient",)}
        for kind, i, part, _ in table.tiles:
            names = [f"{name}[{i}][{part}]" for name in of_kind.get(kind, ())]
            self.data |= dict.fromkeys(names or [f"vector gradient[{i}]", f"vector term[{i}]"], OLD)

    def first_turn(self, program: int) -> int:
        """All programs are alike: which one it is makes no difference."""
        return BEFORE_FIRST

    def turn(self, ticket: int) -> Work:
        """One pass of the loop, a ticket in hand. Returns the next ticket, or None where the program ends."""
        if ticket <= BEFORE_FIRST:
            yield Start()
        elif ticket < len(self.table.tiles):
            yield from self.process(self.table.tiles[ticket])
        else:
            yield from self.leave(ticket)
            return None
        return (yield from self.claim(ticket))

    def claim(self, ticket: int) -> Work:
        return (yield Add("ticket", self.claim_order))

    def process(self, tile: Tile) -> Work:
        """Published before the next claim and the next wait: what is done never hangs on what is waited for."""
        yield from self.wait(tile)
        yield from self.work(tile)
        yield from self.publish(tile)

    def wait(self, tile: Tile) -> Work:
        """Only for tiles of lower tickets."""
        match tile:
            case Tile("READ", m, _, it) if it > 0:
                yield Wait(f"finished[{m}]", it, self.wait_order)
            case Tile("COMBINE", m, _, it):
                yield Wait(f"reads[{m}]", self.table.matrices[m][0] * (it + 1), self.wait_order)
            case Tile("GRADIENT", m):
                yield Wait(f"finished[{m}]", self.table.n_iter, self.wait_order)

    def work(self, tile: Tile) -> Work:
        n_iter = self.table.n_iter
        match tile:
            case Tile("READ", m, s, it):
                yield Load(f"v[{m}]", it)
                yield Store(f"partial[{m}][{s}]", it + 1)
                yield Store(f"y[{m}][{s}]", it + 1)
            case Tile("COMBINE", m, b, it):
                for s in range(self.table.matrices[m][0]):
                    yield Load(f"partial[{m}][{s}]", it + 1)
                yield Store(f"z[{m}][{b}]", it + 1)
            case Tile("GRADIENT", m, s):
                yield Load(f"y[{m}][{s}]", n_iter)
                yield Load(f"v[{m}]", n_iter)
                yield Load(f"coefficient[{m}]", n_iter)
                yield Load(f"gradient[{m}][{s}]", OLD)
                yield Store(f"gradient[{m}][{s}]", n_iter)
            case Tile("VECTOR", i):
                yield Load(f"vector gradient[{i}]", OLD)
                yield Store(f"vector gradient[{i}]", n_iter)
                yield Store(f"vector term[{i}]", n_iter)

    def publish(self, tile: Tile) -> Work:
        match tile:
            case Tile("READ", m):
                yield Add(f"reads[{m}]", self.reads_order)
            case Tile("COMBINE", m, _, it):
                old = yield Add(f"blocks[{m}]", self.blocks_order)
                if self.finishes(old, m, it):
                    yield from self.finish(m, it)
                    yield Add(f"finished[{m}]", self.finished_order)

    def finishes(self, old: int, m: int, it: int) -> bool:
        """The last block of the iteration finishes the matrix; the counter runs on over the iterations."""
        return old == self.table.matrices[m][1] * (it + 1) - 1

    def finish(self, m: int, it: int) -> Work:
        strips, blocks = self.table.matrices[m]
        for cell in [f"z[{m}][{b}]" for b in range(blocks)] + [f"y[{m}][{s}]" for s in range(strips)]:
            yield Load(cell, it + 1)
        for name in ("v", "coefficient", "term"):
            yield Store(f"{name}[{m}]", it + 1)

    def leave(self, ticket: int) -> Work:
        """Counted after the last use of shared memory, so the last one out is alone with it."""
        old = yield Add("exits", self.exits_order)
        if old == self.n_programs - 1:
            yield from self.total()
            yield from self.reset()

    def total(self) -> Work:
        for cell in self.data:
            if "term" in cell:
                yield Load(cell, self.table.n_iter)
        yield Store("value", self.table.n_iter)

    def reset(self) -> Work:
        for counter in self.counters:
            yield Store(counter, 0)


class AdamWProtocol(Protocol):
    """kernels/adamw.py: strips are updated as they are read, by the s, u, v that the last step left.

    What a matrix's last program overwrites, its strips have read; and it may read the new weights once more.
    """

    def __init__(self, table: Table, n_programs: int) -> None:
        super().__init__(table, n_programs)
        self.data |= {"step": OLD}
        for m, (strips, _) in enumerate(table.matrices):
            self.data |= {f"u[{m}]": 0, f"sigma[{m}]": 0}
            self.data |= {f"w[{m}][{s}]": OLD for s in range(strips)}

    def work(self, tile: Tile) -> Work:
        yield Load("step", OLD)
        if tile.kind == "READ":
            m, s = tile.matrix, tile.part
            for name in ("u", "sigma"):
                yield Load(f"{name}[{m}]", 0)
            yield Load(f"w[{m}][{s}]", OLD)
            yield Store(f"w[{m}][{s}]", 1)
        yield from super().work(tile)

    def publish(self, tile: Tile) -> Work:
        if tile.kind != "COMBINE":
            yield from super().publish(tile)
            return
        old = yield Add(f"blocks[{tile.matrix}]", self.blocks_order)
        if self.finishes(old, tile.matrix, 0):
            yield from self.finish(tile.matrix, 0)  # nobody waits for it

    def finish(self, m: int, it: int) -> Work:
        for s in range(self.table.matrices[m][0]):
            yield Load(f"w[{m}][{s}]", 1)
        yield from super().finish(m, it)
        for name in ("u", "sigma"):
            yield Store(f"{name}[{m}]", 1)

    def total(self) -> Work:
        for m in range(len(self.table.matrices)):
            yield Load(f"sigma[{m}]", 1)
        yield from super().total()
        yield Load("step", OLD)
        yield Store("step", 1)
