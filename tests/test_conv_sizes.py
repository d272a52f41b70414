"""The size of every conv layer's input, found by one forward on meta tensors that leaves no trace."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from conv_networks import ConvNeXtBlock, ResNet18, Running, UNet, calls_as_it_runs
from regularizer_truth import Net, batch, refuses
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.modules import module as torch_module

from spectral_ops.conv_sizes import REMEDY, ConvCall, conv_input_sizes
from spectral_ops.rules import expected

Calls = dict[str, list[ConvCall]]


def calls(model: nn.Module, input_size: Any) -> Calls:
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: found for module, found in conv_input_sizes(model, input_size).items()}


MODELS: list[tuple[nn.Module, list[tuple[int, ...]], int]] = [
    (ResNet18(width=2), [(3, 32, 32)], 20),
    (ResNet18(width=2), [(3, 40, 24)], 20),
    (ResNet18(width=2, imagenet=True), [(3, 96, 96)], 20),
    (UNet(), [(2, 16, 24)], 6),
    (nn.Sequential(nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8)), [(3, 32, 32)], 4),
    (nn.Sequential(nn.Conv1d(2, 3, 5, stride=2), nn.ReLU(), nn.ConvTranspose1d(3, 2, 5)), [(2, 41)], 2),
    (nn.Conv3d(1, 2, 3), [(1, 5, 6, 7)], 1),
    (Net(), [(4, 5, 5)], 3),  # groups, and an LSTM and attention behind
    (
        Running(lambda m, x, y, t: m.a(x).mean() + m.b(y).mean() + t, a=nn.Conv2d(1, 1, 3), b=nn.Conv1d(2, 2, 3)),
        [(1, 5, 6), (2, 7), ()],  # the last one a number per sample
        2,
    ),
]


@pytest.mark.parametrize(("model", "shapes", "count"), MODELS)
def test_sizes_are_those_of_a_real_forward(model: nn.Module, shapes: list[tuple[int, ...]], count: int) -> None:
    found = calls(model, shapes)
    assert found == calls_as_it_runs(model, *shapes) and len(found) == count
    if len(shapes) == 1:
        assert calls(model, shapes[0]) == calls(model, list(shapes[0])) == found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_any_dtype_and_without_data(dtype: torch.dtype) -> None:
    found = calls(UNet(), (2, 16, 24))
    assert calls(UNet().to(dtype), (2, 16, 24)) == found
    assert calls(UNet().to("meta"), (2, 16, 24)) == found


def test_models_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2])
    found = calls(transformers.ResNetForImageClassification(resnet), (3, 64, 64))
    assert len(found) == 12 and found["resnet.encoder.stages.1.layers.1.layer.1.convolution"] == [((8, 8), (8, 8))]
    convnext = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 2])
    found = calls(transformers.ConvNextForImageClassification(convnext), (3, 64, 64))
    assert len(found) == 5 and found["convnext.encoder.stages.1.layers.1.dwconv"] == [((8, 8), (8, 8))]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes))
    assert calls(vit, (3, 32, 32)) == {"embeddings.patch_embeddings.projection": [((32, 32), (4, 4))]}


# ---- what else a layer may be called on ----


def test_a_layer_on_two_sizes_has_both_once() -> None:
    model = Running(lambda m, x: m.conv(m.conv(m.conv(x)[..., ::2])), conv=nn.Conv2d(1, 1, 3, padding=1))
    assert calls(model, (1, 8, 8)) == {"conv": [((8, 8), (8, 8)), ((8, 4), (8, 4))]}


def test_a_layer_that_is_not_called_is_missing() -> None:
    model = Running(lambda m, x: m.a(x), a=nn.Conv2d(1, 1, 3), b=nn.Conv2d(1, 1, 3))
    assert list(calls(model, (1, 8, 8))) == ["a"]


def test_output_size_and_keywords() -> None:
    model = Running(lambda m, x: m.up(input=x, output_size=[10, 9]), up=nn.ConvTranspose2d(1, 1, 3, stride=2))
    assert calls(model, (1, 4, 4)) == {"up": [((4, 4), (10, 9))]}


def test_what_a_forward_makes_itself_is_on_meta_and_without_grad() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return m.conv(x + torch.arange(x.shape[-1]))  # as positions are

    assert calls(Running(run, conv=nn.Conv1d(1, 1, 3)), (1, 8)) == {"conv": [((8,), (6,))]}


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    model[1].weight = model[0].weight
    assert calls(model, (2, 8, 8)) == {"0": [((8, 8), (6, 6))], "1": [((6, 6), (4, 4))]}
    assert model[1].weight is model[0].weight


def test_compiled_models() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    whole = torch.compile(model, backend="eager")
    inner = nn.Sequential(torch.compile(model[0], backend="eager"), model[1])
    graphs = counters["stats"]["unique_graphs"]
    for compiled in (whole, inner):
        assert [found for found in calls(compiled, (2, 8, 8)).values()] == [[((8, 8), (6, 6))], [((6, 6), (4, 4))]]
    assert counters["stats"]["unique_graphs"] == graphs


# ---- no trace ----


def test_parameters_buffers_and_flags_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3)).train()
    model[2].eval()
    held = [*model.parameters(), *model.buffers()]
    before = [(x, x.detach().clone(), x.data_ptr(), x._version, x.requires_grad, x.grad) for x in held]
    calls(model, (3, 9, 9))
    after = [*model.parameters(), *model.buffers()]
    for (x, copied, address, version, trained, grad), now in zip(before, after, strict=True):
        assert now is x and torch.equal(now, copied)
        assert (now.data_ptr(), now._version, now.requires_grad, now.grad) == (address, version, trained, grad)
    assert model[1].num_batches_tracked.item() == 0
    assert [m.training for m in model] == [True, True, False, True]


def test_what_modules_hold_besides_is_put_back() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        m.steps += 1
        m.seen.append(x)
        m.cache["x"] = x
        m.register_buffer("late", x.mean())
        m.new = x
        return m.conv(x)

    model = Running(run, conv=nn.Conv2d(1, 1, 3))
    model.steps, model.seen, model.cache = 3, [1], {}
    seen = model.seen
    calls(model, (1, 5, 5))
    assert model.steps == 3 and model.seen is seen and seen == [1] and model.cache == {}
    assert not hasattr(model, "late") and not hasattr(model, "new")


def test_an_lstm_runs_afterwards() -> None:
    """It holds its weights a second time, in a list, which replacing its parameters leaves on meta."""
    model = Net()
    x, twin = batch(), copy.deepcopy(model)
    calls(model, (4, 5, 5))
    assert torch.equal(model(x), twin(x))


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def test_random_states_are_left_alone() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        draws = random.random() + np.random.rand() + torch.rand(1, device="cpu").item()
        return nn.functional.dropout(m.conv(x)) * draws

    model = Running(run, conv=nn.Conv2d(1, 1, 3))
    before = random_states()
    calls(model, (1, 5, 5))
    assert random_states() == before


def fails(m: nn.Module, x: Tensor) -> Tensor:
    torch.rand(1, device="cpu")
    return m.conv(x) * (1.0 if x.sum().item() > 0 else 2.0)  # looks at numbers, which meta tensors do not have


def test_a_forward_that_fails_leaves_no_trace() -> None:
    model = Running(fails, conv=nn.Conv2d(1, 1, 3), norm=nn.BatchNorm2d(1))
    hooks = [dict(found) for found in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)]
    held, states = [id(x) for x in [*model.parameters(), *model.buffers()]], random_states()
    got = "RuntimeError: Tensor.item() cannot be called on meta tensors"
    remedy = f"Correct input_size, which has no batch dimension, if it is not what the model takes. {REMEDY}"
    with refuses(ValueError, expected("a forward on meta tensors of shape (2, 1, 5, 5) to run", got, remedy)) as info:
        calls(model, (1, 5, 5))
    assert isinstance(info.value.__cause__, RuntimeError)
    now = [dict(found) for found in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)]
    assert now == hooks and [id(x) for x in [*model.parameters(), *model.buffers()]] == held
    assert random_states() == states


@pytest.mark.parametrize(
    ("layer", "got"),
    [
        (nn.Conv2d(4, 4, 9), r"RuntimeError in layer '1\.0': .*Kernel size"),
        (nn.ConvTranspose2d(4, 4, 1, padding=9), r"RuntimeError in layer '1\.0': .*[Oo]utput size"),
        (nn.Conv2d(4, 4, 3, padding=9, padding_mode="circular"), r"RuntimeError in layer '1\.0': .*"),
    ],
    ids=["kernel", "output", "circular"],
)
def test_a_layer_that_cannot_run_is_named(layer: nn.Module, got: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(layer))
    with pytest.raises(
        ValueError, match=rf"expected a forward on meta tensors of shape \(2, 3, 8, 8\) to run, got {got}"
    ):
        calls(model, (3, 8, 8))
    with pytest.raises(ValueError, match="got RuntimeError: "):  # behind the layers: none of them is to blame
        calls(Running(lambda m, x: m.conv(x) @ x, conv=nn.Conv2d(3, 4, 3)), (3, 8, 8))


# ---- a mapping, and bad input ----


def test_by_pattern() -> None:
    model = Running(fails, conv=nn.Conv2d(1, 2, 3), line=nn.Conv1d(2, 2, 3), head=nn.Linear(2, 2))
    both = {"conv": [((7, 8), None)], "line": [((9,), None)]}
    assert calls(model, {"conv.weight": (7, 8), "line": 9}) == both  # of the weight, or the layer
    assert calls(model, {"conv": [7, 8], "*": 9}) == both  # the first that matches
    assert calls(model, {lambda module, name: isinstance(module, nn.Conv2d): 7}) == {"conv": [((7, 7), None)]}
    assert calls(nn.Conv2d(1, 2, 3), {"weight": 7}) == {"": [((7, 7), None)]}


def test_a_wrong_channel_count_or_a_batch_dimension_names_the_remedy() -> None:
    got = "to run, got RuntimeError in layer '0': .*Correct input_size, which has no batch"
    for wrong in ((4, 8, 8), (1, 3, 8, 8)):
        with pytest.raises(ValueError, match=got):
            calls(nn.Sequential(nn.Conv2d(3, 2, 3)), wrong)


SHAPE = "input_size to be the shape of one input without its batch dimension"
WRITE = "Write (3, 224, 224), several of these for several inputs, or a mapping from layer to spatial size"


@pytest.mark.parametrize("wrong", [224, "32", (), [], (3, 4.0, 4), (3, True, 4), ((3, 4, 4), 5), [(3, "4")], {3, 4}])
def test_an_input_size_of_another_form(wrong: Any) -> None:
    with refuses(TypeError, expected(SHAPE, repr(wrong), WRITE)):
        calls(nn.Conv2d(3, 2, 3), wrong)


def test_an_input_in_place_of_its_shape() -> None:
    with refuses(TypeError, expected(SHAPE, "a tensor of shape (1, 3, 8, 8)", WRITE)):
        calls(nn.Conv2d(3, 2, 3), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("wrong", [(3, 0, 4), [(3, 4), (-1,)]])
def test_sizes_below_one(wrong: Any) -> None:
    with refuses(ValueError, expected("input_size to hold sizes >= 1", repr(wrong), "Write (3, 224, 224)")):
        calls(nn.Conv2d(3, 2, 3), wrong)


@pytest.mark.parametrize("wrong", ["32", 4.0, None, (), (4, None)])
def test_a_mapping_to_something_else(wrong: Any) -> None:
    condition, remedy = "input_size['weight'] to be a spatial size", "Write 32 or (32, 32), without channels"
    with refuses(TypeError, expected(condition, repr(wrong), remedy)):
        calls(nn.Conv2d(3, 2, 3), {"weight": wrong})


def test_a_pattern_that_matches_no_conv_layer() -> None:
    model = Running(fails, conv=nn.Conv2d(1, 2, 3), head=nn.Linear(2, 2))
    for pattern in ("head.weight", "conf"):
        message = f"every pattern of input_size to match a parameter, got {pattern!r}, which matches none. "
        with pytest.raises(ValueError, match=f"{message}The nearest names are 'conv"):
            calls(model, {"conv": 4, pattern: 4})
