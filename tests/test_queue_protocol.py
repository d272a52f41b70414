"""Every interleaving of the work queue's protocol on small tables, and what goes wrong when a rule of it is broken."""

from __future__ import annotations

import itertools

import pytest
from interleavings import ACQ_REL, ACQUIRE, RELAXED, RELEASE, Add, Choose, Load, Result, Store, Wait, explore
from queue_model import BEFORE_FIRST, OLD, AdamWProtocol, Protocol, Table, Tile, Work, build_table

TABLES = {
    "nothing": build_table(),
    "vector": build_table(vectors_at=(0,)),
    "matrix": build_table((2, 1)),
    "two blocks": build_table((2, 2)),
    "one strip": build_table((1, 2), gradient=True),
    "gradient": build_table((2, 2), gradient=True),
    "two iterations": build_table((2, 2), n_iter=2),
    "two iterations, gradient": build_table((2, 1), n_iter=2, gradient=True),
    "three iterations": build_table((1, 2), n_iter=3),
    "two matrices": build_table((2, 1), (1, 2)),
    "two matrices in groups": build_table((1, 2), (2, 1), group=1),
    "two matrices, two iterations": build_table((1, 1), (1, 1), n_iter=2),
    "three matrices, combined while the next is read": build_table((1, 1), (1, 1), (1, 1), behind=1),
    "two combined while the next is read, twice": build_table((1, 1), (1, 1), n_iter=2, behind=1),
    "vector first": build_table((2, 2), vectors_at=(0,)),
    "vectors between and last": build_table((2, 1), gradient=True, vectors_at=(2, 6)),
}
# (programs, of which on the device at a time): alone; more than there are tiles in the smaller tables; a grid that does
# not fit. With one place the programs run one after the other, as in Triton's interpreter.
GRIDS = [(1, 1), (2, 2), (2, 1), (3, 3), (3, 2), (3, 1)]


def search(protocol: type[Protocol], table: Table, grids: list[tuple[int, int]] = GRIDS) -> set[str]:
    """What can go wrong, on any grid."""
    found: set[str] = set()
    for n_programs, resident in grids:
        found |= explore(protocol(table, n_programs), resident).violations.keys()
    return found


def assert_none(result: Result) -> None:
    assert not result.violations, "\n\n".join(f"{what}:\n{run}" for what, run in result.violations.items())


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize(("n_programs", "resident"), GRIDS)
def test_every_interleaving(table: Table, n_programs: int, resident: int) -> None:
    """Ends with every tile served once, all data complete, nothing raced for, and the counters zero again."""
    assert_none(explore(Protocol(table, n_programs), resident))


# Of the optimizer step, which has no gradients and one iteration. Vectors are bounded by nothing.
ADAMW_TABLES = {
    name: TABLES[name]
    for name in ("nothing", "vector", "matrix", "two blocks", "two matrices", "vector first")
} | {"combined while the next is read": build_table((1, 1), (1, 1), behind=1)}


@pytest.mark.parametrize("table", ADAMW_TABLES.values(), ids=ADAMW_TABLES)
@pytest.mark.parametrize(("n_programs", "resident"), GRIDS)
def test_every_interleaving_of_the_optimizer_step(table: Table, n_programs: int, resident: int) -> None:
    assert_none(explore(AdamWProtocol(table, n_programs), resident))


class CombinesEarly(AdamWProtocol):
    """Waits for one strip less: u and sigma are overwritten while the last one may still read them."""

    def wait(self, tile: Tile) -> Work:
        if tile.kind == "COMBINE":
            yield Wait(f"reads[{tile.matrix}]", self.table.matrices[tile.matrix][0] - 1, self.wait_order)


class CountsEarly(AdamWProtocol):
    """The first program to leave counts the step."""

    def leave(self, ticket: int) -> Work:
        old = yield Add("exits", self.exits_order)
        if old == 0:
            yield Load("step", OLD)
            yield Store("step", 1)
        if old == self.n_programs - 1:
            yield from self.reset()


