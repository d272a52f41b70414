"""Methods that act at task boundaries: shrink and perturb, fire, and the two resets."""

import math

import pytest
import torch
from method_samples import MODELS, changed, disturb, equal, make
from torch import nn

from spectral_ops.continual.methods.fire import polar_factor


def optimizer_is_new(sample) -> bool:
    return len(sample.optimizer.state) == 0


# ---- reset and optimizer-reset ----


@pytest.mark.parametrize("model", MODELS)
def test_reset_is_a_fresh_network_of_seed_and_task_alone(model):
    sample, other = make("reset", model), make("reset", model)
    sample.train(range(3))
    for task in (1, 2):
        sample.method.on_task_boundary(task)
        assert equal(sample.copy(), sample.context.initialize(task)) and optimizer_is_new(sample)
    other.method.on_task_boundary(2)
    assert equal(sample.copy(), other.copy())
    other.method.on_task_boundary(1)
    assert not equal(sample.copy(), other.copy())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd-momentum"])
def test_an_optimizer_that_forgot_takes_the_step_of_a_new_one(optimizer):
    sample, other = make("optimizer-reset", optimizer=optimizer), make("none", optimizer=optimizer)
    sample.train(range(3))
    other.model.load_state_dict(sample.model.state_dict())
    before = sample.copy()
    sample.method.on_task_boundary(1)
    assert equal(before, sample.copy()) and optimizer_is_new(sample)
    sample.train([7])
    other.train([7])
    assert equal(sample.copy(), other.copy())
    assert all(float(s.get("step", 1)) == 1 for s in sample.optimizer.state.values())


# ---- shrink and perturb ----


def test_shrink_and_perturb_with_a_fresh_network():
    sample = make("shrink-and-perturb", "resnet18", strength=0.3, noise=0.05)
    sample.train(range(2))
    before, fresh = sample.copy(), sample.context.initialize(4)
    sample.method.on_task_boundary(4)
    parameters = {name for name, _ in sample.model.named_parameters()}
    for name, value in sample.copy().items():
        wanted = 0.7 * before[name] + 0.05 * fresh[name] if name in parameters else before[name]
        assert torch.allclose(value, wanted, rtol=1e-6, atol=1e-7), name
    assert optimizer_is_new(sample)


@pytest.mark.parametrize("every", ["task", "step"])
def test_shrink_and_perturb_with_normal_noise(every):
    sample = make("shrink-and-perturb", strength=0.3, noise=0.05, source="normal", every=every, reset_optimizer=False)
    sample.train([0])
    before = sample.copy()
    act = sample.method.after_step if every == "step" else lambda: sample.method.on_task_boundary(1)
    idle = sample.method.after_step if every == "task" else lambda: sample.method.on_task_boundary(1)
    idle()
    assert equal(before, sample.copy())
    act()
    noise = torch.cat([(sample.copy()[name] - 0.7 * before[name]).flatten() for name in before]) / 0.05
    assert abs(float(noise.mean())) <= 4 / math.sqrt(len(noise)) and 0.9 <= float(noise.std()) <= 1.1
    middle = sample.copy()
    act()  # drawn anew
    again = torch.cat([(sample.copy()[name] - 0.7 * middle[name]).flatten() for name in before]) / 0.05
    assert float((noise - again).abs().max()) > 1
    assert not optimizer_is_new(sample)


# ---- fire ----


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 4, 7)])
def test_the_polar_factor_is_that_of_the_svd(shape):
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    assert float((polar_factor(w, 40) - u @ vh).abs().max()) <= 1e-10
    assert float((polar_factor(w, 10) - u @ vh).abs().max()) <= 0.2  # the public code's number: nearly there


def test_ten_iterations_move_singular_values_as_the_public_code_does():
    w = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    w[4] = w[3] + 1e-3 * w[4]  # one of them small, and still on its way after ten
    values = torch.linalg.svdvals(w) / torch.linalg.matrix_norm(w)
    for _ in range(10):
        values = 1.5 * values - 0.5 * values**3
    assert float(values[-1]) < 0.1
    found = torch.linalg.svdvals(polar_factor(w, 10))
    assert float((found - values.sort(descending=True).values).abs().max()) <= 1e-12


def test_the_polar_factor_of_nothing_is_nothing():
    assert not polar_factor(torch.zeros(3, 4), 10).any()


@pytest.mark.parametrize("model", ["mlp", "conv", "resnet18", "vit-tiny"])
@pytest.mark.parametrize("output", [True, False])
def test_singular_values_are_the_scale_after_fire(model, output):
    sample = make("fire", model, dtype=torch.float64, iterations=60, output=output, queries_keys_only=False)
    disturb(sample.model)
    before = sample.copy()
    sample.method.on_task_boundary(1)
    projected = set()
    for name, module in sample.model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and (output or name != "head"):
            projected.add(f"{name}.weight")
            w = module.weight.detach()
            parts = w.flatten(2).movedim(2, 0) if w.ndim == 4 else w[None]
        elif isinstance(module, nn.MultiheadAttention):
            projected.add(f"{name}.in_proj_weight")
            parts = module.in_proj_weight.detach().unflatten(0, (3, -1))
        else:
            continue
        kernel = module.weight[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        scale = math.sqrt(parts.shape[1] / parts.shape[2]) / kernel
        values = torch.linalg.svdvals(parts)
        assert float((values / scale - 1).abs().max()) <= 1e-6, name
    assert changed(before, sample.copy()) == projected


def test_with_attention_fire_takes_queries_and_keys_alone():
    sample = make("fire", "vit-tiny", iterations=60, dtype=torch.float64)
    disturb(sample.model)
    before = sample.copy()
    sample.method.on_task_boundary(1)
    after = sample.copy()
    assert changed(before, after) == {f"blocks.{i}.attention.in_proj_weight" for i in range(2)}
    for name in changed(before, after):
        queries, keys, values = after[name].chunk(3)
        assert torch.equal(values, before[name].chunk(3)[2])
        assert all(torch.allclose(w @ w.T, torch.eye(8, dtype=w.dtype), atol=1e-9) for w in (queries, keys))


@pytest.mark.parametrize("name", ["fire", "shrink-and-perturb"])
@pytest.mark.parametrize("forget", [True, False])
def test_the_optimizer_is_reset_or_not(name, forget):
    sample = make(name, reset_optimizer=forget)
    sample.train([0])
    sample.method.on_task_boundary(1)
    assert optimizer_is_new(sample) == forget
