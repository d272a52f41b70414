"""csrc among threads and forked processes: who waits for whom, and what survives a fork."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from helpers import F32, gaussian, same_bits, unit
from torch import Tensor

from spectral_ops import backends, power_iteration, spectral_norm
from spectral_ops.ops.accumulate_grad import accumulate_grad
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Layout, pack

OPS = torch.ops.spectral_ops
PATIENCE_S = 60.0  # far beyond any scheduling; a child that hangs in OpenMP hangs for ever
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this system")
# Python 3.12 warns of forking while threads run, which is what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def native() -> Iterator[ModuleType]:
    reason = backends.available()["native"]
    if reason is not None:
        pytest.skip(f"native not usable: {reason}")
    with backends.use_backend("native"):
        yield backends.native()


class Work:
    """A step with a gradient and a converged norm, of a matrix of several strips.

    Everything large is made before the fork: torch's own loops over it have no guard, and hang in the child.
    """

    def __init__(self) -> None:
        self.w, self.v = gaussian("fork", 200, 700).float(), unit("fork", 700).float()
        self.gradient = torch.zeros(200, 700)
        self.table = LayerTable([Layout()], [1.0], [1.0])
        assert self.table.native.at([self.w]).table.read_tiles > 1

    def __call__(self) -> bytes:
        self.gradient.numpy().fill(0)
        state = (self.v.clone(), torch.zeros(1, dtype=torch.int32), torch.zeros(1))
        value = accumulate_grad([self.gradient], [self.w], *state, self.table, 2.0, 0.1)
        parts = (value, state[0], self.gradient[::50, ::50], spectral_norm(self.w))
        return b"".join(x.contiguous().numpy().tobytes() for x in parts)


work: Work  # of the test that is running; a forked worker finds it here


def do_work() -> bytes:
    return work()


@pytest.fixture
def expected() -> bytes:
    """What the parent computes, in a parallel region, so that there is a pool of threads to lose."""
    global work
    torch.set_num_threads(2)
    work = Work()
    return work()


def in_a_fork(task: Callable[[], bytes]) -> bytes:
    """What the task returns in a forked child. Fails, and ends the child, if that takes too long."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            os.write(write, task())
            status = 0
        finally:
            os._exit(status)  # no pytest, no atexit in the child
    os.close(write)
    out = b""
    deadline = time.monotonic() + PATIENCE_S
    try:
        while True:
            ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"the forked child has not answered in {PATIENCE_S} s: it hangs")
            chunk = os.read(read, 1 << 16)
            if not chunk:
                break
            out += chunk
    finally:
        os.close(read)
        if still_runs(child):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return out


def still_runs(child: int) -> bool:
    """Whether the child still runs a moment later; reaps it where it does not."""
    for _ in range(200):
        if os.waitpid(child, os.WNOHANG)[0] == child:
            return False
        time.sleep(0.01)
    return True


# ---- fork ----


@fork
def test_a_forked_child_computes_the_same(native: ModuleType, expected: bytes) -> None:
    """The parent's OpenMP pool does not survive the fork: a parallel region in the child would wait for it for ever."""
    assert native.threads_allowed() and torch.get_num_threads() == 2
    assert in_a_fork(lambda: bytes([native.threads_allowed()])) == b"\0"
    assert in_a_fork(work) == expected
    assert native.threads_allowed() and work() == expected, "the parent has changed"


@fork
def test_a_child_of_a_forked_child_computes_the_same(expected: bytes) -> None:
    assert in_a_fork(lambda: in_a_fork(work)) == expected


@fork
def test_multiprocessing_with_fork(expected: bytes) -> None:
    """As a DataLoader's workers are made."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        answers = [pool.apply_async(do_work) for _ in range(4)]
        assert [answer.get(timeout=PATIENCE_S) for answer in answers] == [expected] * 4


def run_alone(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that loads the compiled module by its path: no torch, no threads."""
    load = (
        "import importlib.util, os, sys\n"
        "spec = importlib.util.spec_from_file_location('spectral_ops._native', sys.argv[1])\n"
        "native = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(native)\n"
    )
    command = [sys.executable, "-c", load + program, str(backends.native().__file__)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)


