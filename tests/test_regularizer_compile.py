"""SpectralRegularizer under torch.compile: traced whole, no recompilation, the state advanced once, what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import F64
from regularizer_truth import Mlp, assert_close, assert_same_bits, bits, gradients, load_random, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters

from spectral_ops import SpectralRegularizer

# aot_eager traces as inductor does and runs the same ops, at a tenth of its compilation time (1-2 s). What is traced is
# the same for every backend of ours, which ops choose when they run: few tests take both.
EAGER = "aot_eager"
ROUNDING = 1e-6  # of float32 gradients, added in another order

CHANGED = "expected parameters placed as at the last call, got a change inside torch.compile."


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch._")
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def twins(strength: float | Tensor = 0.3) -> tuple[nn.Module, SpectralRegularizer, nn.Module, SpectralRegularizer]:
    """Two equal models with regularizers whose vectors a step moves."""
    model = Mlp()
    reg = SpectralRegularizer(model, strength=strength)
    load_random(reg)
    other, other_reg = copy.deepcopy((model, reg))
    return model, reg, other, other_reg


def task(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


class WithPenalty(nn.Module):
    """The whole loss as one module, the regularizer an attribute of it."""

    def __init__(self, model: nn.Module, reg: SpectralRegularizer) -> None:
        super().__init__()
        self.model, self.reg = model, reg

    def forward(self, x: Tensor) -> Tensor:
        return task(self.model, x) + self.reg()


def assert_same_steps(
    compiled: Callable[[Tensor], Tensor],
    model: nn.Module,
    reg: SpectralRegularizer,
    other: nn.Module,
    other_reg: SpectralRegularizer,
) -> None:
    """Three steps of a schedule, each with the eager value, gradient and state, from one graph."""
    for step in range(3):
        x = torch.randn(4, 6)
        for r in (reg, other_reg):
            assert isinstance(r.strength, Tensor)
            r.strength.fill_(0.1 * (step + 1))
        model.zero_grad()
        other.zero_grad()
        loss, expected = compiled(x), task(other, x) + other_reg()
        loss.backward()
        expected.backward()
        assert abs(loss.item() - expected.item()) <= ROUNDING * expected.item()
        assert_close(gradients(model), gradients(other), ROUNDING)
        assert_same_bits(bits(reg), bits(other_reg))  # advanced once, not twice and not zero times
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                p.sub_(0.01)
                q.sub_(0.01)
    assert graphs() == 1 and not counters["graph_break"]


@pytest.mark.parametrize("whole", ["function", "module"])
def test_loss_and_penalty_in_one_graph(whole: str, backend: str) -> None:
    model, reg, other, other_reg = twins(torch.tensor(0.3))
    loss = WithPenalty(model, reg) if whole == "module" else (lambda x: task(model, x) + reg())
    compiled = torch.compile(loss, backend=EAGER, fullgraph=True)
    assert_same_steps(compiled, model, reg, other, other_reg)


@pytest.mark.slow
def test_inductor(backend: str) -> None:
    """reduce-overhead, which is the default with CUDA graphs, where there is CUDA."""
    model, reg, other, other_reg = twins(torch.tensor(0.3))
    compiled = torch.compile(lambda x: task(model, x) + reg(), mode="reduce-overhead", fullgraph=True)
    assert_same_steps(compiled, model, reg, other, other_reg)


def test_strength_as_a_float_recompiles_and_is_right() -> None:
    _, reg, _, _ = twins()
    compiled = torch.compile(lambda: reg(advance=False), backend=EAGER, fullgraph=True)
    for strength in (0.5, 1.0, 2.0, 2.0):
        reg.strength = strength
        assert compiled().item() == reg(advance=False).item()
    assert graphs() > 1  # the tensor is the remedy: test_loss_and_penalty_in_one_graph


@pytest.mark.parametrize("how", ["advance", "no_grad outside", "no_grad inside"])
def test_looking_changes_nothing(how: str) -> None:
    _, reg, _, _ = twins()
    before = bits(reg)

    def look() -> Tensor:
        if how == "no_grad inside":
            with torch.no_grad():
                return reg()
        return reg(advance=how != "advance")

    compiled = torch.compile(look, backend=EAGER, fullgraph=True)
    with torch.set_grad_enabled(how != "no_grad outside"):
        value = compiled()
    assert value.item() == reg(advance=False).item()
    assert_same_bits(bits(reg), before)
    if how == "no_grad outside":  # the mode is a guard: with gradients it advances
        compiled()
        assert not torch.equal(bits(reg)["v of first.weight"], before["v of first.weight"])


@pytest.mark.parametrize("with_gradients", [False, True])
def test_accumulate_in_one_graph(with_gradients: bool, backend: str) -> None:
    model, reg, other, other_reg = twins()
    if with_gradients:
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    compiled = torch.compile(reg.accumulate_grad_, backend=EAGER, fullgraph=True)
    for scale in (None, 1024.0):
        value, expected = compiled(grad_scale=scale), other_reg.accumulate_grad_(grad_scale=scale)
        assert abs(value.item() - expected.item()) <= ROUNDING * expected.item()
        assert_same_bits(gradients(model), gradients(other))
        assert_same_bits(bits(reg), bits(other_reg))
    assert not counters["graph_break"]


@pytest.mark.slow
def test_accumulate_with_inductor(backend: str) -> None:
    model, reg, other, other_reg = twins()
    torch.compile(reg.accumulate_grad_, fullgraph=True)()
    other_reg.accumulate_grad_()
    assert_same_bits(gradients(model), gradients(other))
    assert_same_bits(bits(reg), bits(other_reg))


@pytest.mark.parametrize("form", ["accumulate", "attach"])
def test_whole_training_step(form: str) -> None:
    """Forward, backward, penalty and optimizer in one compiled function. backward breaks the graph, as without us."""
    found = []
    model, reg, other, other_reg = twins()
    x = torch.randn(4, 6)
    for compiled, m, r in ((True, model, reg), (False, other, other_reg)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        if form == "attach":
            r.attach(optimizer)

        def step(m: nn.Module = m, r: SpectralRegularizer = r, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            task(m, x).backward()
            if form == "accumulate":
                r.accumulate_grad_()
            optimizer.step()

        run = torch.compile(step, backend=EAGER) if compiled else step
        for _ in range(3):
            run()
        found.append({**weights(m), **r.state_dict()["v"]})
    assert_close(*found, 1e-5)  # measured 0


def test_compiled_model_with_the_penalty_outside() -> None:
    """The usual way: only the model is compiled."""
    model, reg, other, other_reg = twins()
    compiled = torch.compile(model, backend=EAGER)
    x = torch.randn(4, 6)
    (task(compiled, x) + reg()).backward()
    (task(other, x) + other_reg()).backward()
    assert_close(gradients(model), gradients(other), ROUNDING)
    assert_same_bits(bits(reg), bits(other_reg))


def test_built_on_a_compiled_model() -> None:
    """The wrapper's names begin with _orig_mod; built on the model itself, its state fits both."""
    model = Mlp()
    reg = SpectralRegularizer(torch.compile(model, backend=EAGER), strength=0.3)  # type: ignore[arg-type]
    assert list(reg.sigmas()) == ["_orig_mod.first.weight", "_orig_mod.last.weight"]
    reg().backward()
    assert len(gradients(model)) == 6


