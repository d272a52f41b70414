"""Visits every interleaving of a few programs that share counters and buffers: deadlocks, races, wrong data, lost work.

A program is a generator of operations (`Protocol.turn`, queue_model.py):

    Start                     takes a place on the device; there are `resident` places, free again when a program ends
    Add(counter, order)       atomic addition of 1; its answer is the old value
    Wait(counter, n, order)   spins until counter >= n
    Choose(n)                 the search goes on with each of n answers
    Load, Store               plain accesses; a Store into a counter resets it

A stored value is only a version, and a Load names the version it must find.

**Order of memory.** A step is one atomic operation; the loads and stores behind it go with it. That is enough because
every access is checked for races by happens-before: two programs are ordered by release and acquire alone, and where
all conflicting accesses are ordered a load has one possible value, however late stores become visible. In place of
vector clocks a state keeps, for every program and every counter, the set of accesses that happen before whatever it
does next (`knows`, `released`): the same relation, and states that differ only in their past become one. An atomic
addition leaves standing what a counter has released (a release sequence); a plain store takes it away.
A spin may see a counter late. Then it waits longer and learns no less, provided that n itself lets it pass: a pass at
more than n is reported. A relaxed addition may take effect before a release above it; the protocol has to allow for
that (claim-ahead in test_queue_protocol.py).

**Launches.** A finished launch orders everything. The next begins with fresh data and the counters as they were left:
if all are zero this is the state in which the first one began, and one search stands for any number of launches. If
not, it is searched as well.

**Not modelled:** the threads within a program, and a device that never again runs a program it has started.
"""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

RELAXED, ACQUIRE, RELEASE, ACQ_REL = "relaxed", "acquire", "release", "acq_rel"
ENDED = -1  # in place of a node: the program is over
STORE = ("store", None)
MAX_STATES = 1_000_000  # a mutant may run away; no test needs a fifth of it


class Start(NamedTuple):
    pass


class Add(NamedTuple):
    counter: str
    order: str


class Wait(NamedTuple):
    counter: str
    target: int
    order: str


class Choose(NamedTuple):
    options: int


class Load(NamedTuple):
    cell: str
    version: int


class Store(NamedTuple):
    cell: str
    version: int


Operation = Start | Add | Wait | Choose | Load | Store
Work = Generator[Operation, Any, Any]


class Programs(Protocol):
    """What is searched: the programs, the memory they share, and the tickets each of which must be served once."""

    n_programs: int
    counters: Sequence[str]
    data: dict[str, int]  # buffer -> version at the start of a launch
    result: int  # the version of every buffer at its end
    tickets: Sequence[object]

    def first_turn(self, program: int) -> int: ...

    def turn(self, ticket: int) -> Work: ...


class Result(NamedTuple):
    states: int
    steps: int
    violations: dict[str, str]  # what went wrong -> a shortest run that shows it


class _State(NamedTuple):
    values: tuple[int, ...]  # of the counters, then of the other cells
    processed: int  # tiles begun in this launch, a bit each
    released: tuple[int, ...]  # for each counter, the accesses that an acquire of it brings
    programs: tuple[tuple[int, int], ...]  # (node, knows), sorted: programs are interchangeable


