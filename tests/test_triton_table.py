"""The Triton kernels' table on the host: uploads, memory, failures, and what is refused before a launch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import BF16, F64, same_bits
from torch import Tensor

pytest.importorskip("triton")

from triton_problem import (
    DEVICE,
    INTERPRETED,
    MATRIX,
    Problem,
    _triton,  # noqa: F401
    columns_last,
    make,
    on_device,
)

from spectral_ops import backends, spectral_penalty  # noqa: E402
from spectral_ops.ops import capture, triton_table  # noqa: E402
from spectral_ops.ops.layout import Kind, Layout  # noqa: E402

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


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


def test_a_table_is_not_cut_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem([make(20, 32)], [MATRIX])
    problem.step()
    monkeypatch.setattr(capture, "capturing", lambda device: True)
    problem.step()
    problem.gradients[0] = on_device(columns_last(20, 32))
    with pytest.raises(RuntimeError, match="expected a step before a CUDA graph of it is captured"):
        problem.step()
    monkeypatch.setattr(capture, "capturing", lambda device: False)
    problem.gradients[0].zero_()
    problem.remember()
    problem.check(problem.step())


class Stream:
    def __init__(self, device_index: int, cuda_stream: int):
        self.device_index, self.cuda_stream, self.waited_for = device_index, cuda_stream, []

    def wait_stream(self, other: Any) -> None:
        self.waited_for.append(other)


def test_a_stream_waits_for_that_of_the_last_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Problem([make(5, 6)], [MATRIX]).table
    now = Stream(0, 0)
    active = SimpleNamespace(get_current_stream=lambda index: now.cuda_stream)
    monkeypatch.setattr(triton_table, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: now)

    def stream() -> Any:
        return made._stream(SimpleNamespace(is_cuda=True, get_device=lambda: now.device_index))

    first = now
    assert stream() is first and stream() is first and first.waited_for == []
    second = now = Stream(0, 7)
    assert stream() is second and stream() is second and second.waited_for == [first]
    now = first
    assert stream() is first and first.waited_for == [second]
    now = Stream(1, 0)  # the default stream of each device has the same handle
    assert stream() is now and now.waited_for == [first]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert stream() is None


def test_the_first_graph_takes_the_memory_that_stands_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem([make(20, 33)], [MATRIX])
    problem.step()
    (rows,) = problem.rows()
    (ready,) = problem.table._memories.values()
    with monkeypatch.context() as patch:
        patch.setattr(rows, "device", torch.device("cuda"))
        assert problem.table._memory(rows, None) is ready  # as under capture
    assert problem.table.captured and problem.table._memories == {}
    problem.remember()
    problem.check(problem.step())  # eager again, in a memory of its own
    (other,) = problem.table._memories.values()
    assert other is not ready
    made: list[Any] = []
    monkeypatch.setattr(triton_table.Memory, "__init__", lambda _, *args: made.append(args))
    monkeypatch.setattr(rows, "device", torch.device("cuda"))
    assert problem.table._memory(rows, None) is not other  # a second graph makes its own
    assert made == [(rows, problem.table._captured)]


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