class RelaxedUpdates(AdamWProtocol):
    reads_order = RELAXED


def test_rules_of_the_optimizer_step_broken() -> None:
    table = build_table((2, 1))
    assert search(CombinesEarly, table, [(2, 2)]) >= {"race on u"}
    assert search(CountsEarly, table, [(2, 2)]) >= {"race on step"}
    assert search(RelaxedUpdates, table, [(2, 2)]) >= {"race on w"}


@pytest.mark.parametrize("resident", [4, 3])
def test_four_programs(resident: int) -> None:
    assert_none(explore(Protocol(TABLES["two blocks"], 4), resident))


def test_the_next_launch_begins_as_the_first_did() -> None:
    """So a second search adds no state; a launch that leaves a counter behind (below) does add some."""
    table = TABLES["gradient"]
    assert explore(Protocol(table, 2), 2, launches=3).states == explore(Protocol(table, 2), 2, launches=1).states
    assert explore(NoReset(table, 2), 2, launches=2).states > explore(NoReset(table, 2), 2, launches=1).states


def needs(tile: Tile) -> set[str]:
    """The kinds of tile of the same matrix that come before this one (one iteration)."""
    return {"READ": set(), "COMBINE": {"READ"}, "GRADIENT": {"READ", "COMBINE"}, "VECTOR": set()}[tile.kind]


def test_any_order_with_tiles_after_those_they_need() -> None:
    """The order of tickets is free otherwise: 20 orders of two matrices."""
    table, count = build_table((1, 1), (1, 1), gradient=True), 0
    for tiles in itertools.permutations(table.tiles):
        before = [{t.kind for t in tiles[:i] if t.matrix == tile.matrix} for i, tile in enumerate(tiles)]
        if all(needs(tile) <= earlier for tile, earlier in zip(tiles, before, strict=True)):
            count += 1
            assert not search(Protocol, table._replace(tiles=tiles), [(2, 2), (2, 1)]), tiles
    assert count == 20


def test_empty_matrices_do_not_belong_in_the_table() -> None:
    """The host leaves them out. No columns: no block, so nobody finishes. No rows: nothing holds iteration 2 back."""
    assert search(Protocol, build_table((1, 0), n_iter=2), [(1, 1)]) >= {"deadlock"}
    assert search(Protocol, build_table((1, 0), gradient=True), [(1, 1)]) >= {"deadlock"}
    assert search(Protocol, build_table((1, 0)), [(1, 1)]) >= {"wrong version of term"}
    assert search(Protocol, build_table((0, 2)), GRIDS) == set()
    assert search(Protocol, build_table((0, 2), n_iter=2), [(2, 2)]) >= {"race on z", "wrong version of z"}


# ---- the rules broken one at a time ----


class NoReset(Protocol):
    def reset(self) -> Work:
        yield from ()


class Prefetch(Protocol):
    """Waits for the next tile's inputs before it publishes the present result."""

    def turn(self, ticket: int) -> Work:
        tiles = self.table.tiles
        if not 0 <= ticket < len(tiles):
            return (yield from super().turn(ticket))
        yield from self.wait(tiles[ticket])
        yield from self.work(tiles[ticket])
        following = yield from self.claim(ticket)
        if following < len(tiles):
            yield from self.wait(tiles[following])
        yield from self.publish(tiles[ticket])
        return following


class LastClaimResets(Protocol):
    """The last program to claim past the end sums and resets; nobody counts exits."""

    def leave(self, ticket: int) -> Work:
        if ticket == len(self.table.tiles) + self.n_programs - 1:
            yield from self.total()
            yield from self.reset()


class FirstPastTheEndResets(Protocol):
    def leave(self, ticket: int) -> Work:
        if ticket == len(self.table.tiles):
            yield from self.reset()
        yield from super().leave(ticket)


class PublishFirst(Protocol):
    def process(self, tile: Tile) -> Work:
        yield from self.wait(tile)
        yield from self.publish(tile)
        yield from self.work(tile)