# ---- changes of the model between calls ----


def to_double(model: nn.Module) -> None:
    model.double()


def frozen(model: nn.Module) -> None:
    model.first.requires_grad_(False)


@pytest.mark.parametrize("change", [to_double, frozen])
def test_change_inside_one_graph_is_refused_with_the_remedy(change: Callable[[nn.Module], None]) -> None:
    model, reg, _, _ = twins()
    compiled = torch.compile(lambda: reg(), backend=EAGER, fullgraph=True)
    compiled()
    change(model)
    with pytest.raises(torch._dynamo.exc.Unsupported) as raised:
        compiled()
    remedy = "After moving, casting, freezing or copying parameters call reg(advance=False) once, outside."
    assert f"SpectralRegularizer: {CHANGED} {remedy}" in str(raised.value)
    expected = reg(advance=False)
    assert compiled().item() == expected.item()
    assert expected.dtype == (F64 if change is to_double else torch.float32)


@pytest.mark.parametrize("change", [to_double, frozen])
def test_change_is_followed_where_graphs_may_break(change: Callable[[nn.Module], None]) -> None:
    model, reg, other, other_reg = twins()
    compiled = torch.compile(lambda: reg(), backend=EAGER)
    compiled()
    other_reg()
    for m in (model, other):
        change(m)
    assert compiled().item() == other_reg().item()
    assert compiled().item() == other_reg().item()
    assert_same_bits(bits(reg), bits(other_reg))


def test_state_loaded_between_compiled_calls() -> None:
    _, reg, _, other_reg = twins()
    compiled = torch.compile(lambda: reg(), backend=EAGER, fullgraph=True)
    compiled()
    load_random(other_reg)
    reg.load_state_dict(other_reg.state_dict())
    assert compiled().item() == other_reg().item()
    assert_same_bits(bits(reg), bits(other_reg))


def test_weights_moved_between_compiled_calls() -> None:
    """New memory for the same parameters: addresses are read at every call."""
    model, reg, other, other_reg = twins()
    compiled = torch.compile(lambda: reg(), backend=EAGER, fullgraph=True)
    compiled()
    other_reg()
    for m in (model, other):
        m.load_state_dict({name: 1.5 * x for name, x in m.state_dict().items()}, assign=True)
    assert compiled().item() == other_reg().item()
    assert_same_bits(bits(reg), bits(other_reg))
