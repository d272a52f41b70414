"""The op adamw_step: which numbers, in which memory, and what the step leaves for the next."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from adamw_samples import (
    EVERY_KIND,
    EXPONENT,
    HYPER,
    LAYOUTS,
    OPTION_SETS,
    OPTIONS,
    SCALE,
    STEP,
    TARGET,
    Problem,
    plain,
    sample_of,
    vector,
)
from helpers import BF16, F16, F32, F64, NAMES, eps, error, relative_error, same_bits, step_in_float64
from layout_samples import Sample, channels_last, spread, transposed, vector_penalty_in_float64, window
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.layout import Kind

DTYPE_PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16), (F64, F64)]


def assert_agrees(problem: Problem, step: Callable[[], Tensor], grad_scale: float = 1.0) -> None:
    """Weights, moments, what is left for the next step and the value, against float64."""
    expected, starts = problem.step_in_float64(grad_scale), problem.spectrum.v.double().clone()
    before = [w.detach().double().clone() for w in problem.tensors.weights]
    value = step()
    dtype = problem.dtype
    tensors = problem.tensors._asdict()
    for i, truth in enumerate(expected):
        for key, after in truth.items():
            if not tensors[key]:
                continue
            stored = tensors[key][i]
            size = after.abs().max().item() if after.numel() else 0.0
            moved = (truth["weights"] - before[i]).abs().max().item() if after.numel() else 0.0
            # A handful of roundings of the numbers and of what was taken off them (measured: 3 eps); then the one to
            # the weight's own dtype.
            allowed = 16 * eps(dtype) * (size + moved) + 0.5 * torch.finfo(stored.dtype).eps * size
            smallest = 2.0**-25 if stored.dtype == F16 else 0.0
            assert error(stored, after) <= allowed + smallest, (problem.samples[i].name, key)
        assert problem.tensors.steps[i].item() == STEP
    assert_spectrum(problem, starts, value)


def assert_spectrum(problem: Problem, starts: Tensor, value: Tensor) -> None:
    """That of the weights as they are stored now, one step on from the given vectors."""
    dtype, at, total = problem.dtype, 0, 0.0
    sigmas, us, vs = [], [], []
    for s, w in zip(problem.samples, problem.tensors.weights, strict=True):
        if not s.layout.is_matrix:
            total += 0.0 if s.layout.kind == Kind.PLAIN else vector_value(s, w)
            continue
        for matrix in s.matrices(w.detach()):
            n = matrix.shape[1]
            v = starts[at : at + n]
            at += n
            if matrix.numel() == 0:
                sigma, u, v_new = torch.zeros((), dtype=F64), torch.zeros(matrix.shape[0], dtype=F64), v
            else:
                sigma, u, v_new = step_in_float64(matrix, v)
                total += (sigma.item() ** EXPONENT - TARGET**EXPONENT) ** 2
            sigmas.append(sigma)
            us.append(u)
            vs.append(v_new)
    if sigmas:
        # Sums of up to 9001 terms: measured 6 roundings.
        assert relative_error(problem.spectrum.sigma, torch.stack(sigmas)) <= 32 * eps(dtype)
        assert relative_error(problem.spectrum.u, torch.cat(us)) <= 64 * eps(dtype)
        assert relative_error(problem.spectrum.v, torch.cat(vs)) <= 64 * eps(dtype)
    expected = HYPER.strength * SCALE * total
    assert abs(value.item() - expected) <= 64 * eps(dtype) * (expected + HYPER.strength * SCALE)


def vector_value(sample: Sample, w: Tensor) -> float:
    return vector_penalty_in_float64(
        w.detach().double(), sample.layout.kind, sample.layout.parts, EXPONENT, TARGET
    ).item()


@pytest.mark.parametrize("sample", LAYOUTS, ids=lambda s: s.name)
def test_every_layout(backend: str, sample: Sample) -> None:
    problem = Problem([sample])
    w = problem.tensors.weights[0]
    gaps = None if w._base is None else w._base.isnan().sum()
    assert_agrees(problem, problem.step)
    assert gaps is None or w._base is not None and w._base.isnan().sum() == gaps


@pytest.mark.parametrize("place", [transposed, spread, window, channels_last], ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", ["conv", "conv_channels_last", "transposed_conv"])
def test_gradient_that_lies_elsewhere(backend: str, name: str, place: Callable[[Tensor], Tensor]) -> None:
    problem = Problem([sample_of(name)], place=place)
    assert_agrees(problem, problem.step)
    again = Problem([sample_of(name)], place=place)
    again.table = problem.table  # as at the second step: nothing is looked at anew
    assert_agrees(again, again.step)


@pytest.mark.parametrize("options", OPTION_SETS, ids=lambda o: "-".join(o) or "none")
@pytest.mark.parametrize(("dtype", "gradient_dtype"), DTYPE_PAIRS, ids=lambda d: NAMES[d])
def test_options_and_dtypes(
    backend: str, dtype: torch.dtype, gradient_dtype: torch.dtype, options: dict[str, bool]
) -> None:
    problem = Problem(EVERY_KIND, dtype, gradient_dtype, OPTIONS._replace(**options))
    assert_agrees(problem, problem.step)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=lambda d: NAMES[d])
@pytest.mark.parametrize("options", OPTION_SETS[:4], ids=lambda o: "-".join(o) or "none")
def test_masters(backend: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    problem = Problem(EVERY_KIND, dtype, options=OPTIONS._replace(**options), masters=True)
    assert_agrees(problem, problem.step)
    for w, master in zip(problem.tensors.weights, problem.tensors.masters, strict=True):
        assert master is not None and same_bits(w, master.to(dtype))


def test_masters_of_some(backend: str) -> None:
    """float32 parameters beside 16-bit ones have none."""
    problem = Problem(EVERY_KIND)
    with_none = Problem(EVERY_KIND)
    with_none.tensors = with_none.tensors._replace(masters=[None] * len(EVERY_KIND))
    problem.step()
    with_none.step()
    assert all(same_bits(a, b) for a, b in zip(problem.all_tensors(), with_none.all_tensors(), strict=True))


def test_masters_of_some_16_bit_parameters(backend: str) -> None:
    """As of a loaded state: each as it would be in a call of its own kind."""
    mixed, all_of_them, none = (Problem(EVERY_KIND, BF16, F32, masters=masters) for masters in (True, True, False))
    masters = [m if i % 2 else None for i, m in enumerate(mixed.tensors.masters)]
    mixed.tensors = mixed.tensors._replace(masters=masters)
    for problem in (mixed, all_of_them, none):
        problem.step()
    for i, w in enumerate(mixed.tensors.weights):
        assert same_bits(w, (all_of_them if i % 2 else none).tensors.weights[i]), EVERY_KIND[i].name


@pytest.mark.parametrize("shape", [(70_001,), (300, 401), (3, 5, 7, 11)], ids=str)
@pytest.mark.parametrize("place", [torch.clone, transposed, spread], ids=lambda p: p.__name__)
def test_plain(backend: str, shape: tuple[int, ...], place: Callable[[Tensor], Tensor]) -> None:
    """In several pieces, and with gaps in memory."""
    problem = Problem([plain("plain", *shape, place=place), vector(Kind.BIAS, 3)])
    assert_agrees(problem, problem.step)


@pytest.mark.parametrize("kind", [Kind.BIAS, Kind.SCALE, Kind.SHIFT], ids=lambda k: k.name.lower())
@pytest.mark.parametrize("place", [torch.clone, spread], ids=lambda p: p.__name__)
def test_long_vectors(backend: str, kind: Kind, place: Callable[[Tensor], Tensor]) -> None:
    """Longer than what the native backend takes the slopes of at a time."""
    problem = Problem([vector(kind, 2600, parts=2 if kind is Kind.BIAS else 1, place=place)])
    assert_agrees(problem, problem.step)


def test_missing_gradients(backend: str) -> None:
    """Zero for what has a term of R; what has none is left as it is."""
    problem, zero = Problem(EVERY_KIND), Problem(EVERY_KIND)
    missing = [1, 3, 6]  # a matrix, a bias, a plain one
    gradients = [None if i in missing else g for i, g in enumerate(problem.tensors.gradients)]
    zeros = [torch.zeros_like(g) if i in missing else g for i, g in enumerate(zero.tensors.gradients) if g is not None]
    problem.tensors = problem.tensors._replace(gradients=gradients)
    zero.tensors = zero.tensors._replace(gradients=zeros)
    before = [x.clone() for x in (problem.tensors.weights[6], problem.tensors.exp_avgs[6], problem.tensors.steps[6])]
    problem.step()
    zero.step()
    for i in range(len(EVERY_KIND)):
        lists = problem.tensors[0], problem.tensors[2], problem.tensors[3], problem.tensors[4]
        others = zero.tensors[0], zero.tensors[2], zero.tensors[3], zero.tensors[4]
        if i != 6:
            # Native has a loop of its own for parameters with a gradient, with other products contracted.
            for x, y in zip(lists, others, strict=True):
                assert error(x[i], y[i].double()) <= 8 * eps(F32) * (1 + y[i].abs().max().item()), EVERY_KIND[i].name
    after = problem.tensors.weights[6], problem.tensors.exp_avgs[6], problem.tensors.steps[6]
    assert all(same_bits(x, y) for x, y in zip(before, after, strict=True))
    assert problem.tensors.steps[1].item() == STEP


def test_skipped(backend: str) -> None:
    problem = Problem(EVERY_KIND, options=OPTIONS._replace(amsgrad=True))
    for g in problem.tensors.gradients:
        assert g is not None
        g.fill_(math.inf)
    before = [x.clone() for x in problem.all_tensors()]
    value = problem.step(found_inf=torch.tensor(1.0))
    assert all(same_bits(x, y) for x, y in zip(problem.all_tensors(), before, strict=True))
    assert value.isfinite()
    problem.tensors = problem.tensors._replace(gradients=Problem(EVERY_KIND).tensors.gradients)
    assert_agrees(problem, lambda: problem.step(found_inf=torch.tensor(0.0)))


@pytest.mark.parametrize("scale", [8.0, torch.tensor(8.0)], ids=["float", "tensor"])
def test_grad_scale(backend: str, scale: float | Tensor) -> None:
    problem, other = Problem(EVERY_KIND), Problem(EVERY_KIND)
    assert_agrees(problem, lambda: problem.step(grad_scale=scale), 8.0)
    for g in other.tensors.gradients:
        assert g is not None
        g.div_(8.0)
    other.step()
    assert all(same_bits(x, y) for x, y in zip(problem.all_tensors(), other.all_tensors(), strict=True))


def test_scalars_as_tensors(backend: str) -> None:
    problem, other = Problem(EVERY_KIND), Problem(EVERY_KIND)
    other.hyper = HYPER._replace(lr=torch.tensor(HYPER.lr, dtype=F64), strength=torch.tensor(HYPER.strength, dtype=F64))
    values = problem.step(), other.step()
    assert error(values[0], values[1].double()) <= 2 * eps(F32) * values[0].abs().item()
    for x, y in zip(problem.all_tensors(), other.all_tensors(), strict=True):
        assert error(x, y.double()) <= 4 * eps(F32) * (1 + y.abs().double().max().item())


def test_versions_count_our_writes(backend: str) -> None:
    problem = Problem(EVERY_KIND)
    before = [w._version for w in problem.tensors.weights]
    problem.step()
    assert all(w._version > old for w, old in zip(problem.tensors.weights, before, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e12])
def test_range(backend: str, scale: float) -> None:
    """sigma far from one: what is read of the new weight stays in range."""
    problem = Problem([sample_of("strips"), sample_of("conv_channels_last")], hyper=HYPER._replace(lr=0.0))
    for w in problem.tensors.weights:
        w.mul_(scale)
    problem.spectrum.sigma.mul_(scale)
    problem.spectrum.exponents.copy_(torch.frexp(problem.spectrum.sigma).exponent - 1)
    starts, matrices = problem.spectrum.v.double(), []
    for s, w in zip(problem.samples, problem.tensors.weights, strict=True):
        matrices += s.matrices(w)
    problem.step()
    truth = torch.stack(
        [step_in_float64(m, v)[0] for m, v in zip(matrices, starts.split([m.shape[1] for m in matrices]), strict=True)]
    )
    assert relative_error(problem.spectrum.sigma, truth) <= 32 * eps(F32)
    assert torch.linalg.vector_norm(problem.spectrum.v).isfinite()


@pytest.mark.parametrize(("scale", "exponent"), [(1e10, 2.0), (1e22, 1.0), (1e-22, 1.0)])
def test_a_large_sigma_leaves_weights_finite(backend: str, scale: float, exponent: float) -> None:
    """The penalty's gradient, c u v', is in range where c and sigma together are not."""
    found = []
    for name in ("reference", backend):
        problem = Problem([sample_of("strips")], options=OPTIONS._replace(exponent=exponent))
        (w,) = problem.tensors.weights
        w.mul_(scale)
        problem.spectrum.sigma.mul_(scale)
        problem.spectrum.exponents.copy_(torch.frexp(problem.spectrum.sigma).exponent - 1)
        with backends.use_backend(name):  # type: ignore[arg-type]
            problem.step()
        found.append([w, problem.tensors.exp_avgs[0]])  # the square of such a gradient is beyond float32
    for reference, x in zip(*found, strict=True):
        assert x.isfinite().all()
        assert relative_error(x, reference.double()) <= 64 * eps(F32)


def test_nan_comes_through_and_v_survives(backend: str) -> None:
    problem = Problem([sample_of("linear")])
    gradient = problem.tensors.gradients[0]
    assert gradient is not None
    gradient[0, 0] = math.nan
    before = problem.spectrum.v.clone()
    value = problem.step()
    assert value.isnan() and problem.spectrum.sigma.isnan().all()
    assert problem.tensors.weights[0].isnan().sum() == 1
    assert same_bits(problem.spectrum.v, before)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    samples = [*EVERY_KIND, sample_of("column_blocks"), sample_of("transposed_strips"), plain("large", 300, 500)]
    results = []
    with backends.use_backend("native"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            problem = Problem(samples)
            value = problem.step()
            results.append([*problem.all_tensors(), value])
    for other in results[1:]:
        assert all(same_bits(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("dtype", "options"), [(F32, {"amsgrad": True}), (BF16, {}), (F16, {"decoupled": True}), (F64, {})]
)
def test_instruction_sets(isa: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    native = backends.native()
    if not native.isa_supported(isa):
        pytest.skip(f"this processor lacks {isa}")
    before = native.isa()
    native.select_isa(isa)
    try:
        with backends.use_backend("native"):
            problem = Problem(EVERY_KIND, dtype, options=OPTIONS._replace(**options))
            assert_agrees(problem, problem.step)
    finally:
        native.select_isa(before)


# ---- stochastic rounding ----


def stepped(backend: str, samples: list[Sample], seed: int = 3, step: int = STEP, lr: float = 2.0**-12) -> list[Tensor]:
    """Weights after a step of size lr, in bfloat16 rounded by chance."""
    with backends.use_backend(backend):  # type: ignore[arg-type]
        problem = Problem(samples, BF16, F32, OPTIONS._replace(stochastic_rounding=True, seed=seed))
        problem.hyper = HYPER._replace(lr=lr, weight_decay=0.0, beta1=0.0, beta2=0.0, strength=0.0)
        for g, t in zip(problem.tensors.gradients, problem.tensors.steps, strict=True):
            assert g is not None
            g.sign_()
            t.fill_(step - 1)
        problem.step()
        return list(problem.tensors.weights)


@pytest.mark.parametrize("least", [1e-8, 0.0])
def test_denominators_of_every_size(backend: str, least: float) -> None:
    """Second moments from 1e-36 to 1e37, and zeros: quotients within a few roundings."""
    problem = Problem([plain("plain", 3, 97)])
    problem.hyper = HYPER._replace(eps=least, weight_decay=0.0)
    tensors = problem.tensors
    gradient = tensors.gradients[0]
    assert gradient is not None
    squares = torch.logspace(-36, 37, 3 * 97, dtype=F64).view(3, 97)
    tensors.weights[0].zero_()
    gradient.zero_()
    tensors.exp_avg_sqs[0].copy_(squares)
    tensors.exp_avgs[0].copy_(squares.sqrt() * torch.where(torch.arange(97) % 2 == 0, 1.0, -1.0))
    if least > 0:
        tensors.exp_avgs[0][:, 5], tensors.exp_avg_sqs[0][:, 5] = 0.0, 0.0
    expected = problem.step_in_float64()[0]["weights"]
    problem.step()
    assert ((tensors.weights[0].double() - expected).abs() <= 8 * eps(F32) * expected.abs()).all()


def test_stochastic_rounding_is_the_same_in_every_backend() -> None:
    results = [stepped(name, EVERY_KIND) for name in ("reference", "native")]
    same = torch.cat([(x == y).flatten().double() for x, y in zip(*results, strict=True)])
    # The quotient g / (|g| + eps) is not exact: one in 2^16 may fall on the other side.
    assert same.mean().item() >= 0.9999


def test_stochastic_rounding_differs_by_seed_step_and_parameter() -> None:
    twins = [plain("plain", 50, 60), plain("plain", 50, 60)]
    first, second = stepped("native", twins)
    assert not same_bits(first, second)
    assert not same_bits(first, stepped("native", twins, seed=4)[0])
    assert not same_bits(first, stepped("native", twins, step=STEP + 1)[0])
    assert same_bits(first, stepped("native", twins)[0])


@pytest.mark.parametrize("name", ["reference", "native"])
def test_stochastic_rounding_keeps_what_is_not_finite_and_what_is(name: str) -> None:
    with backends.use_backend(name):  # type: ignore[arg-type]
        problem = Problem([plain("plain", 4, 40)], BF16, F32, OPTIONS._replace(stochastic_rounding=True))
        problem.hyper = HYPER._replace(lr=0.0, weight_decay=0.0)
        weight, top = problem.tensors.weights[0], torch.finfo(BF16).max
        for row, value in zip(weight, (math.nan, math.inf, -top, 0.0), strict=True):
            row.fill_(value)
        before = weight.clone()
        problem.step()
        assert weight[0].isnan().all() and same_bits(weight[1:], before[1:])
        # float32 numbers beyond the largest bfloat16 stay finite: -top - top / 512, as the decay of -lr * wd makes it.
        problem.hyper = HYPER._replace(lr=1.0, weight_decay=-1.0 / 512, eps=math.inf)
        problem.step()
        assert (weight[2] == -top).all()
