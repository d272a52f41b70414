"""Methods that act on gradients or on every step's weights: against their formulas in float64."""

import math

import pytest
import torch
from method_samples import MODELS, Sample, batch, changed, disturb, equal, make
from torch import nn

from spectral_ops import SpectralRegularizer
from spectral_ops.continual.methods.parameters import matrices

F64 = torch.float64


def matrices_of(sample: Sample, *, output: bool) -> list[torch.Tensor]:
    """Weights as (m, n), queries, keys and values apart; found here by name and shape alone."""
    found = []
    for name, p in sample.model.named_parameters():
        if p.ndim > 1 and not name.startswith(("positions", "class_token")) and (output or not name.startswith("head")):
            found += p.chunk(3) if name.endswith("in_proj_weight") else [p.flatten(1)]
    return found


def gradients_of(sample: Sample) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in sample.model.named_parameters()}


def largest_difference(a: Sample, b: Sample) -> float:
    mine, others = a.copy(), b.copy()
    return max(float((mine[name] - others[name]).abs().max()) for name in others)


# ---- penalties: the gradient is that of the formula, added to what is there ----


def l2(sample):
    return sum(p.square().sum() for p in sample.model.parameters())


def l2_init(sample):
    first = sample.context.initialize(0)
    return sum((p - first[name]).square().sum() for name, p in sample.model.named_parameters())


def wasserstein(sample):
    first = sample.context.initialize(0)
    pairs = (
        (p.flatten().sort().values, first[name].flatten().sort().values) for name, p in sample.model.named_parameters()
    )
    return sum((now - then).square().sum() for now, then in pairs)


def parseval(sample, scale=2.0, output=False):
    found = matrices_of(sample, output=output)
    return sum((w @ w.T - scale * torch.eye(len(w), dtype=w.dtype)).square().sum() for w in found)


FORMULAS = {
    "l2": (l2, {}),
    "l2-init": (l2_init, {}),
    "wasserstein": (wasserstein, {}),
    "parseval": (parseval, {}),
    "parseval, output": (lambda sample: parseval(sample, 0.7, True), {"scale": 0.7, "output": True}),
}


@pytest.mark.parametrize("model", [model for model in MODELS if model != "linear"])  # parseval has nothing to do there
@pytest.mark.parametrize("case", FORMULAS)
def test_the_gradient_is_that_of_the_formula(case, model):
    formula, options = FORMULAS[case]
    sample = make(case.split(",")[0], model, dtype=F64, strength=0.03, **options)
    disturb(sample.model)
    (0.03 * formula(sample)).backward()
    wanted = gradients_of(sample)
    assert all(float(g.norm()) > 0 for g in wanted.values()) or case.startswith("parseval")
    sample.model.zero_grad()
    sample.method.after_backward()  # no gradients there yet
    once = gradients_of(sample)
    sample.method.after_backward()  # on top of them
    twice = gradients_of(sample)
    for name, g in wanted.items():
        scale = 1e-12 * (1 + float(g.abs().max()))
        assert float((once[name] - g).abs().max()) <= scale, name
        assert float((twice[name] - 2 * g).abs().max()) <= 2 * scale, name


def test_parseval_reaches_both_sides():
    shapes = [w.shape for w in matrices_of(make("parseval", "vit-tiny"), output=False)]
    assert any(m > n for m, n in shapes) and any(m < n for m, n in shapes)


def test_wasserstein_is_zero_for_permuted_initial_parameters():
    sample = make("wasserstein", dtype=F64)
    with torch.no_grad():
        for p in sample.model.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel(), generator=torch.Generator().manual_seed(1))].view_as(p))
    sample.method.after_backward()
    assert all(not g.any() for g in gradients_of(sample).values())


@pytest.mark.parametrize(
    ("method", "make_optimizer", "decay"), [("l2", torch.optim.Adam, 2e-2), ("l2-decoupled", torch.optim.AdamW, 1e-2)]
)
def test_weight_decay_of_torch(method, make_optimizer, decay):
    ours, theirs = make(method, dtype=F64, strength=1e-2), make("none", dtype=F64)
    optimizer = make_optimizer(theirs.model.parameters(), lr=1e-2, weight_decay=decay)
    ours.train(range(20))
    theirs._replace(optimizer=optimizer).train(range(20))
    assert largest_difference(ours, theirs) <= 1e-14  # 1e-16 measured
    bare = make("none", dtype=F64)
    bare.train(range(20))
    assert largest_difference(ours, bare) > 1e-4