@fork
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_a_child_of_a_process_without_threads_may_use_them() -> None:
    """Nothing is lost where there was no pool: the guard is for those that had one."""
    program = """
import threading
def child():
    pid = os.fork()
    if pid == 0:
        os._exit(native.threads_allowed())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(len(os.listdir('/proc/self/task')), child())
wait = threading.Event()
threading.Thread(target=wait.wait, daemon=True).start()
print(len(os.listdir('/proc/self/task')), child())
wait.set()
"""
    result = run_alone(program)
    assert result.stdout.split() == ["1", "1", "2", "0"], result.stderr


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.parametrize(("threads", "tasks"), [(1, 0), (2, 1), (3, 2)], ids=["none", "two", "three"])
def test_a_call_uses_as_many_threads_as_it_is_told(threads: int, tasks: int) -> None:
    """One thread opens no parallel region; more are there afterwards, in OpenMP's pool. A single tile needs none."""
    program = f"""
import array
def call(rows):
    w, v, y = (array.array('f', [1.0]) * n for n in (rows * 1024, 1024, rows))
    exponents, sigma = array.array('i', [0]), array.array('f', [0.0])
    table = native.Table([(0, 0, 1.0, 1.0, [1, rows, 1024], [rows * 1024, 1024, 1], 0, [], 0, 0, 0)])
    a = [x.buffer_info()[0] for x in (w, v, exponents, sigma, y)]
    table.step([a[0]], [], a[1], a[1], a[2], a[2], a[3], a[4], 0, 2.0, 1.0, 1.0, 1, {threads})
    return table.read_tiles, round(sigma[0])
before = len(os.listdir('/proc/self/task'))
print(*call(32), len(os.listdir('/proc/self/task')) - before)
print(*call(256), len(os.listdir('/proc/self/task')) - before)
"""
    result = run_alone(program)
    one, many = result.stdout.splitlines()
    assert one == "1 181 0" and many == f"8 512 {tasks}", result.stderr


# ---- the environment variable ----


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_the_environment_chooses_the_instruction_set(native: ModuleType, isa: str) -> None:
    if not native.isa_supported(isa):
        pytest.skip(f"this processor or build has no {isa}")
    assert run_alone("print(native.isa())", SPECTRAL_OPS_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_is_refused() -> None:
    result = run_alone("native.isa()", SPECTRAL_OPS_ISA="sse9")
    assert result.returncode == 1
    expected = (
        "RuntimeError: spectral_ops: expected SPECTRAL_OPS_ISA to name an instruction set of this processor "
        "(avx512, avx2, baseline), got 'sse9'. Unset it to have the best one chosen."
    )
    assert result.stderr.strip().splitlines()[-1] == expected


# ---- Python threads ----


def at_once(tasks: list[Callable[[], None]]) -> None:
    """Runs the tasks in threads that start together; raises what any of them raised."""
    gate, failures = threading.Barrier(len(tasks)), []

    def run(task: Callable[[], None]) -> None:
        try:
            gate.wait(PATIENCE_S)
            task()
        except BaseException as error:  # noqa: BLE001  (an assertion must not die with its thread)
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "deadlock"
    if failures:
        raise failures[0]


@pytest.mark.parametrize("op_threads", [1, 2])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, torch.bfloat16)], ids=["one_table", "a_table_exchanged"])
def test_two_threads_with_one_table(op_threads: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The registered ops share a table and its workspace per list of layouts: calls that overlap wait."""
    torch.set_num_threads(op_threads)
    layouts = pack([Layout()])
    weights = [gaussian(f"thread{i}", 300, 1100).to(dtype) for i, dtype in enumerate(dtypes)]
    v, zeros = unit("thread", 1100).float(), torch.zeros(1, dtype=torch.int32)

    def step(w: Tensor) -> list[Tensor]:
        return list(OPS.power_iteration([w], v, zeros, layouts, 4))[:3]

    expected = [step(w) for w in weights]

    def check(i: int) -> None:
        for _ in range(40):
            assert all(same_bits(x, y) for x, y in zip(step(weights[i]), expected[i], strict=True))

    at_once([lambda: check(0), lambda: check(1)])


def test_backward_of_one_table_in_two_threads() -> None:
    """It holds no lock: everything it writes is its own."""
    w = [gaussian(f"b{i}", 100, 900).float() for i in range(2)]
    settings = (pack([Layout()]), [1.0], [1.0], 2.0)
    u, v, sigma = unit("bu", 100).float(), unit("bv", 900).float(), torch.tensor([3.0])

    def gradient(i: int) -> Tensor:
        return OPS.spectral_penalty_backward(torch.tensor(1.0 + i), [w[i]], sigma, u, v, *settings)[0]

    expected = [gradient(0), gradient(1)]

    def check(i: int) -> None:
        for _ in range(40):
            assert same_bits(gradient(i), expected[i])

    at_once([lambda: check(0), lambda: check(1)])


@pytest.mark.filterwarnings("ignore:spectral_norm.*had not converged:RuntimeWarning")  # it is to take its time
@pytest.mark.parametrize("call", ["step", "spectral_norm"])
def test_other_threads_run_during_a_call(call: str) -> None:
    """The GIL is released: a thread that only counts goes on counting while a call of some 100 ms runs."""
    torch.set_num_threads(1)
    w = gaussian("gil", 1000, 500).float()
    v = unit("gil", 500).float()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=tick)
    counter.start()
    try:
        start = time.perf_counter()
        if call == "step":
            power_iteration([w], [v], n_iter=1000)
        else:
            OPS.spectral_norm([w] * 20, pack([Layout()] * 20), 1e-15, 60)
        end = time.perf_counter()
    finally:
        stop.set()
        counter.join()
    assert end - start >= 0.02, "too short to say anything"
    # Held, the lock would let through what comes just before and after the call: at most one tick inside.
    inside = [t for t in ticks if start + 0.1 * (end - start) <= t <= end - 0.1 * (end - start)]
    assert len(inside) >= 3
