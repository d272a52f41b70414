"""Inside torch.func's transforms a regularizer is refused; by functional_call it reads what is given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from regularizer_truth import assert_same_bits, bits, refuses
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from spectral_ops import SpectralRegularizer

AS_THEY_WERE = (
    "SpectralRegularizer: expected parameters as they were at the last call, got a call inside a transform of "
    "torch.func. Call the regularizer outside, on each model by itself, and differentiate by autograd."
)
KEPT = AS_THEY_WERE.replace("parameters as they were at the last call", "accumulate_grad_ where gradients are kept")
DIFFERENTIATED = AS_THEY_WERE.replace(
    "parameters as they were at the last call", "a penalty that torch can differentiate"
)


class Penalised(nn.Module):
    """A model that returns its penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.reg = SpectralRegularizer(self.layer, strength=1.0)
        self.reg()

    def forward(self, x: Tensor) -> Tensor:
        return self.reg(advance=False) + 0 * self.layer(x).sum()


def of(model: Penalised) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: functional_call(model, parameters, (torch.ones(4),))


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("transform", ["vmap", "vmap_without_gradients", "grad", "jvp"])
def test_parameters_of_a_transform_are_refused(transform: str, backend: str) -> None:
    """Of vmap they look frozen, as torch's recipe for ensembles has them: R was 0."""
    models = [Penalised() for _ in range(3)]
    model, before = models[0], bits(models[0].reg)
    given, value = detached(model), model.reg(advance=False)
    with refuses(NotImplementedError, AS_THEY_WERE):
        if transform == "vmap":
            vmap(of(model))(stack_module_state(models)[0])
        elif transform == "vmap_without_gradients":
            with torch.no_grad():
                vmap(of(model))(stack_module_state(models)[0])
        elif transform == "grad":
            grad(of(model))(given)
        else:
            jvp(of(model), (given,), (given,))
    assert_same_bits(bits(model.reg), before)
    assert torch.equal(model.reg(advance=False), value)


def test_a_tangent_is_refused(backend: str) -> None:
    model = Penalised()
    message = (
        "SpectralRegularizer: expected parameter 'weight' without a tangent, got one of forward-mode differentiation. "
        "Differentiate by torch.autograd.grad."
    )
    with forward_ad.dual_level(), refuses(NotImplementedError, message):
        of(model)({name: forward_ad.make_dual(p, p) for name, p in detached(model).items()})
    model.reg()


@pytest.mark.parametrize("transform", [grad, vmap])
def test_a_transform_of_the_inputs(transform: Callable[..., Callable[..., Tensor]], backend: str) -> None:
    """torch cannot differentiate a compiled step there; the registered op it can."""
    model = Penalised()
    x = torch.ones(2, 4) if transform is vmap else torch.ones(4)
    call = transform(lambda x: model.reg(advance=False) + x.sum())
    if backend == "reference":
        expected = torch.ones(4) if transform is grad else 4 + model.reg(advance=False).expand(2)
        assert torch.equal(call(x), expected)
        return
    with refuses(NotImplementedError, DIFFERENTIATED):
        call(x)
    model.reg()


@pytest.mark.parametrize("missing", [False, True])
def test_gradients_of_a_transform(missing: bool, backend: str) -> None:
    """Made inside grad they would be dead after it."""
    model = Penalised()
    if not missing:
        model.reg.accumulate_grad_()
    if backend == "reference" and not missing:
        pytest.skip("torch says by itself that nothing may be written there")
    with refuses(NotImplementedError, KEPT):
        grad(lambda x: model.reg.accumulate_grad_() + x.sum())(torch.ones(4))
    assert all((p.grad is None) == missing for p in model.parameters())
    model.reg.accumulate_grad_()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())  # type: ignore[union-attr]


def test_another_error_inside_a_step_stays_what_it_is(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("out of something")

    if backend == "reference":
        pytest.skip("it has one way only")
    monkeypatch.setattr("spectral_ops.vectors.eager_penalty", broken)
    with refuses(RuntimeError, "out of something"):
        Penalised()


@pytest.mark.parametrize("trained", [False, True], ids=["detached", "trained"])
def test_functional_call_reads_the_tensors_that_are_given(trained: bool, backend: str) -> None:
    """As an evaluation of averaged weights: they are no frozen parameters, and the model's own state stays."""
    model = Penalised()
    value, before = model.reg(advance=False), bits(model.reg)
    given = {name: (1.5 * p).requires_grad_(trained) for name, p in detached(model).items()}
    other = Penalised()
    other.load_state_dict(given)
    other.reg.load_state_dict(model.reg.state_dict())
    assert torch.equal(of(model)(given), other.reg(advance=False))
    assert_same_bits(bits(model.reg), before)
    assert torch.equal(model.reg(advance=False), value)
    model.layer.weight.requires_grad_(False)  # a parameter of the model is left out while it is frozen
    assert model.reg(advance=False) < value
