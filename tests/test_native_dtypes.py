"""Every bit pattern of bfloat16 and float16 through every load and store of csrc, against torch's own conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from helpers import BF16, F16, F32, F64, NAMES, same_bits
from layout_samples import spread, transposed
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.accumulate_grad import accumulate_grad
from spectral_ops.ops.layer_table import LayerTable
from spectral_ops.ops.layout import Kind, Layout, pack

HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=NAMES.get)
EXPONENTS = {BF16: 256, F16: 32}  # distinct exponent fields


@pytest.fixture(params=["baseline", "avx2", "avx512"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = backends.available()["native"]
    if reason is not None:
        pytest.skip(f"native not usable: {reason}")
    native: ModuleType = backends.native()
    if not native.isa_supported(request.param):
        pytest.skip(f"this processor or build has no {request.param}")
    before = native.isa()
    assert native.select_isa(request.param) and native.isa() == request.param
    with backends.use_backend("native"):
        yield request.param
    native.select_isa(before)


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65536, in order."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)


def same_numbers(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, one NaN being as good as another, and one zero."""
    plain = [torch.where(t.isnan() | (t == 0), 0, t) for t in (x, y)]
    return torch.equal(x.isnan(), y.isnan()) and same_bits(*plain)


# ---- loads ----


@HALVES
def test_every_weight_as_a_matrix_of_its_own(dtype: torch.dtype) -> None:
    """1x1 matrices: sigma is |w|, without rounding; a single element is the tail of a row."""
    w = patterns(dtype)
    count = w.numel()
    layouts = pack([Layout(parts=count, row_dim=1)])
    exponents = torch.zeros(count, dtype=torch.int32)
    sigma, u, v, _ = torch.ops.spectral_ops.power_iteration(
        [w.view(count, 1, 1)], torch.ones(count), exponents, layouts, 1
    )
    assert same_numbers(sigma, torch.where(w.isfinite(), w.float().abs(), torch.nan))
    finite = w.isfinite() & (w != 0)
    assert torch.equal(u[finite], w.float().sign()[finite]) and torch.equal(v[finite], torch.ones(int(finite.sum())))


