"""Sharded weights of zeros, NaN, extreme magnitudes and shapes: what the unsharded model gives, on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import BF16, F16, F32, F64, gaussian, relative_error
from regularizer_truth import assert_same_bits
from sharding_models import like, load_gaussian, mesh, place, state_of, whole, wholes
from sharding_run import run
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from spectral_ops import SpectralRegularizer, available, use_backend
from spectral_ops.rules import Rule

pytestmark = pytest.mark.slow

BACKENDS = [name for name in ("reference", "native") if available()[name] is None]
# By rows, and by columns; the sums around the columns' all-reduces are in plain torch in every backend.
WHERE = [*((backend, 0) for backend in BACKENDS), (BACKENDS[-1], 1)]
WORLD = 3
STEPS = 3
# Rounding of the weights' dtype where gradients are written in it, and of the vectors' elsewhere; sums round otherwise.
TOLERANCE = {F64: 1e-13, F32: 2e-5, BF16: 2e-2, F16: 3e-3}


class Zoo(nn.Module):
    """Shapes at the edge: empty, of one row, of one column, of fewer rows and columns than ranks."""

    rules: dict[str, Rule | str] = {
        "packed": Rule(split=(3, 1), row_dim=1), "experts": "matrices", "parts": Rule(split=(4, 0)),
        **dict.fromkeys(("full", "row", "column", "one", "two", "none", "nothing"), "matrix"),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "full": (9, 8), "row": (1, 7), "column": (7, 1), "one": (1, 1), "two": (2, 2), "none": (0, 4),
            "nothing": (4, 0), "packed": (5, 6), "experts": (2, 3, 4), "parts": (8, 3),
        }.items():  # fmt: skip
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.layer = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(2)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(gaussian(name, *p.shape))


Change = Callable[[dict[str, Tensor]], None]


def _zero(p: dict[str, Tensor]) -> None:
    for x in p.values():
        x.zero_()


def _zero_rows(p: dict[str, Tensor]) -> None:
    """All of the first rank's."""
    p["full"][:3] = 0
    p["packed"][:, :2] = 0
    p["layer.bias"].zero_()


def _nan(p: dict[str, Tensor]) -> None:
    """On one rank, in one part."""
    p["full"][7, 3] = math.nan
    p["packed"][4, 5] = math.inf
    p["parts"][0, 0] = -math.inf
    p["layer.bias"][4] = math.nan


def _tiny(p: dict[str, Tensor]) -> None:
    for x in p.values():
        x.mul_(1e-38 if x.dtype != F16 else 1e-6)


def _huge(p: dict[str, Tensor]) -> None:
    for x in p.values():
        x.mul_(1e30 if x.dtype != F16 else 1e3)


def _vast(p: dict[str, Tensor]) -> None:
    """Of float64: sigma^4 is infinite."""
    for x in p.values():
        x.mul_(1e90)


def _orthogonal(p: dict[str, Tensor]) -> None:
    """W v = 0 for the vectors that are loaded, exactly: another vector is taken."""
    p["full"].zero_()
    p["full"][:, 0] = 1


CHANGES: dict[str, Change | None] = {
    "as it is": None, "zero": _zero, "zero_rows": _zero_rows, "nan": _nan, "tiny": _tiny, "huge": _huge, "vast": _vast,
    "orthogonal": _orthogonal,
}  # fmt: skip


