"""SpectralRegularizer and the tensors it finds: dtypes, layouts in memory, gradients, frozen ones, ones on meta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import BF16, DTYPES, F16, F32, F64, NAMES, relative_error
from regularizer_truth import (
    NET,
    TOLERANCE,
    Mlp,
    Net,
    Truth,
    assert_close,
    assert_same_bits,
    bits,
    gradients,
    load_converged,
    load_random,
    refuses,
    truth,
)
from torch import Tensor, nn

from spectral_ops import SpectralRegularizer

UNIT = {BF16: 2.0**-8, F16: 2.0**-11}  # half a unit in the last place of a gradient, rounded once


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, TOLERANCE[F32]) + UNIT.get(dtype, 0.0)


def assert_is_truth(reg: SpectralRegularizer, model: nn.Module, limit: float, form: str = "loss") -> None:
    expected = truth(model)
    model.zero_grad()
    value = reg() if form == "loss" else reg.accumulate_grad_()
    if form == "loss":
        value.backward()
    assert abs(value.item() - expected.value) <= min(limit, TOLERANCE[F32]) * expected.value
    assert_close(gradients(model), expected.gradients, limit)


# ---- dtypes ----


@pytest.mark.parametrize("dtype", DTYPES, ids=list(NAMES.values()))
@pytest.mark.parametrize("form", ["loss", "accumulate"])
def test_dtypes(dtype: torch.dtype, form: str, backend: str) -> None:
    model = Net().to(dtype)
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    assert_is_truth(reg, model, tolerance(dtype), form)
    assert {g.dtype for g in gradients(model).values()} == {dtype}
    kept = F64 if dtype == F64 else F32
    assert reg(advance=False).dtype == kept
    assert {v.dtype for v in reg.state_dict()["v"].values()} == {kept}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_low_precision_gradient_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    """Added in float32 to the low-precision gradient that is there: within half a unit of the sum."""
    model = Net().to(dtype)
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    expected = truth(model).gradients
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = gradients(model)
    reg.accumulate_grad_()
    for name, g in gradients(model).items():
        total = before[name].double() + expected[name]
        # and float32's own error in the penalty's gradient
        assert ((g.double() - total).abs() <= UNIT[dtype] * total.abs() + 1e-4 * expected[name].abs().max()).all(), name


def test_float32_and_float64_in_one_model(backend: str) -> None:
    model = Net()
    model.head.double()
    model.conv.double()
    model.norm.to(BF16)
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    assert reg.state_dict()["v"]["head.weight"].dtype == F64 and reg.state_dict()["v"]["lstm.weight_ih_l0"].dtype == F32
    for form in ("loss", "accumulate"):
        assert_is_truth(reg, model, tolerance(BF16), form)
        assert relative_error(gradients(model)["head.weight"], truth(model).gradients["head.weight"]) <= TOLERANCE[F64]


def test_a_bad_gradient_in_the_second_group_leaves_the_first(backend: str) -> None:
    """Groups are steps of their own: what one of them refuses is refused before another has added to its gradients."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, dtype=F64))
    reg = SpectralRegularizer(model, strength=1.0)
    load_random(reg)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[1].weight.grad = model[1].weight.grad.to_sparse()
    before = bits(reg)
    with pytest.raises(TypeError, match=r"expected the gradient of 1\.weight to be dense"):
        reg.accumulate_grad_()
    assert_same_bits(bits(reg), before)
    assert not any(g.count_nonzero() for name, g in gradients(model).items() if name != "1.weight")
    model.zero_grad()
    for _ in range(2):  # the second time gradients look as those that were fine
        reg.accumulate_grad_()
    model[1].weight.grad = model[1].weight.grad.float().double().to_sparse()
    before, kept = bits(reg), model[0].weight.grad.clone()
    with pytest.raises(TypeError, match="to be dense"):
        reg.accumulate_grad_()
    assert_same_bits(bits(reg), before)
    assert torch.equal(model[0].weight.grad, kept)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch before 2.10 knows no p.grad_dtype")
def test_missing_gradients_of_another_dtype(backend: str) -> None:
    model = nn.Linear(4, 3, dtype=BF16)
    for p in model.parameters():
        p.grad_dtype = F32
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    assert_is_truth(reg, model, TOLERANCE[F32], "accumulate")
    assert all(g.dtype == F32 for g in gradients(model).values())


# ---- layouts in memory ----


def transposed(w: Tensor) -> Tensor:
    return w.transpose(0, 1).contiguous().transpose(0, 1)