@HALVES
@pytest.mark.parametrize("place", [torch.clone, spread], ids=["registers", "packed"])
def test_every_weight_in_whole_registers(dtype: torch.dtype, place: Callable[[Tensor], Tensor]) -> None:
    """A row of all numbers of one exponent: the next v is the row itself, normalised, each element good to float32."""
    count = EXPONENTS[dtype]
    by_exponent = patterns(dtype).view(2, count, -1).transpose(0, 1).reshape(count, 1, -1)
    w = place(by_exponent)
    n = w.shape[2]
    v = torch.full((count, n), n**-0.5)
    v[:, ::2] *= 0.5  # or the row's sum would be zero
    v = v / v.norm(dim=1, keepdim=True)
    v[:, n // 2 :] *= -1  # the negative half
    layouts, exponents = pack([Layout(parts=count, row_dim=1)]), torch.zeros(count, dtype=torch.int32)
    sigma, _, v_new, _ = torch.ops.spectral_ops.power_iteration([w], v.flatten(), exponents, layouts, 1)
    rows = by_exponent.double().squeeze(1)[:-1]  # the last exponent is infinities and NaN
    expected = rows / rows.norm(dim=1, keepdim=True)
    found = v_new.view(count, n)
    # v may come out as its negative nowhere: y = w . v > 0.
    assert ((found[:-1] - expected).abs() <= 4 * torch.finfo(F32).eps * expected.abs().clamp(min=2.0**-24)).all()
    norms = rows.norm(dim=1)
    inside = norms <= torch.finfo(F32).max  # sigma of the largest bfloat16 numbers is beyond float32; v is not
    assert ((sigma[:-1] / norms)[inside] - 1).abs().max() <= 4 * torch.finfo(F32).eps
    assert sigma[:-1][~inside].isinf().all() and inside.sum() >= count - 6
    assert sigma[-1].isnan() and torch.equal(found[-1], v[-1])


# ---- loads and stores of gradients ----


# From far below the smallest subnormal to far above the largest half, with many bits set.
STRENGTHS = (1.2345678e-9, -3.14159e-5, 0.0123456, -0.77777, 333.333, -1.7e9)


@HALVES
@pytest.mark.parametrize(
    ("shape", "place"),
    [((1, 65536), torch.clone), ((65536, 1), torch.clone), ((1, 65536), spread), ((256, 256), transposed)],
    ids=["registers", "tails", "one_by_one", "columns_for_rows"],
)
def test_every_gradient(dtype: torch.dtype, shape: tuple[int, int], place: Callable[[Tensor], Tensor]) -> None:
    """gradient += one and the same number, for every gradient; the number is seen in a float32 gradient."""
    w = torch.ones(shape)
    v = torch.full((shape[1],), shape[1] ** -0.5)  # 2^-8, 2^-4 or 1: the product u_r v_j is exact
    into_float, into_half = (LayerTable([Layout()], [0.0], [1.0]) for _ in range(2))
    for strength in STRENGTHS:
        added, found = torch.zeros(shape), place(patterns(dtype).view(shape))
        for table, gradient in ((into_float, added), (into_half, found)):
            state = (v.clone(), torch.zeros(1, dtype=torch.int32), torch.zeros(1))
            accumulate_grad([gradient], [w], *state, table, 1.0, strength)
        assert added.unique().numel() == 1 and added.view(-1)[0] != 0
        assert same_numbers(found.contiguous(), (patterns(dtype).view(shape).float() + added).to(dtype))


@HALVES
def test_every_gradient_of_a_vector(dtype: torch.dtype) -> None:
    """The scalar load and store: added is 2 strength x, by the penalty x^2 of a shift."""
    for x in (1e-7, 0.01, -1.5, 1000.0):
        gradient, w = patterns(dtype).clone(), torch.full((65536,), x)
        state = (torch.empty(0), torch.empty(0, dtype=torch.int32), torch.empty(0))
        accumulate_grad([gradient], [w], *state, LayerTable([Layout(Kind.SHIFT)], [0.0], [1.0]), 1.0, 0.37)
        added = 0.37 * 2.0 * w.double()
        assert same_numbers(gradient, (patterns(dtype).double() + added).float().to(dtype))


# ---- stores ----


def around_every_number(dtype: torch.dtype) -> Tensor:
    """Every number, the middles between neighbours, where ties go to even, and the floats next to all of these."""
    w = patterns(dtype)
    numbers = w[w.isfinite()].double().unique()
    middles = (numbers[1:] + numbers[:-1]) / 2
    limit = torch.finfo(dtype).max
    beyond = torch.tensor([limit * (1 + torch.finfo(dtype).eps / 4), torch.finfo(F32).max], dtype=F64)
    exact = torch.cat([numbers, middles, beyond, -beyond]).float()
    inf = torch.full_like(exact, torch.inf)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 2.0**-149, -(2.0**-149)])
    return torch.cat([exact, torch.nextafter(exact, inf), torch.nextafter(exact, -inf), special])


@HALVES
@pytest.mark.parametrize("layout", ["registers", "tails", "columns_for_rows"])
def test_rounding_of_floats_to_halves(dtype: torch.dtype, layout: str) -> None:
    """The gradient's own store: sigma, u and v are chosen so that it is 1 * u v' and nothing else is rounded."""
    values = around_every_number(dtype)
    one, count = torch.ones(1), values.numel()
    u, v = (one, values) if layout == "registers" else (values, one)
    w = torch.empty(u.numel(), v.numel(), dtype=dtype)
    if layout == "columns_for_rows":  # two columns, rows innermost
        v = torch.ones(2)
        w = transposed(torch.empty(count, 2, dtype=dtype))
    (gradient,) = torch.ops.spectral_ops.spectral_penalty_backward(
        torch.tensor(1.0), [w], torch.tensor([0.5]), u, v, pack([Layout()]), [0.0], [1.0], 1.0
    )
    assert gradient.stride() == w.stride()
    for found in gradient.view(-1, count) if layout != "columns_for_rows" else gradient.T:
        assert same_numbers(found.contiguous(), values.to(dtype))


@HALVES
def test_rounding_of_floats_to_halves_one_by_one(dtype: torch.dtype) -> None:
    """The scalar store: float gradients that fall on ties, by adding a half to another."""
    w = patterns(dtype)
    numbers = w[w.isfinite() & (w.float().abs() <= torch.finfo(dtype).max / 8)]
    step = torch.finfo(dtype).eps / 4  # 2 step x is then within a place of its neighbour, and often half of one
    for ratio in (0.5, 0.25, 0.375, 3.0):
        x = (numbers.float() * ratio).to(dtype)
        gradient = numbers.clone()
        state = (torch.empty(0), torch.empty(0, dtype=torch.int32), torch.empty(0))
        accumulate_grad([gradient], [x], *state, LayerTable([Layout(Kind.SHIFT)], [0.0], [1.0]), 1.0, step)
        assert same_numbers(gradient, (numbers.double() + 2 * step * x.double()).float().to(dtype))