def edge(
    change: str, then: str, backend: str, dtype: torch.dtype, at: int | None, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what is compared, state) of some steps of the penalty alone on a model sharded along a dimension, or whole."""
    model = Zoo().to(dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(p.to(BF16).to(dtype))  # the same numbers in every dtype
        if CHANGES[change] is not None:
            CHANGES[change](parameters)  # type: ignore[misc]
    if at is not None:
        place(model, mesh(-1), lambda name, p, i: [Shard(min(at, p.ndim - 1))])
    with use_backend(backend):  # type: ignore[arg-type]
        reg = SpectralRegularizer(model, strength=0.1, rules=model.rules, **options)
        _load(reg, change)
        found = {}
        for step in range(STEPS):
            if step == 1 and then != "as it is":
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        x = whole(p)
                        CHANGES[then]({name: x} if then in ("huge", "tiny", "zero") else _all(model, name, x))  # type: ignore[misc]
                        p.copy_(like(p, x))
            model.zero_grad()
            found[f"penalty, step {step}"] = reg.accumulate_grad_()
            found |= {f"{name}, step {step}": x for name, x in wholes(model, "grad").items()}
            found |= {f"sigma of {name}, step {step}": x for name, x in reg.sigmas().items()}
        found["penalty, not advanced"] = reg(advance=False).detach()
    return found, state_of(reg)


def _all(model: nn.Module, name: str, x: Tensor) -> dict[str, Tensor]:
    every = {other: torch.zeros(p.shape, dtype=p.dtype) for other, p in model.named_parameters()}
    return every | {name: x}


def _load(reg: SpectralRegularizer, change: str) -> None:
    load_gaussian(reg)
    if change == "orthogonal":
        state = reg.state_dict()
        state["v"]["full"].copy_(torch.eye(8)[1])
        reg.load_state_dict(state)


def compare(
    change: str, backend: str, dtype: torch.dtype, at: int, then: str = "as it is", **options: Any
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    truth, _ = edge(change, then, backend, dtype, None, options)
    ranks = run(WORLD, edge, change, then, backend, dtype, at, options)
    for found, state in ranks:
        assert found.keys() == truth.keys()
        for name, x in found.items():
            y = truth[name]
            if y.isinf().any() and name.startswith("penalty"):
                # NaN where sigma^(2k) overflows: the local read has it too, times a strength of 0.
                assert not x.isfinite().any()
                continue
            assert torch.equal(x.isfinite(), y.isfinite()), name
            assert torch.equal(x.isnan(), y.isnan()), name
            x, y = (z.double().nan_to_num(0, 0, 0) for z in (x, y))
            size = y.abs().max() if y.any() else 1.0  # so that the norm of it stays in range
            e = relative_error(x / size, y / size)
            assert e <= TOLERANCE[dtype], (name, e, x, y)
        assert_same_bits(state, ranks[0][1])
    return ranks


@pytest.mark.parametrize(("backend", "at"), WHERE, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_weights(change: str, at: int, backend: str) -> None:
    compare(change, backend, F64 if change != "tiny" else F32, at)


@pytest.mark.parametrize(("backend", "at"), WHERE, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dtypes(dtype: torch.dtype, at: int, backend: str) -> None:
    compare("as it is", backend, dtype, at)
    compare("huge", backend, dtype, at)


@pytest.mark.parametrize(("backend", "at"), WHERE, ids=str)
@pytest.mark.parametrize(
    ("change", "then"), [("tiny", "huge"), ("as it is", "zero"), ("huge", "tiny"), ("as it is", "nan")]
)
def test_sudden_changes(change: str, then: str, at: int, backend: str) -> None:
    compare(change, backend, F32, at, then)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"exponent": 1.0},
        {"exponent": 3.0},
        {"target": {"full": 0.0, "norm.weight": 2.0, "packed": 3.0}},
        {"target": 0.0, "exponent": 1.0},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], backend: str) -> None:
    compare("as it is", backend, F64, 0, **options)
    compare("zero_rows", backend, F64, 1, **options)


# ---- how it is called ----


def placed(at: int | None) -> tuple[Any, SpectralRegularizer, torch.optim.Optimizer]:
    model: Any = Zoo()
    if at is not None:
        place(model, mesh(-1), lambda name, p, i: [Shard(min(at, p.ndim - 1))])
    reg = SpectralRegularizer(model, strength=0.1, rules=model.rules)
    load_gaussian(reg)
    return model, reg, torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)


def scaled(at: int | None, found_inf: float, damaged: bool) -> dict[str, Tensor]:
    """As a fused optimizer under GradScaler calls it; half of the gradients there, half missing."""
    model, reg, optimizer = placed(at)
    handle = reg.attach(optimizer)
    for i, (name, p) in enumerate(model.named_parameters()):
        if i % 2 == 0:
            p.grad = like(p, gaussian("g" + name, *p.shape))
        if damaged and name in ("full", "layer.bias", "packed"):
            with torch.no_grad():
                x = whole(p)
                x.view(-1)[-1] = math.nan
                p.copy_(like(p, x))
    before = state_of(reg)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)  # type: ignore[attr-defined]
    handle._before_step(optimizer, (), {})
    if found_inf:
        assert_same_bits(before, state_of(reg))
        for i, (name, p) in enumerate(model.named_parameters()):
            given = gaussian("g" + name, *p.shape).float() if i % 2 == 0 else torch.zeros(p.shape)
            assert torch.equal(whole(p.grad), given), name
    assert handle.penalty is not None
    return wholes(model, "grad") | {"penalty": handle.penalty} | reg.sigmas()


@pytest.mark.parametrize("at", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("found_inf", "damaged"), [(0.0, False), (1.0, False), (1.0, True)], ids=["taken", "skipped", "skipped_nan"]
)
def test_scaled_gradients(found_inf: float, damaged: bool, at: int) -> None:
    truth = scaled(None, found_inf, damaged)
    for found in run(WORLD, scaled, at, found_inf, damaged):
        for name, x in truth.items():
            if name != "penalty" or not found_inf:
                assert relative_error(found[name], x) <= TOLERANCE[F32], name


def unchanged(at: int) -> None:
    model, reg, _ = placed(at)
    before = state_of(reg) | wholes(model)
    with torch.no_grad():
        first = reg()
    second = reg(advance=False)
    assert torch.equal(first, second.detach()) and second.requires_grad and not first.requires_grad
    assert_same_bits(before, state_of(reg) | wholes(model))
    assert all(p.grad is None for p in model.parameters())
    second.backward()
    by_loss = wholes(model, "grad")
    model.zero_grad()
    value = reg.accumulate_grad_()
    assert torch.equal(value, first)
    for name, x in wholes(model, "grad").items():  # the strength is a float32 in the loss
        assert relative_error(by_loss[name], x) <= 4 * torch.finfo(F32).eps, name


@pytest.mark.parametrize("at", [0, 1], ids=["rows", "columns"])
def test_what_changes_nothing(at: int) -> None:
    run(WORLD, unchanged, at)


def strengths(at: int | None) -> dict[str, Tensor]:
    """Of a mapping with zeros, times a tensor that is filled anew; through the loss, twice, scaled."""
    torch.manual_seed(0)
    model: Any = Zoo()
    if at is not None:
        place(model, mesh(-1), lambda name, p, i: [Shard(min(at, p.ndim - 1))])
    by_pattern = {"full": 0.0, "norm.weight": 0.0, "packed": 2.0, "*": 0.5}
    reg = SpectralRegularizer(model, strength=by_pattern, rules=model.rules)
    load_gaussian(reg)
    reg.strength = factor = torch.tensor(0.3)
    found = {}
    for step in range(2):
        factor.fill_(0.3 + step)
        (2 * reg()).backward()  # adds to the gradients of the step before
        found |= {f"{name}, step {step}": x for name, x in wholes(model, "grad").items()}
    assert not found["grad of full, step 0"].any() and not found["grad of norm.weight, step 1"].any()
    return found


@pytest.mark.parametrize("at", [0, 1], ids=["rows", "columns"])
def test_strengths(at: int) -> None:
    truth = strengths(None)
    for found in run(WORLD, strengths, at):
        for name, x in truth.items():
            assert relative_error(found[name], x) <= TOLERANCE[F32], name


def second_derivative() -> str:
    model, reg, _ = placed(0)
    try:
        (grad,) = torch.autograd.grad(reg(), model.full, create_graph=True)
        grad.sum().backward()
    except RuntimeError as refused:
        return str(refused)
    return "no error"


def test_second_derivatives_are_refused() -> None:
    for text in run(WORLD, second_derivative):
        assert text.startswith("spectral_penalty: expected one differentiation, got a second one")


def compiled() -> str:
    _, reg, _ = placed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        try:
            reg.accumulate_grad_()
        except RuntimeError as refused:
            return str(refused)
    return "no error"


def test_inside_the_compiler() -> None:
    for text in run(WORLD, compiled):
        assert text == (
            "SpectralRegularizer: expected whole parameters inside torch.compile, got sharded ones. Compile the model, "
            "and call the regularizer outside: accumulate_grad_() after backward."
        )


def one_rank_disagrees() -> list[float]:
    """NaN of one rank reaches the others' sigma in the same step, and nothing else of them."""
    model, reg, _ = placed(0)
    with torch.no_grad():
        if dist.get_rank() == 1:
            model.full.to_local().fill_(math.nan)
    reg.accumulate_grad_()
    assert not whole(model.full.grad).isfinite().any()
    return [x.sum().item() for name, x in reg.sigmas().items() if name in ("full", "packed")]


def test_nan_on_one_rank() -> None:
    for full, packed in run(WORLD, one_rank_disagrees):
        assert math.isnan(full) and math.isfinite(packed)