def spread(w: Tensor) -> Tensor:
    """Every second element of a larger tensor, along the first and last dimensions."""
    big = w.new_full((2 * w.shape[0], *w.shape[1:-1], 2 * w.shape[-1]), torch.nan)
    big[::2, ..., ::2] = w
    return big[::2, ..., ::2]


def offset(w: Tensor) -> Tensor:
    """Contiguous, and not aligned to anything but its own element."""
    big = w.new_zeros(w.numel() + 1)
    big[1:] = w.flatten()
    return big[1:].view(w.shape)


def channels_last(w: Tensor) -> Tensor:
    return w.to(memory_format=torch.channels_last) if w.ndim == 4 else w


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {f.__name__: f for f in (transposed, spread, offset, channels_last)}


def relaid(model: nn.Module, layout: str) -> nn.Module:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.ndim > 1:
                module._parameters[name] = nn.Parameter(LAYOUTS[layout](p.detach()))
    return model


@pytest.mark.parametrize("form", ["loss", "accumulate"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_layout(layout: str, form: str, backend: str) -> None:
    model = Net()
    plain = {name: p.stride() for name, p in model.named_parameters()}
    model = relaid(model, layout)
    if layout != "offset":
        assert model.conv.weight.stride() != plain["conv.weight"]
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    assert_is_truth(reg, model, TOLERANCE[F32], form)


@pytest.mark.parametrize("shape", [(1, 6), (5, 1)])
def test_expanded_weight(shape: tuple[int, int], backend: str) -> None:
    """Rows or columns that are one in memory: read as they show, the gradient dense."""
    model = nn.Linear(6, 5, bias=False)
    model.weight = nn.Parameter(torch.randn(shape).expand(5, 6))
    assert 0 in model.weight.stride()
    reg = SpectralRegularizer(model, strength=1.0)
    for form in ("loss", "accumulate"):
        assert_is_truth(reg, model, TOLERANCE[F32], form)  # rank one: converged at once
        assert model.weight.grad is not None and 0 not in model.weight.grad.stride()


def test_overlapping_windows(backend: str) -> None:
    """A Hankel matrix by strides: every element of memory is several of the matrix."""
    model = nn.Linear(4, 5, bias=False)
    model.weight = nn.Parameter(torch.randn(8).as_strided((5, 4), (1, 1)))
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    for form in ("loss", "accumulate"):
        assert_is_truth(reg, model, TOLERANCE[F32], form)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_gradients_of_another_layout_than_the_weight(layout: str, dtype: torch.dtype, backend: str) -> None:
    model = Net().to(dtype)
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    expected = truth(model).gradients
    for p in model.parameters():
        p.grad = LAYOUTS[layout](torch.zeros_like(p)) if p.ndim > 1 else torch.zeros_like(p)
    stride = model.conv.weight.grad.stride()  # type: ignore[union-attr]
    reg.accumulate_grad_()
    assert model.conv.weight.grad.stride() == stride  # type: ignore[union-attr]
    assert_close(gradients(model), expected, tolerance(dtype))


def test_float32_gradient_of_a_bfloat16_weight(backend: str) -> None:
    model = nn.Linear(6, 5).to(BF16)
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    expected = truth(model).gradients
    for p in model.parameters():
        p.grad_dtype = F32
        p.grad = torch.zeros_like(p, dtype=F32)
    reg.accumulate_grad_()
    assert_close(gradients(model), expected, TOLERANCE[F32])


def sparse_embedding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    model(torch.tensor([1, 2])).sum().backward()
    return model


@pytest.mark.parametrize("dense_first", [False, True])
def test_sparse_gradient_is_refused(dense_first: bool, backend: str) -> None:
    model = sparse_embedding()
    reg = SpectralRegularizer(model, strength=1.0, rules={"0.weight": "matrix"})
    if dense_first:
        sparse = model[0].weight.grad
        model.zero_grad()
        reg.accumulate_grad_()
        model.zero_grad()
        model[0].weight.grad = sparse
    before = bits(reg)
    message = (
        "expected the gradient of 0.weight to be dense, got a sparse_coo one. "
        "Exclude the parameter, or use an embedding without sparse=True."
    )
    with refuses(TypeError, f"accumulate_grad_: {message}"):
        reg.accumulate_grad_()
    assert_same_bits(bits(reg), before)
    (reg() + model[1].weight.sum() * 0).backward()  # the other form can: autograd adds sparse and dense
    assert model[0].weight.grad.layout == torch.strided


def test_expanded_gradient_is_refused(backend: str) -> None:
    model = nn.Linear(3, 2)
    reg = SpectralRegularizer(model, strength=1.0)
    model.weight.grad = torch.zeros(1, 3).expand(2, 3)
    message = (
        "expected the gradient of weight to have memory for every element, got an expanded tensor with strides (0, 1). "
        "Make it contiguous."
    )
    with refuses(ValueError, f"accumulate_grad_: {message}"):
        reg.accumulate_grad_()


# ---- frozen ----


def test_frozen_parameters_are_left_out(backend: str) -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=1.0)
    load_converged(reg, model)
    before = reg.state_dict()["v"]
    model.lstm.requires_grad_(False)
    trained = {name: 1 for name in NET if not name.startswith("lstm")}
    for form in ("loss", "accumulate"):
        model.zero_grad()
        expected = truth(model, names=trained)
        value = reg() if form == "loss" else reg.accumulate_grad_()
        if form == "loss":
            value.backward()
        assert abs(value.item() - expected.value) <= TOLERANCE[F32] * expected.value
        assert_close(gradients(model), expected.gradients, TOLERANCE[F32])
    assert torch.equal(reg.state_dict()["v"]["lstm.weight_ih_l0"], before["lstm.weight_ih_l0"])  # they wait
    model.lstm.requires_grad_(True)
    assert_is_truth(reg, model, TOLERANCE[F32])


def test_frozen_from_the_start(backend: str) -> None:
    """Nothing is computed for them before they are trained: a large frozen backbone costs nothing."""
    model = Mlp()
    model.first.requires_grad_(False)
    reg = SpectralRegularizer(model, strength=1.0)
    assert list(reg.sigmas()) == ["last.weight"] == list(reg.state_dict()["v"])
    assert_is_truth_of(reg, model, truth(model, names={n: 1 for n, _ in model.named_parameters() if "first" not in n}))
    model.first.requires_grad_(True)
    reg()
    assert list(reg.sigmas()) == ["first.weight", "last.weight"]
    load_converged(reg, model)
    assert_is_truth(reg, model, TOLERANCE[F32])


def assert_is_truth_of(reg: SpectralRegularizer, model: nn.Module, expected: Truth) -> None:
    load_converged(reg, model)
    model.zero_grad()
    reg().backward()
    assert_close(gradients(model), expected.gradients, TOLERANCE[F32])


def test_all_frozen_is_zero(backend: str) -> None:
    model = Mlp()
    reg = SpectralRegularizer(model, strength=1.0)
    model.requires_grad_(False)
    assert reg().item() == 0.0 and reg.accumulate_grad_().item() == 0.0
    assert gradients(model) == {}


# ---- on meta ----


def test_built_on_meta(backend: str) -> None:
    source = Net()
    with torch.device("meta"):
        model = Net()
        reg = SpectralRegularizer(model, strength=1.0)
    assert len(reg.entries) == len(NET) and "on meta, waits for its data" in str(reg)
    message = (
        "expected parameter 'depthwise.weight' to hold data, got one on the meta device. "
        "Materialise the model first (to_empty, then its initialisation or load_state_dict)."
    )
    for call in (reg, reg.accumulate_grad_, reg.state_dict):
        with refuses(RuntimeError, f"SpectralRegularizer: {message}"):
            call()
    assert reg.sigmas() == {}
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    reg()
    # Converged when the data was there, not before: as a regularizer built now.
    fresh = SpectralRegularizer(model, strength=1.0)
    fresh()
    assert_same_bits(bits(reg), bits(fresh))
    load_converged(reg, model)
    assert_is_truth(reg, model, TOLERANCE[F32])


def test_partly_on_meta_names_the_parameter() -> None:
    model = Net()
    reg = SpectralRegularizer(model, strength=1.0)
    model.head.to("meta")
    with pytest.raises(RuntimeError, match="expected parameter 'head.weight' to hold data"):
        reg()


@pytest.mark.parametrize("assign", [False, True])
def test_state_loaded_while_on_meta(assign: bool, backend: str) -> None:
    source = Net()
    trained = SpectralRegularizer(source, strength=1.0)
    load_converged(trained, source)
    trained()
    with torch.device("meta"):
        model = Net()
    reg = SpectralRegularizer(model, strength=1.0)
    reg.load_state_dict(trained.state_dict())
    if assign:
        model.load_state_dict(source.state_dict(), assign=True)
    else:
        model.to_empty(device="cpu")
        model.load_state_dict(source.state_dict())
    assert_same_bits(bits(reg), bits(trained))
    assert_is_truth(reg, model, TOLERANCE[F32])
