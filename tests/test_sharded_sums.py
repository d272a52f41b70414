"""The sums of sharded weights: of ranks played one after another against the truth, and by each backend alike."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import gaussian, same_bits, svd
from sharded_ranks import by_part, rank, start, step, zoo

from spectral_ops import available, use_backend
from spectral_ops.ops.eager_penalty import Kept
from spectral_ops.ops.layout import Layout
from spectral_ops.sharding.read import read_here

BACKENDS = [name for name in ("reference", "native", "triton") if available()[name] is None]
# Interpreted, a step of all these takes seconds.
CASES = [(name, k, count) for name in BACKENDS for k, count in ((2.0, 1), (2.0, 3), (1.0, 2), (3.0, 5))]
CASES = [case for case in CASES if case[0] != "triton" or case[1:] in ((2.0, 3), (3.0, 5))]


@pytest.mark.parametrize(("backend", "exponent", "count"), CASES)
def test_step_against_float64(backend: str, exponent: float, count: int) -> None:
    weights, layouts = zoo()
    weights.pop("large")  # whose sigma^k leaves float32
    dtype = torch.float32
    with use_backend(backend):  # type: ignore[arg-type]
        ranks = [rank(weights, layouts, i / count, (i + 1) / count) for i in range(count)]
        state = start(ranks[0].reader, dtype)
        value, new, us = step(ranks, state, exponent)
    at = index = 0
    expected = 0.5 * ((weights["scale"].double().abs() ** exponent - 1) ** 2).sum()
    rows = [list(u.split([p.rows for p in r.reader.matrices])) for r, u in zip(ranks, us, strict=True)]
    for i, w in enumerate(by_part(weights, layouts)):
        n = w.shape[1]
        v = state.v[at : at + n].double()
        y = w.double() @ v
        z = w.double().T @ y
        u = torch.cat([x[i] for x in rows]).double()
        found, next_v = new.sigma[index].item(), new.v[at : at + n].double()
        at, index = at + n, index + 1
        target = 0.0 if i == len(new.sigma) - 1 else 1.0
        if w.numel() == 0:
            assert found == 0 and same_bits(next_v.float(), v.float())
            continue
        sigma = 0.0 if y.norm() == 0 else (z.norm() / y.norm()).item()
        expected = expected + 0.5 * (sigma**exponent - target**exponent) ** 2
        # float32: y and z of a shard, and the cosine that ||y|| is made of, are rounded to 2^-24 each.
        assert abs(found - sigma) <= 2e-6 * sigma
        if sigma > 0:
            assert (next_v - z / z.norm()).norm() <= 2e-6 and (u - y / y.norm()).norm() <= 2e-6
        else:
            assert abs(next_v.norm() - 1) <= 1e-6 and not u.any()
    assert abs(value - expected) <= 1e-5 * expected


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("skipped", [False, True])
def test_compiled_sums_are_those_of_plain_torch(backend: str, skipped: bool) -> None:
    weights, layouts = zoo()
    weights["nan"], layouts["nan"] = gaussian("nan", 6, 4).float(), Layout()
    weights["nan"][2, 1] = math.nan
    weights["infinite"], layouts["infinite"] = gaussian("infinite", 6, 4).float(), Layout()
    weights["infinite"][5, 0] = math.inf
    found_inf = torch.tensor(float(skipped))
    found = {}
    one = rank(weights, layouts, 0, 1)
    state = start(one.reader, torch.float32)
    with use_backend("reference"):
        value, local = read_here(one.reader.table, one.reader.row_count, one.views, state.v, state.exponents, 2.0)
    for name in ("reference", backend):
        with use_backend(name):  # type: ignore[arg-type]
            local = Kept(*(x.clone() for x in local))
            products = one.reader.exchange(one.views, state.v, local, state.exponents, value)
            new = state.clone()
            terms, vectors = one.reader.finish(products, new, 2.0, found_inf)
        found[name] = {**products._asdict(), **new._asdict(), "terms": terms, "sum of vectors": vectors}
    for key, x in found["reference"].items():
        if key in ("terms",) and skipped:
            continue  # of a step that is skipped they say nothing
        # Sums of some ten numbers in another order, in float64 but for what is rounded to float32 in the end.
        tolerance = 2e-7 if x.dtype == torch.float32 else 1e-14
        other = found[backend][key].double()
        assert torch.allclose(other, x.double(), rtol=tolerance, atol=1e-300, equal_nan=True), key
    assert skipped == same_bits(found[backend]["v"], state.v)


@pytest.mark.skipif("native" not in BACKENDS, reason="the other backends take minutes for so many steps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_lead_to_the_largest_singular_value(dtype: torch.dtype) -> None:
    """After jumps of magnitude, too: exponents follow, and nothing leaves its range on the way."""
    weights, layouts = zoo(dtype)
    weights.pop("large" if dtype == torch.float32 else "empty")
    with use_backend("native"):
        state = start(rank(weights, layouts, 0, 1).reader, dtype)
        for factor in (1.0, 1e-7, 1e8):
            scaled = {name: w * factor for name, w in weights.items()}
            ranks = [rank(scaled, layouts, i / 3, (i + 1) / 3) for i in range(3)]
            for _ in range(400):
                _, state, _ = step(ranks, state, 2.0)
            for w, sigma in zip(by_part(scaled, layouts), state.sigma.tolist(), strict=True):
                # The slowest of them has its first two values 2 % apart.
                assert abs(sigma - svd(w).sigma) <= 1e-5 * svd(w).sigma