class RelaxedReads(Protocol):
    reads_order = RELAXED


class RelaxedFinished(Protocol):
    finished_order = RELAXED


class RelaxedExits(Protocol):
    exits_order = RELAXED


class ReleasedExits(Protocol):
    exits_order = RELEASE


class RelaxedWait(Protocol):
    wait_order = RELAXED


class FirstBlockFinishes(Protocol):
    def finishes(self, old: int, m: int, it: int) -> bool:
        return old == self.table.matrices[m][1] * it


class ReadsDoNotWait(Protocol):
    def wait(self, tile: Tile) -> Work:
        if tile.kind != "READ":
            yield from super().wait(tile)


class ReleasedBlocks(Protocol):
    blocks_order = RELEASE


class AcquiredBlocks(Protocol):
    blocks_order = ACQUIRE


class StaticTiles(Protocol):
    """Program p takes tiles p, p + n_programs, ...: no ticket."""

    def first_turn(self, program: int) -> int:
        return BEFORE_FIRST - program

    def claim(self, ticket: int) -> Work:
        yield from ()
        return BEFORE_FIRST - ticket if ticket <= BEFORE_FIRST else ticket + self.n_programs


class ExitsCountedEarly(Protocol):
    """A program that finds no further tile counts as gone before it has done its last one."""

    def turn(self, ticket: int) -> Work:
        tiles = self.table.tiles
        if not 0 <= ticket < len(tiles):
            return (yield from super().turn(ticket))
        following = yield from self.claim(ticket)
        if following >= len(tiles):
            yield from self.leave(following)
        yield from self.process(tiles[ticket])
        return following if following < len(tiles) else None


COMBINE_FIRST = TABLES["matrix"]._replace(tiles=[Tile("COMBINE", 0, 0), Tile("READ", 0, 0), Tile("READ", 0, 1)])
MUTANTS = [  # protocol, table, grid, what must be found
    (Prefetch, "matrix", (1, 1), {"deadlock"}),
    (Prefetch, "two iterations", (3, 3), {"deadlock"}),
    (LastClaimResets, "two blocks", (2, 2), {"race on term", "race on finished", "race on ticket"}),
    (FirstPastTheEndResets, "two blocks", (2, 2), {"deadlock", "tile twice", "counters not zero", "race on reads"}),
    (PublishFirst, "matrix", (2, 2), {"race on partial"}),
    (RelaxedReads, "matrix", (2, 2), {"race on partial"}),
    (RelaxedFinished, "gradient", (2, 2), {"race on v", "race on coefficient"}),
    (RelaxedWait, "matrix", (2, 2), {"race on partial"}),
    (RelaxedWait, "two iterations", (2, 2), {"race on v"}),
    (Protocol, COMBINE_FIRST, (2, 1), {"deadlock"}),
    (Protocol, COMBINE_FIRST, (1, 1), {"deadlock"}),
    (FirstBlockFinishes, "two blocks", (2, 2), {"race on z", "wrong version of z"}),
    (ReadsDoNotWait, "two iterations", (2, 2), {"wrong version of v", "race on v", "wait overtaken"}),
    (ReleasedBlocks, "two blocks", (2, 2), {"race on z"}),
    (AcquiredBlocks, "two blocks", (2, 2), {"race on z"}),
    (StaticTiles, "matrix", (2, 1), {"deadlock"}),
    (ExitsCountedEarly, "vector", (2, 2), {"race on vector term", "wrong version of vector term"}),
    (ExitsCountedEarly, "matrix", (2, 2), {"counters not zero", "wrong version of term", "race on reads"}),
    (RelaxedExits, "vector", (2, 2), {"race on vector term"}),
    (ReleasedExits, "vector", (2, 2), {"race on vector term"}),
    (NoReset, "matrix", (1, 1), {"counters not zero", "tile left out", "wrong result"}),
]


