"""What tensors looked like, compared with what they look like now: by DLPack's C interface, and by attributes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from helpers import BF16, F16
from torch import Tensor, nn

from spectral_ops import backends
from spectral_ops.ops.snapshot import Snapshot


@pytest.fixture(params=["dlpack", "attributes"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "attributes":
        monkeypatch.delattr(Tensor, "__dlpack_c_exchange_api__", raising=False)
    elif backends.available()["native"] or not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("needs the compiled module, and a torch with DLPack's C interface")
    return str(request.param)


def addresses(snapshot: Snapshot, tensors: list[Tensor]) -> list[int] | None:
    found = snapshot.addresses(tensors)
    if isinstance(found, bytes):
        return torch.frombuffer(bytearray(found), dtype=torch.int64).tolist() if found else []
    return found


def start() -> list[Tensor]:
    return [torch.ones(6, 4), nn.Parameter(torch.ones(3, 2, 5, 5)), torch.ones(7, dtype=BF16)]


CHANGES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "shape": lambda t: [t[0].view(4, 6), *t[1:]],
    "strides": lambda t: [torch.ones(4, 6).t(), *t[1:]],
    "channels_last": lambda t: [t[0], nn.Parameter(t[1].detach().contiguous(memory_format=torch.channels_last)), t[2]],
    "more_dimensions": lambda t: [t[0][None], *t[1:]],
    "dtype": lambda t: [*t[:2], torch.ones(7, dtype=F16)],  # as many bits
    "type": lambda t: [t[0], t[1].detach(), t[2]],
    "device": lambda t: [t[0].to("meta"), *t[1:]],
    "sparse": lambda t: [t[0].to_sparse(), *t[1:]],
    "fewer": lambda t: t[:2],
    "more": lambda t: [*t, t[0]],
    "order": lambda t: [t[2], t[1], t[0]],
}


def test_which_way_is_taken(way: str) -> None:
    assert isinstance(Snapshot(start()).addresses(start()), bytes) == (way == "dlpack")


def test_others_that_look_the_same(way: str) -> None:
    """Addresses are those of the tensors given now, with their offset into the storage."""
    snapshot = Snapshot(start())
    shifted = torch.ones(8, 4)[2:]
    for tensors in (start(), [shifted, *start()[1:]]):
        assert addresses(snapshot, tensors) == [t.data_ptr() for t in tensors]
    assert addresses(snapshot, tuple(tensors)) == [t.data_ptr() for t in tensors]  # type: ignore[arg-type]
    assert addresses(Snapshot([]), []) == []


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_difference_is_seen(way: str, change: Callable[[list[Tensor]], list[Tensor]]) -> None:
    tensors = start()
    snapshot = Snapshot(tensors)
    assert snapshot.addresses(change(tensors)) is None
    assert addresses(snapshot, tensors) == [t.data_ptr() for t in tensors]


def test_changed_in_place(way: str) -> None:
    """The same object and the same memory, read otherwise."""
    w = nn.Parameter(torch.ones(6, 6))
    snapshot = Snapshot([w])
    w.data = w.data.t()
    assert snapshot.addresses([w]) is None


@pytest.mark.parametrize("spoil", ["sparse", "meta"])
def test_what_shows_no_memory_is_never_the_same(way: str, spoil: str) -> None:
    w = torch.ones(3, 3).to_sparse() if spoil == "sparse" else torch.ones(3, 3, device="meta")
    found = Snapshot([w]).addresses([w])
    assert found is None or spoil == "meta" and found == [0]


def test_a_subclass_goes_by_attributes(way: str) -> None:
    class Mine(nn.Parameter):
        pass

    w = Mine(torch.ones(3, 3))
    assert Snapshot([w]).addresses([w]) == [w.data_ptr()]
    assert Snapshot([w]).addresses([nn.Parameter(w.detach())]) is None


def test_another_interface_is_refused() -> None:
    native = pytest.importorskip("spectral_ops._native")
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        native.Snapshot(object(), [])
    newer = ctypes.create_string_buffer(128)
    newer[0] = 2  # the major version, in the byte order of every processor here
    name = ctypes.create_string_buffer(b"dlpack_exchange_api")
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    with pytest.raises(TypeError, match="^Snapshot: expected version 1 of DLPack's exchange interface, got another"):
        native.Snapshot(make(ctypes.addressof(newer), ctypes.addressof(name), None), [])
    snapshot = native.Snapshot(Tensor.__dlpack_c_exchange_api__, [torch.ones(2)])  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="^Snapshot: expected a list of tensors"):
        snapshot.addresses(3)
    assert snapshot.addresses([3]) is None
