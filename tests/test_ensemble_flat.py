"""Parameters, gradients and moments of a stack in one tensor each: where each part lies, and what optimizers step."""

from dataclasses import replace

import pytest
import torch

from spectral_ops import SpectralAdamW
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.ensemble.ensemble import Ensemble
from spectral_ops.continual.ensemble.flat import Flat
from spectral_ops.continual.ensemble.stack import Stack
from spectral_ops.continual.models import build_model
from spectral_ops.continual.trainer import Trainer

SMALL = RunConfig(model_options={"hidden": (9, 7)}, batch=5, steps=6, tasks=2, samples=60, data="digits")
MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_tensor_begins_at_64_bytes_and_none_overlap(dtype):
    shapes = {"a": (3, 5), "b": (1,), "c": (4, 8, 2)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    layout = Flat(tensors)
    memory = layout.zeros()
    for name, view in layout.views(memory).items():
        view.copy_(tensors[name])
        assert view.storage_offset() * view.element_size() % 64 == 0
    assert layout.names == ("a", "b", "c")
    assert all(torch.equal(view, tensors[name]) for name, view in layout.views(memory).items())
    assert int((memory != 0).sum()) == sum(t.numel() for t in tensors.values())


def ensemble_of(**changes):
    config = replace(SMALL, **changes)
    return Ensemble([Trainer(replace(config, seed=seed)) for seed in range(3)])


def train(ensemble):
    ensemble.train_task()


@pytest.mark.parametrize("optimizer", MOMENTS)
def test_one_tensor_is_stepped_and_each_network_has_its_part(optimizer):
    ensemble = ensemble_of(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)
    stack = ensemble.stack
    assert [p for group in ensemble.optimizer.param_groups for p in group["params"]] == [stack.flat]
    before = stack.flat.detach().clone()
    train(ensemble)
    assert not torch.equal(before, stack.flat)
    for name, place in stack.layout.views(stack.flat.detach()).items():
        parts = [network.get_parameter(name) for network in stack.networks]
        assert torch.equal(place, torch.cat([p.detach() for p in parts]))
        assert torch.equal(place, stack.model.get_parameter(name))
        for key in MOMENTS[optimizer]:
            whole = stack.layout.views(ensemble.optimizer.state[stack.flat][key])[name]
            own = [t.optimizer.state[p][key] for t, p in zip(ensemble.trainers, parts, strict=True)]
            assert torch.equal(whole, torch.cat(own)) and bool((whole != 0).any())
    inside = sum(place.numel() for place in stack.layout.views(before).values())
    assert inside < stack.flat.numel()  # there is something between the parts,
    assert int((stack.flat != 0).sum()) <= inside  # and it stays 0


@pytest.mark.parametrize("optimizer", MOMENTS)
def test_moments_go_to_the_networks_and_back_with_the_same_bits(optimizer):
    ensemble = ensemble_of(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0)
    train(ensemble)
    old = {key: value.clone() for key, value in ensemble.optimizer.state[ensemble.stack.flat].items()}
    ensemble._gather()
    new = ensemble.optimizer.state[ensemble.stack.flat]
    assert list(new) == list(old) and all(torch.equal(new[key], old[key]) for key in old)
    assert new[MOMENTS[optimizer][0]].data_ptr() != old[MOMENTS[optimizer][0]].data_ptr()


def test_layers_are_stepped_where_the_optimizer_reads_them_or_autograd_makes_the_gradients():
    folded = ensemble_of(method="spectral", strength=1e-3, optimizer="spectral-adamw")
    conv = ensemble_of(model="conv", model_options={"channels": (4,), "hidden": (8,)})
    assert isinstance(folded.optimizer, SpectralAdamW) and conv.stack.flat is None
    for ensemble in (folded, conv):
        stepped = {id(p) for group in ensemble.optimizer.param_groups for p in group["params"]}
        assert stepped == {id(p) for p in ensemble.stack.model.parameters()}


def test_gradients_of_parameters_lie_in_that_of_the_whole():
    stack = Stack([build_model("mlp", (1, 4, 4), 3, hidden=(5,)) for _ in range(2)])
    stack.backward(torch.randn(2, 6, 1, 4, 4), torch.randint(3, (2, 6)))
    for name, place in stack.layout.views(stack.flat.grad).items():
        gradient = stack.model.get_parameter(name).grad
        assert gradient.data_ptr() == place.data_ptr() and bool((gradient != 0).any())