@pytest.mark.parametrize(
    ("protocol", "table", "grid", "expected"), MUTANTS, ids=[f"{row[0].__name__}-{row[2]}" for row in MUTANTS]
)
def test_broken_rule_is_found(
    protocol: type[Protocol], table: str | Table, grid: tuple[int, int], expected: set[str]
) -> None:
    found = search(protocol, TABLES[table] if isinstance(table, str) else table, [grid])
    assert expected <= found


def test_only_co_residency_saves_a_wait_for_a_higher_ticket() -> None:
    """With a second place free, another program serves the reads; the protocol never counts on one."""
    assert search(Protocol, COMBINE_FIRST, [(2, 2), (3, 3), (3, 2)]) == set()


@pytest.mark.parametrize("name", ["matrix", "gradient", "two iterations, gradient", "vector first"])
@pytest.mark.parametrize("protocol", [Protocol, RelaxedReads, PublishFirst, FirstBlockFinishes, ExitsCountedEarly])
def test_loads_and_stores_as_steps_find_the_same(protocol: type[Protocol], name: str) -> None:
    """That loads and stores may go with the atomic before them is an argument; this is its check."""
    coarse = explore(protocol(TABLES[name], 2), 2)
    fine = explore(protocol(TABLES[name], 2), 2, every_access=True)
    assert fine.states > coarse.states
    assert {w for w in fine.violations if "race" in w} == {w for w in coarse.violations if "race" in w}
    assert bool(fine.violations) == bool(coarse.violations)


# ---- claiming ahead ----


class ClaimAhead(Protocol):
    """Claims the next ticket at any moment of the present tile: before any of its atomic operations, or at its end."""

    def turn(self, ticket: int) -> Work:
        if not 0 <= ticket < len(self.table.tiles):
            return (yield from super().turn(ticket))
        tile, answer, following = self.process(self.table.tiles[ticket]), None, None
        while True:
            try:
                operation = tile.send(answer)
            except StopIteration:
                return (yield from self.claim(ticket)) if following is None else following
            if following is None and not isinstance(operation, Load | Store) and (yield Choose(2)):
                following = yield from self.claim(ticket)
            answer = yield operation


class TicketsOrder(LastClaimResets):
    """The alternative to counting exits: every claim releases what was done before it."""

    claim_order = ACQ_REL


class TicketsOrderAhead(ClaimAhead, TicketsOrder):
    pass


# The most tiles times matrices on each grid, for at most a hundred thousand states. With one place, any table.
LARGEST = {(2, 2): 12, (3, 2): 5, (3, 3): 4}
CLAIM_AHEAD = [
    (name, *grid)
    for name, table in TABLES.items()
    for grid in GRIDS
    if len(table.tiles) * len(table.matrices) <= LARGEST.get(grid, 99)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_programs", "resident"), CLAIM_AHEAD)
def test_claim_ahead_is_safe(name: str, n_programs: int, resident: int) -> None:
    """A program may hold its next ticket early if it serves tickets in order and publishes before the next wait.

    Proof. Of the tiles not yet published take the lowest. Tickets are handed out in order, so either nobody holds it,
    and then no higher one is held either and a program that holds nothing goes on to claim it; or its holder, which
    runs, has published all it held before (lower tickets) and is at this one. All it waits for is lower, hence
    published. So it goes on, however few programs run. The search agrees, for a claim at any moment of each tile.

    The kernel does not claim ahead on purpose, but a relaxed claim may take effect before the release above it, and
    this is why that does no harm.
    """
    assert_none(explore(ClaimAhead(TABLES[name], n_programs), resident))


def test_exits_need_counting_only_because_claims_are_relaxed() -> None:
    """With acq_rel claims the last claim past the end comes after all work; not so once claims run ahead."""
    for name in ("two blocks", "two iterations", "vector first"):
        assert search(TicketsOrder, TABLES[name], [(2, 2), (2, 1), (1, 1)]) == set()
    assert search(TicketsOrderAhead, TABLES["two blocks"], [(2, 2)]) >= {"race on reads", "counters not zero"}
