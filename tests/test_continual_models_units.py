"""Models of the trainer: that their units are where they say, and what is done with the models."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_samples import SMALL, VARIANTS, assert_close, describe, images, small, variants
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from spectral_ops import SpectralRegularizer
from spectral_ops.continual.models import build_model
from spectral_ops.continual.models.activations import ACTIVATIONS
from spectral_ops.continual.units import Units
from spectral_ops.layers import discover


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """All is small here: a second thread would only be waited for."""
    torch.set_num_threads(1)


# ---- units ----


class Spy:
    """Sees what an activation gives, and can add noise to one unit's features."""

    def __init__(self, units: Units):
        self.units, self.unit, self.features = units, -1, torch.empty(0)
        units.activation.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.features = output.detach().movedim(self.units.dim, -1).unflatten(-1, (self.units.copies, -1))
        assert self.features.shape[-1] == self.units.count
        if self.unit < 0:
            return output
        noise = torch.zeros_like(self.features)
        noise[..., self.unit] = torch.randn_like(noise[..., self.unit])
        return output + noise.flatten(-2).movedim(-1, self.units.dim)


@variants
def test_a_unit_without_its_row_is_silent(name: str, options: dict[str, Any]) -> None:
    model, x = small(name, **options), images()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 1  # else a ReLU may let none of the others through
        for units in model.units():
            spy = Spy(units)
            model(x)
            i = int(spy.features.abs().flatten(0, -2).sum(0).argmax())  # one that a ReLU lets through
            made_by = [units.incoming.weight, units.incoming.bias]
            if units.norm is not None:
                assert units.norm.weight.shape == units.norm.bias.shape == (units.count,)
                made_by += [units.norm.weight, units.norm.bias]
            assert spy.features[..., i].abs().max() > 0
            for parameter in made_by:
                if parameter is not None:
                    parameter[i] = 0
            model(x)
            others = [j for j in range(units.count) if j != i]
            if options["norm"] == "layer-plain" and name != "vit-tiny":
                # Between the row and the unit it gives 0 the place that 0 has among the others.
                assert units.norm is None
            else:
                assert (spy.features[..., i] == 0).all()
            assert (spy.features[..., others].abs() > 0).any()


@variants
def test_a_unit_that_nothing_reads_has_no_effect(name: str, options: dict[str, Any]) -> None:
    model, x = small(name, **options), images()
    with torch.no_grad():
        for units in model.units():
            spy, i = Spy(units), units.count - 2
            for read in (True, False):
                if not read:
                    units.read_by(units.outgoing.weight)[:, :, i] = 0
                spy.unit = -1
                scores = model(x)
                spy.unit = i
                difference = (model(x) - scores).abs().max() / scores.abs().max()
                assert difference > 1e-6 if read else difference <= 1e-12
            spy.unit = -1


@pytest.mark.parametrize("name", SMALL)
def test_units_are_parts_of_the_model(name: str) -> None:
    model = small(name)
    units = model.units()
    counts = {"mlp": [6, 5], "conv": [3, 4, 5, 6], "resnet18": [4, 4, 8, 8, 16, 16, 32, 32], "vit-tiny": [48, 48]}
    assert [u.count for u in units] == counts[name]
    names = {id(module): path for path, module in model.named_modules()}
    for u in units:
        assert model.get_submodule(u.name) is u.incoming
        assert {id(u.activation), id(u.outgoing)} <= names.keys() and (u.norm is None or id(u.norm) in names)
    if name in ("mlp", "conv"):
        assert all(u.outgoing is after.incoming for u, after in pairwise(units))
        assert units[-1].outgoing is model.head
    copied = copy.deepcopy(model)
    for ours, theirs in zip(copied.units(), units, strict=True):
        assert ours.name == theirs.name and ours.incoming is copied.get_submodule(ours.name) is not theirs.incoming


@variants
def test_every_activation_is_used_once(name: str, options: dict[str, Any]) -> None:
    model = small(name, **options)
    kind = type(ACTIVATIONS[options["activation"]].module(1))
    calls: list[int] = []
    activations = [module for module in model.modules() if isinstance(module, kind)]
    for module in activations:
        module.register_forward_hook(lambda module, *_: calls.append(id(module)))
    model(images())
    assert len(activations) == {"mlp": 2, "conv": 4, "resnet18": 17, "vit-tiny": 2}[name]
    assert sorted(calls) == sorted(id(module) for module in activations)
    assert {id(u.activation) for u in model.units()} <= set(calls)


@pytest.mark.parametrize("name", SMALL)
def test_output_names_what_gives_the_scores(name: str) -> None:
    model, seen = small(name), []
    head = model.get_submodule(model.output)
    head.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    scores = model(images())
    assert isinstance(head, nn.Linear) and seen[0] is scores


# ---- what is done with them ----


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # the CPU's attention is mapped sample by sample
@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if v[1]["norm"] != "batch"], ids=describe)
def test_an_ensemble_is_trained_by_vmap(name: str, options: dict[str, Any]) -> None:
    shape = (1, 16, 16)  # at 8 x 8 the ResNet's last groups are pairs of numbers, and their norm is nearly a sign
    x, y, models = images(shape), torch.tensor([0, 1, 2, 1]), [small(name, shape, **options) for _ in range(3)]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    assert not buffers

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], parameters, (x,)), y)

    gradients = vmap(grad(loss), (0, None))(parameters, x)
    for i, model in enumerate(models):
        F.cross_entropy(model(x), y).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close(gradients[key][i], parameter.grad)


@variants
def test_a_state_brings_back_the_model(name: str, options: dict[str, Any]) -> None:
    x, model, other = images(), small(name, **options), small(name, **options)
    model.train()(x)  # moves what a BatchNorm keeps
    copied = copy.deepcopy(model)
    with torch.no_grad():
        truth = model.eval()(x)
        assert not torch.equal(other.eval()(x), truth)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), truth) and torch.equal(copied.eval()(x), truth)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(model(x), truth)


def test_the_regularizer_reads_attention_as_three_matrices() -> None:
    model = build_model("vit-tiny", (1, 8, 8), 3, **SMALL["vit-tiny"])
    entries = {entry.name: entry for entry in discover(model)}
    for i in range(2):
        packed = entries[f"blocks.{i}.attention.in_proj_weight"]
        assert packed.treated_as == "3 matrices" and tuple(packed.shape) == (36, 12)
        assert entries[f"blocks.{i}.attention.in_proj_bias"].treated_as == "3 biases"
    regularizer = SpectralRegularizer(model, strength=1e-3)
    regularizer()
    sigma = regularizer.sigmas()["blocks.0.attention.in_proj_weight"]
    assert sigma.shape == (3,)


@pytest.mark.parametrize("name", ["mlp", "conv", "vit-tiny"])
def test_the_regularizer_finds_scales_and_shifts_where_norms_have_them(name: str) -> None:
    for norm, kinds in (("layer", {"scale", "shift"}), ("layer-plain", set())):
        entries = discover(build_model(name, (1, 8, 8), 3, **SMALL[name], norm=norm))
        assert {entry.treated_as for entry in entries} & {"scale", "shift"} == kinds


@pytest.mark.parametrize("name", SMALL)
def test_the_regularizer_treats_every_layer_as_the_operator_it_is(name: str) -> None:
    model = build_model(name, (1, 8, 8), 3, **SMALL[name])
    regularizer = SpectralRegularizer(model, strength=1e-3, conv="operator", input_size=(1, 8, 8))
    matrices = {key for key, value in model.named_parameters() if value.ndim in (2, 4)}
    regularizer()
    assert set(regularizer.sigmas()) == matrices
