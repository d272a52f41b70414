"""PTX read as text: its functions, which instructions they hold, and whether barriers stand where the queue needs them.

A value published through an atomic is safe if (1) a barrier stands between the last plain store of any thread and the
releasing atomic that one thread does for all, and (2) another between an acquiring access and the next load of any
thread. `missing_barriers` walks the control flow, through calls, and reports each place where some path lacks one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BARRIERS = ("bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    text: str
    predicated: bool

    @property
    def is_barrier(self) -> bool:
        return self.opcode.startswith(BARRIERS) and not self.predicated

    @property
    def is_release(self) -> bool:
        ordered = ".release" in self.opcode or ".acq_rel" in self.opcode
        return ordered and self.opcode.startswith(("atom.", "red.", "st."))

    @property
    def is_acquire(self) -> bool:
        return (".acquire" in self.opcode or ".acq_rel" in self.opcode) and self.opcode.startswith(("atom.", "ld."))

    @property
    def is_store(self) -> bool:
        """A write to global memory that orders nothing: relaxed atomics too."""
        return self.opcode.startswith(("st.global", "atom.", "red.")) and not self.is_release and not self.is_acquire

    @property
    def is_load(self) -> bool:
        return self.opcode.startswith(("ld.global", "cp.async.c")) and not self.is_acquire


@dataclass
class Function:
    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # .branchtargets

    def after(self, at: int) -> list[int]:
        """Where control may be after instruction `at`; len(code): it has returned."""
        here = self.code[at]
        if here.opcode.startswith("bra"):
            target = self.labels[here.text.split()[-1]]
            return [target, at + 1] if here.predicated else [target]
        if here.opcode.startswith("brx"):
            return [self.labels[name] for name in self.tables[re.split(r"[\s,]+", here.text)[-1]]]
        if here.opcode.startswith(("ret", "exit", "trap")):
            return [len(self.code), at + 1] if here.predicated else [len(self.code)]
        return [at + 1]


def functions(ptx: str) -> dict[str, Function]:
    found: dict[str, Function] = {}
    current: Function | None = None
    for statement in _statements(ptx):
        head = re.search(r"\.(?:func|entry)\s+(?:\([^)]*\)\s*)?([\w$.]+)", statement)
        if head:
            _, body, statement = statement[head.end() :].partition("{")
            current = found.setdefault(head[1], Function(head[1])) if body else None  # None: a prototype
        if current is None:
            continue
        while label := re.match(r"[{}\s]*([\w$]+):(?!:)", statement):
            current.labels[label[1]] = len(current.code)
            statement = statement[label.end() :]
        targets = re.match(r"\s*\.branchtargets\s+(.*)", statement, re.DOTALL)
        if targets:  # its label, taken above, names the table
            name = next(name for name, at in reversed(current.labels.items()) if at == len(current.code))
            current.tables[name] = re.split(r"[\s,]+", targets[1].strip())
            continue
        code = re.match(r"[{}\s]*(@!?%p\d+\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
        if code:
            current.code.append(Instruction(code[2], " ".join(statement.split()), code[1] is not None))
    return found


def _statements(ptx: str) -> Iterator[str]:
    """Without comments, line numbers and debug sections."""
    ptx = re.split(r"^\s*\.section", ptx, maxsplit=1, flags=re.MULTILINE)[0]
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    ptx = re.sub(r"^\s*\.(loc|file|version|target|address_size)\b[^\n]*", "", ptx, flags=re.MULTILINE)
    yield from ptx.split(";")


@dataclass(frozen=True)
class State:
    """What may have happened since the last barrier: a plain store, an acquiring access."""

    stored: bool = False
    acquired: bool = False

    def join(self, other: State) -> State:
        return State(self.stored or other.stored, self.acquired or other.acquired)


def missing_barriers(ptx: str) -> list[str]:
    """One line per instruction that some path reaches without the barrier it needs; empty: all is well."""
    code = functions(ptx)
    entries: dict[str, State] = {name: State() for name in code}
    exits: dict[str, State | None] = dict.fromkeys(code)  # None: not known to return yet
    problems: set[str] = set()
    while True:
        before = (dict(entries), dict(exits))
        for function in code.values():
            exits[function.name] = _walk(function, entries, exits, problems)
        if before == (entries, exits):
            return sorted(problems)


def _walk(
    function: Function, entries: dict[str, State], exits: dict[str, State | None], problems: set[str]
) -> State | None:
    """The state at the function's return, from its entry's; calls' entries are widened on the way."""
    at_start: dict[int, State] = {0: entries[function.name]}
    todo = [0]
    out: State | None = None
    while todo:
        at = todo.pop()
        state = at_start[at]
        if at >= len(function.code):
            out = state if out is None else out.join(state)
            continue
        here = function.code[at]
        if here.is_barrier:
            state = State()
        if here.is_release and state.stored:
            problems.add(f"{function.name}: no barrier between a store and {here.text}")
        if here.is_load and state.acquired:
            problems.add(f"{function.name}: no barrier between an acquire and {here.text}")
        if here.is_store:
            state = State(True, state.acquired)
        if here.is_acquire:
            state = State(state.stored, True)
        if here.opcode.startswith("call"):
            callee = next((word for word in re.findall(r"[\w$.]+", here.text) if word in entries), None)
            if callee is not None:
                entries[callee] = entries[callee].join(state)
                returned = exits[callee]
                if returned is None:
                    continue
                state = returned
        for following in function.after(at):
            joined = at_start[following].join(state) if following in at_start else state
            if at_start.get(following) != joined:
                at_start[following] = joined
                todo.append(following)
    return out


def count(ptx: str, function: str, opcode: str, text: str = "") -> int:
    """Instructions, in all functions whose name holds `function`, whose opcode and text match these expressions."""
    return sum(
        1
        for name, body in functions(ptx).items()
        if function in name
        for here in body.code
        if re.match(opcode, here.opcode) and re.search(text, here.text)
    )