def test_decoupled_decay_follows_the_rate_of_each_group():
    sample = make("l2-decoupled", strength=0.5, optimizer="sgd")
    first, second, *frozen = sample.model.parameters()
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.4}, {"params": frozen, "lr": 1.0}]
    sample.optimizer.param_groups[:] = torch.optim.SGD(groups).param_groups
    before = [p.clone() for p in (first, second, frozen[0])]
    first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
    sample.method.after_backward()
    factors = [float((p / b).detach().mean()) for p, b in zip((first, second, frozen[0]), before, strict=True)]
    assert factors == pytest.approx([0.95, 0.8, 1.0])  # without a gradient torch takes no step, so no decay either


# ---- spectral ----


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp", {}),
        ("mlp", {"target": 0.5, "exponent": 1.0, "biases": False}),
        ("vit-tiny", {"norms": False}),
        ("conv", {"conv": "operator", "input_size": (1, 8, 8)}),
        ("resnet18", {"weights": False}),
    ],
)
def test_spectral_is_the_regularizer(model, options):
    sample, other = make("spectral", model, strength=0.1, **options), make("none", model)
    reg = SpectralRegularizer(other.model, strength=0.1, **options)
    for seed in range(3):
        disturb(sample.model, seed)
        disturb(other.model, seed)
        sample.method.after_backward()
        reg.accumulate_grad_()
    assert equal(gradients_of(sample), gradients_of(other))
    assert any(g.any() for g in gradients_of(sample).values())


def test_spectral_leaves_the_output_out_if_told_to():
    sample = make("spectral", output=False)
    disturb(sample.model)
    sample.method.after_backward()
    touched = {name for name, g in gradients_of(sample).items() if g.any()}
    assert touched == {n for n, _ in sample.model.named_parameters() if not n.startswith("head")}


# ---- weight clipping ----


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("output", [True, False])
def test_clipped_parameters_stay_within_their_bounds(model, output):
    sample = make("weight-clipping", model, strength=0.5, output=output)
    disturb(sample.model, scale=2.0)
    before = {name: p.clone() for name, p in sample.model.named_parameters()}
    sample.method.after_step()
    bounds = {}
    for name, module in sample.model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and (output or name != "head"):
            bounds |= {f"{name}.{kind}": module.weight[0].numel() for kind in ("weight", "bias")}
        elif isinstance(module, nn.MultiheadAttention):
            bounds |= {f"{name}.in_proj_{kind}": module.embed_dim for kind in ("weight", "bias")}
    reached = 0
    for name, p in sample.model.named_parameters():
        limit = 0.5 / math.sqrt(bounds[name]) if name in bounds else math.inf
        assert torch.equal(p, before[name].clamp(-limit, limit)), name
        reached += int((before[name].abs() > limit).sum())
    assert (reached > 20) == bool(bounds)


# ---- spectral norm ----


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_normalised_layers_have_singular_values_of_at_most_one(model, output):
    sample = make("spectral-norm", model, dtype=F64, output=output)
    sample.train(range(2))
    for group in sample.optimizer.param_groups:
        group["lr"] = 0.0
    sample.train([5] * 150)  # the power iteration goes on, and arrives
    sample.model.eval()
    largest = {}
    for matrix in matrices(sample.model):
        w = matrix.weight.unflatten(0, (matrix.parts, -1)).flatten(2)
        largest[matrix.name] = torch.linalg.matrix_norm(w.detach(), 2)
    head = largest.pop("head.weight")
    for name, sigma in largest.items():
        assert float((sigma - 1).abs().max()) <= 1e-3, name
    assert (abs(float(head) - 1) <= 1e-3) == output


@pytest.mark.parametrize("output", [True, False])
def test_the_optimizer_holds_the_parameters_of_a_normalised_model(output):
    sample = make("spectral-norm", output=output)
    held = {id(p) for group in sample.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in sample.model.parameters()}
    before = {name: p.detach().clone() for name, p in sample.model.named_parameters()}
    sample.train([0])
    assert changed(before, dict(sample.model.named_parameters())) == set(before)


def test_the_scores_of_a_normalised_network_change_with_its_input_by_no_more():
    sample = make("spectral-norm", dtype=F64, output=True)
    sample.train(range(60))  # rate 1e-2: the power iteration keeps up within a few percent
    sample.model.eval()
    x, y = batch(0, F64)[0], batch(1, F64)[0]
    rise = (sample.model(x) - sample.model(y)).detach().norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert 0 < float(rise.max()) <= 1.05