class _Nodes:
    """Where programs stand: a ticket and the answers since it came; replaying them gives the next operation."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.keys: list[tuple[int, tuple[int | None, ...]]] = []
        self.operations: list[Operation] = []
        self.numbers: dict[tuple[int, tuple[int | None, ...]], int] = {}
        self.following: dict[tuple[int, int | None], int] = {}

    def number(self, ticket: int, results: tuple[int | None, ...] = ()) -> int:
        if (ticket, results) in self.numbers:
            return self.numbers[ticket, results]
        turn = self.programs.turn(ticket)
        try:
            operation = next(turn)
            for result in results:
                operation = turn.send(result)
        except StopIteration as end:
            node = ENDED if end.value is None else self.number(end.value)
        else:
            node = len(self.keys)
            self.keys.append((ticket, results))
            self.operations.append(operation)
        self.numbers[ticket, results] = node
        return node

    def after(self, node: int, result: int | None) -> int:
        if (node, result) not in self.following:
            ticket, results = self.keys[node]
            self.following[node, result] = self.number(ticket, (*results, result))
        return self.following[node, result]

    def describe(self, node: int) -> str:
        ticket, tiles = self.keys[node][0], self.programs.tickets
        where = str(tiles[ticket]) if 0 <= ticket < len(tiles) else "start" if ticket < 0 else f"ticket {ticket}"
        operation = self.operations[node]
        return f"{where}: {type(operation).__name__}({', '.join(map(str, operation))})"


class _Search:
    def __init__(self, programs: Programs, resident: int, every_access: bool) -> None:
        self.programs, self.resident, self.every_access = programs, resident, every_access
        self.nodes = _Nodes(programs)
        self.n_counters = len(programs.counters)
        self.cells = {name: i for i, name in enumerate([*programs.counters, *programs.data])}
        self.bits: dict[tuple[str, Any], int] = {}  # (cell, access) -> its bit in `knows`
        self.accesses: dict[str, int] = {}  # cell -> the bits of all its accesses
        self.violations: dict[str, str] = {}
        self.parents: dict[_State, tuple[_State, int] | None] = {}
        self.steps = 0

    def launch(self, counters: tuple[int, ...]) -> _State:
        programs = sorted((self.nodes.number(self.programs.first_turn(p)), 0) for p in range(self.programs.n_programs))
        return _State((*counters, *self.programs.data.values()), 0, (0,) * self.n_counters, tuple(programs))

    def report(self, what: str, state: _State, node: int | None, detail: str) -> None:
        if what in self.violations:
            return
        run = [detail] if node is None else [detail, self.nodes.describe(node)]
        at: _State | None = state
        while at is not None and (parent := self.parents[at]) is not None:
            at, last = parent
            run.append(self.nodes.describe(last))
        self.violations[what] = "\n".join(reversed(run))

    def bit(self, cell: str, access: Any) -> int:
        if (cell, access) not in self.bits:
            self.bits[cell, access] = 1 << len(self.bits)
            self.accesses[cell] = self.accesses.get(cell, 0) | self.bits[cell, access]
        return self.bits[cell, access]

    def successors(self, state: _State) -> Iterator[tuple[int, _State]]:
        standing = [self.nodes.operations[node] for node, _ in state.programs if node != ENDED]
        running = sum(not isinstance(operation, Start) for operation in standing)
        for i, (node, _) in enumerate(state.programs):
            if node == ENDED or (i and state.programs[i] == state.programs[i - 1]):
                continue
            answers: Iterable[int | None] = [None]
            match self.nodes.operations[node]:
                case Start() if running >= self.resident:
                    continue
                case Wait(counter, target) if state.values[self.cells[counter]] < target:
                    continue
                case Choose(options):
                    answers = range(options)
            for answer in answers:
                yield node, self.step(state, i, answer)

    def step(self, state: _State, i: int, result: int | None) -> _State:
        """Program i goes on by one atomic operation and the loads and stores behind it."""
        values, released, processed = list(state.values), list(state.released), state.processed
        knows = [known for _, known in state.programs]
        first = node = state.programs[i][0]
        while True:
            ticket = self.nodes.keys[node][0]
            match self.nodes.operations[node]:
                case Add(cell, order) | Wait(cell, _, order) as operation:
                    c = self.cells[cell]
                    if isinstance(operation, Add):
                        result = values[c]
                        values[c] += 1
                    elif values[c] > operation.target:
                        self.report("wait overtaken", state, first, f"{cell} is {values[c]} already")
                    access = ("wait", ticket) if result is None else ("add", result)
                    self.access(state, first, knows, released, i, cell, access)
                    if order in (ACQUIRE, ACQ_REL):
                        knows[i] |= released[c]
                    if order in (RELEASE, ACQ_REL):
                        released[c] |= knows[i]
                case Load(cell, version):
                    self.access(state, first, knows, released, i, cell, ("load", ticket))
                    if (found := values[self.cells[cell]]) != version:
                        detail = f"{cell} holds version {found}, not {version}"
                        self.report(f"wrong version of {cell.split('[')[0]}", state, first, detail)
                case Store(cell, version):
                    self.access(state, first, knows, released, i, cell, STORE)
                    values[self.cells[cell]] = version
                    if cell in self.programs.counters:
                        released[self.cells[cell]] = 0
            node, result = self.nodes.after(node, result), None
            if node == ENDED:
                break
            begun, results = self.nodes.keys[node]
            if not results and begun < len(self.programs.tickets):
                if processed >> begun & 1:
                    self.report("tile twice", state, first, f"ticket {begun} is handed out again")
                processed |= 1 << begun
            if self.every_access or not isinstance(self.nodes.operations[node], Load | Store):
                break
        nodes = [n for n, _ in state.programs]
        nodes[i] = node
        # What all programs that go on know can surprise none of them.
        settled = -1
        for n, known in zip(nodes, knows, strict=True):
            settled &= known if n != ENDED else -1
        if settled != -1:
            knows, released = [k & ~settled for k in knows], [r & ~settled for r in released]
        return _State(tuple(values), processed, tuple(released), tuple(sorted(zip(nodes, knows, strict=True))))

    def access(
        self, state: _State, first: int, knows: list[int], released: list[int], i: int, cell: str, access: Any
    ) -> None:
        """A store must happen after all earlier accesses, any other access after the last store."""
        bit = self.bit(cell, access)
        conflicting = self.accesses[cell] if access == STORE else self.bit(cell, STORE)
        made = functools.reduce(int.__or__, knows)
        if conflicting & made & ~knows[i]:
            detail = f"{access[0]} of {cell}, not ordered after an access of another program"
            self.report(f"race on {cell.split('[')[0]}", state, first, detail)
        replaced = self.accesses[cell] if access == STORE else bit
        if replaced & made:
            for sets in (knows, released):
                for j, accesses in enumerate(sets):
                    sets[j] = accesses & ~replaced
        knows[i] |= bit

    def check_end(self, state: _State) -> None:
        left = {name: n for name in self.programs.counters if (n := state.values[self.cells[name]])}
        if left:
            self.report("counters not zero", state, None, f"left over: {left}")
        if state.processed != (1 << len(self.programs.tickets)) - 1:
            self.report("tile left out", state, None, f"processed: {state.processed:b}")
        expected = self.programs.result
        wrong = {name: got for name in self.programs.data if (got := state.values[self.cells[name]]) != expected}
        if wrong:
            self.report("wrong result", state, None, f"versions at the end: {wrong}")

    def run(self, launches: int) -> Result:
        starts = {self.launch((0,) * self.n_counters)}
        for _ in range(launches):
            starts = {start for start in starts if start not in self.parents}
            self.parents |= dict.fromkeys(starts)
            queue, starts = deque(starts), set()
            while queue:
                state = queue.popleft()
                stuck = True
                for node, following in self.successors(state):
                    stuck = False
                    self.steps += 1
                    if following not in self.parents:
                        self.parents[following] = (state, node)
                        queue.append(following)
                if all(node == ENDED for node, _ in state.programs):
                    self.check_end(state)
                    starts.add(self.launch(state.values[: self.n_counters]))
                elif stuck:
                    waiting = [self.nodes.describe(node) for node, _ in state.programs if node != ENDED]
                    self.report("deadlock", state, None, "for ever: " + "; ".join(waiting))
                if len(self.parents) > MAX_STATES:
                    raise RuntimeError(f"explore: expected at most {MAX_STATES} states. Take a smaller table.")
        return Result(len(self.parents), self.steps, self.violations)


def explore(programs: Programs, resident: int, launches: int = 2, every_access: bool = False) -> Result:
    """All runs with at most `resident` programs on the device; with `every_access` loads and stores are steps too."""
    search = _Search(programs, resident, every_access)
    collecting = gc.isenabled()
    gc.disable()  # a third of the time, and the states contain no cycles
    try:
        return search.run(launches)
    finally:
        if collecting:
            gc.enable()
