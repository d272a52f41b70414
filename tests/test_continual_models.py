"""Models of the trainer: what they compute, how they begin, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_samples import SHAPES, SMALL, assert_close, images, small
from torch import Tensor, nn

from spectral_ops.continual.models import MODELS, Model, build_model
from spectral_ops.continual.models.activations import ACTIVATIONS, CReLU
from spectral_ops.continual.models.norms import group_norm
from spectral_ops.continual.models.vit import SelfAttention


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """All is small here: a second thread would only be waited for."""
    torch.set_num_threads(1)


# ---- what they compute ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_every_image(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):  # in full size
        assert build_model(name, shape, 7)(torch.empty(2, *shape)).shape == (2, 7)
    if name in SMALL:
        scores = small(name, shape, 7)(images(shape))
        assert scores.shape == (4, 7) and scores.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_full_size_models_take_every_activation(name: str, activation: str) -> None:
    with torch.device("meta"):
        model = build_model(name, (3, 32, 32), 10, activation=activation)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        assert all(units.copies == (2 if activation == "crelu" else 1) for units in model.units())


def test_crelu_is_the_rectified_signal_and_its_mirror() -> None:
    x = images((5, 2, 3))
    for dim in (1, -1):
        assert torch.equal(CReLU(dim)(x), torch.cat((x.relu(), (-x).relu()), dim))
    assert repr(CReLU(-1)) == "CReLU(dim=-1)"


def test_mlp_is_its_formula() -> None:
    x, model = images((2, 3, 3)), small("mlp", (2, 3, 3), activation="crelu", norm="layer")
    h = x.flatten(1)
    for layer in model.layers:
        h = F.linear(h, layer.incoming.weight, layer.incoming.bias)
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        h = h * layer.norm.weight + layer.norm.bias
        h = torch.cat((h.clamp(min=0), (-h).clamp(min=0)), 1)
    assert [h.shape[1], len(model.layers)] == [10, 2]
    assert_close(model(x), h @ model.head.weight.T + model.head.bias)


def test_mlp_without_hidden_layers_is_linear() -> None:
    x, model = images(), build_model("mlp", (1, 8, 8), 3, hidden=()).double()
    assert model.units() == []
    assert_close(model(x), x.flatten(1) @ model.head.weight.T + model.head.bias)


def test_conv_is_its_formula() -> None:
    x = images((2, 9, 13))
    model = small("conv", (2, 9, 13), norm="layer", activation="tanh", kernel=5)
    h = x
    for layer in model.convs:
        h = F.conv2d(h, layer.incoming.weight, layer.incoming.bias, padding=2)
        h = (h - h.mean((1, 2, 3), keepdim=True)) / (h.var((1, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        h = h * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
        h = F.max_pool2d(h.tanh(), 2)
    h = h.flatten(1)
    assert h.shape == (4, 4 * 2 * 3)
    for layer in model.layers:
        h = F.layer_norm(
            layer.incoming(h), h.new_empty(layer.incoming.out_features).shape, *layer.norm.parameters()
        ).tanh()
    assert_close(model(x), model.head(h))


def test_conv_pools_down_to_one_pixel_and_no_further() -> None:
    model = build_model("conv", (1, 8, 9), 3, channels=(2, 2, 5), hidden=()).double()
    assert model.head.in_features == 5 and model(images((1, 8, 9))).shape == (4, 3)
    with pytest.raises(ValueError, match=r"^model conv: expected images of at least 8 x 8 .*, got 9 x 7\. Give fewer"):
        build_model("conv", (1, 9, 7), 3, channels=(2, 2, 5))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_plain_norms_have_no_parameters_and_normalise(name: str) -> None:
    plain, none = (small(name, norm=norm) for norm in ("layer-plain", "none"))
    assert plain.state_dict().keys() == none.state_dict().keys()
    seen: list[Tensor] = []
    for layer in (module for module in plain.modules() if hasattr(module, "norm")):
        layer.norm.register_forward_hook(lambda *arguments: seen.append(arguments[2].flatten(1)))
    plain(images())
    assert len(seen) == len(plain.units()) == {"mlp": 2, "conv": 4}[name]
    for h in seen:
        assert h.mean(1).abs().max() <= 1e-12 and (h.std(1, correction=0) - 1).abs().max() <= 1e-2


def test_resnet_is_its_formula() -> None:
    x, model = images((2, 8, 8)), small("resnet18", (2, 8, 8))

    def norm(h: Tensor, module: Any) -> Tensor:
        mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, correction=0)
        return (h - mean) / (variance + 1e-5).sqrt() * module.weight[:, None, None] + module.bias[:, None, None]

    h = norm(F.conv2d(x, model.stem.weight, padding=1), model.stem_norm).relu()
    widths = []
    for block, stride in zip(model.blocks, (1, 1, 2, 1, 2, 1, 2, 1), strict=True):
        shortcut = h
        if stride == 2:
            shortcut = norm(F.conv2d(h, block.shortcut[0].weight, stride=2), block.shortcut[1])
        h = norm(F.conv2d(h, block.conv1.weight, stride=stride, padding=1), block.norm1).relu()
        h = (norm(F.conv2d(h, block.conv2.weight, padding=1), block.norm2) + shortcut).relu()
        widths.append(h.shape[1:])
    assert widths[1::2] == [(4, 8, 8), (8, 4, 4), (16, 2, 2), (32, 1, 1)]
    assert_close(model.train()(x), model.head(h.mean((2, 3))))


def test_group_norm_is_the_same_in_evaluation_and_batch_norm_is_not() -> None:
    x = images()
    with torch.no_grad():
        for norm, same in (("group", True), ("batch", False)):
            model = small("resnet18", norm=norm)
            assert torch.equal(model.train()(x), model.eval()(x)) == same


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (512, 32), (48, 8), (32, 16), (4, 2), (9, 1), (1, 1)])
def test_group_norm_has_32_groups_or_as_many_as_leave_two_channels(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_attention_is_that_of_torch() -> None:
    x = images((5, 12))
    attention = SelfAttention(12, 3, batch_first=True).double()
    nn.init.normal_(attention.in_proj_bias)
    truth = nn.MultiheadAttention(12, 3, batch_first=True).double()
    truth.load_state_dict(attention.state_dict())
    assert_close(attention(x), truth(x, x, x)[0])


@pytest.mark.parametrize("shape", [(2, 8, 12), (1, 8, 8)], ids=str)
def test_vit_is_that_of_torch(shape: tuple[int, ...]) -> None:
    """Of nn.TransformerEncoderLayer, with patches by unfold."""
    x, model = images(shape), small("vit-tiny", shape)
    encoder_names = {"attention": "self_attn", "fc1": "linear1", "fc2": "linear2"}
    patches = F.unfold(x, 4, stride=4).mT @ model.patches.weight.flatten(1).T + model.patches.bias
    h = torch.cat((model.class_token.expand(4, 1, 12), patches), 1) + model.positions
    assert h.shape[1] == 1 + shape[1] * shape[2] // 16
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(12, 2, 48, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
        state = {}
        for name, value in block.state_dict().items():
            first, _, rest = name.partition(".")
            state[f"{encoder_names.get(first, first)}.{rest}"] = value
        layer.load_state_dict(state)
        h = layer(h)
    assert_close(model(x), model.head(F.layer_norm(h[:, 0], (12,), *model.norm.parameters(), eps=1e-6)))


def test_vit_with_plain_norms_is_that_with_scales_of_one_and_shifts_of_zero() -> None:
    x, plain, affine = images(), small("vit-tiny", norm="layer-plain"), small("vit-tiny", norm="layer")
    absent = affine.load_state_dict(plain.state_dict(), strict=False).missing_keys
    norms = [f"blocks.{block}.norm{i}" for block in (0, 1) for i in (1, 2)] + ["norm"]
    assert absent == [f"{norm}.{key}" for norm in norms for key in ("weight", "bias")]
    assert not torch.allclose(plain(x), affine(x))
    with torch.no_grad():
        for key in absent:
            affine.get_parameter(key).fill_(1 if key.endswith("weight") else 0)
    assert_close(plain(x), affine(x))


@pytest.mark.parametrize(("side", "patch"), [(8, 4), (28, 4), (32, 4), (64, 8), (224, 16)])
def test_vit_patches_follow_the_image(side: int, patch: int) -> None:
    with torch.device("meta"):
        model = build_model("vit-tiny", (3, side, side), 10, depth=1)
    assert model.patches.kernel_size == (patch, patch)
    assert model.positions.shape[1] == 1 + (side // patch) ** 2


def test_parameter_counts() -> None:
    def count(*arguments: Any, **options: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(*arguments, **options).parameters())

    assert count("resnet18", (3, 32, 32), 10) == count("resnet18", (3, 32, 32), 10, norm="group") == 11_173_962
    for name, of_deit, d in (("tiny", 5_717_416, 192), ("small", 22_050_664, 384), ("base", 86_567_656, 768)):
        assert count(f"vit-{name}", (3, 224, 224), 1000) == of_deit
        block = 12 * d * d + 13 * d  # attention 4 d^2 + 4 d, layers 8 d^2 + 5 d, norms 4 d
        outside = (3 * 16 + 1) * d + (1 + 65) * d + 2 * d + 10 * (d + 1)  # patches; class token, positions; norm; head
        assert count(f"vit-{name}", (3, 32, 32), 10) == 12 * block + outside
    assert count("mlp", (1, 28, 28), 10) == 785 * 256 + 257 * 256 + 257 * 10
    assert count("mlp", (1, 28, 28), 10, activation="crelu") == 785 * 256 + 513 * 256 + 513 * 10
    conv = (9 + 1) * 32 + (9 * 32 + 1) * 64
    assert count("conv", (1, 28, 28), 10) == conv + (64 * 49 + 1) * 128 + 129 * 10


# ---- how they begin ----


@pytest.mark.parametrize("name", SMALL)
def test_weights_are_drawn_from_the_global_state(name: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return build_model(name, (1, 8, 8), 3, **SMALL[name]).state_dict()

    first, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(same[key], value) for key, value in first.items())
    matrices = [key for key, value in first.items() if value.ndim > 1]
    assert matrices and not any(torch.equal(other[key], first[key]) for key in matrices)


@pytest.mark.parametrize("name", ["mlp", "conv", "vit-tiny"])
def test_plain_norms_leave_the_other_weights_as_they_begin(name: str) -> None:
    def weights(norm: str) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return build_model(name, (1, 8, 8), 3, **SMALL[name], norm=norm).state_dict()

    affine = weights("layer")
    assert all(torch.equal(affine[key], value) for key, value in weights("layer-plain").items())


def test_mlp_and_conv_begin_as_torch_does() -> None:
    for name in ("mlp", "conv"):
        for units in build_model(name, (3, 32, 32), 10).units():
            weight, bias = units.incoming.weight, units.incoming.bias
            bound = weight[0].numel() ** -0.5
            for values in (weight, bias):
                assert 0.9 * bound <= values.abs().max() <= bound
            # A uniform variable's standard deviation, and four of that of its estimate.
            assert abs(weight.std() * math.sqrt(3) / bound - 1) <= 4 * 0.45 / math.sqrt(weight.numel())


def test_resnet_begins_with_variance_two_over_fan_out() -> None:
    model = build_model("resnet18", (3, 8, 8), 10, width=16)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 1 + 16 + 3 and all(conv.bias is None for conv in convs)
    for conv in convs:
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert abs(conv.weight.std() / math.sqrt(2 / fan_out) - 1) <= 4 / math.sqrt(2 * conv.weight.numel())


def test_vit_begins_with_deviation_002() -> None:
    model = build_model("vit-tiny", (3, 32, 32), 10, depth=2, width=96, heads=3)
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert len(norms) == 5
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert abs(parameter.std() / 0.02 - 1) <= 4 / math.sqrt(2 * parameter.numel()), name
        else:
            assert (parameter == (1 if name in norms else 0)).all(), name


# ---- what they refuse ----


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mpl",
            {},
            r"^model: expected one of mlp, conv, resnet18, vit-tiny, vit-small, vit-base, got 'mpl'\. .*'mlp'\.$",
        ),
        (
            "mlp",
            {"hiden": (3,)},
            r"^model mlp: expected options among hidden, activation, norm, got 'hiden'\. .*'hidden'",
        ),
        ("mlp", {"activation": "rellu"}, r"^activation: expected one of relu, crelu, gelu, tanh, got 'rellu'\. "),
        ("mlp", {"norm": "batch"}, r"^norm: expected one of none, layer, layer-plain, got 'batch'\. "),
        ("mlp", {"hidden": (3, 0)}, r"^model mlp: expected hidden >= 1, got \(3, 0\)\. Change hidden\.$"),
        ("conv", {"activation": "rellu"}, r"^activation: expected one of relu, crelu, gelu, tanh, got 'rellu'\. "),
        ("conv", {"norm": "group"}, r"^norm: expected one of none, layer, layer-plain, got 'group'\. "),
        ("conv", {"channels": (0,)}, r"^model conv: expected channels >= 1, got \(0,\)\. Change channels\.$"),
        ("conv", {"hidden": (-1,)}, r"^model conv: expected hidden >= 1, got \(-1,\)\. Change hidden\.$"),
        ("conv", {"kernel": -1}, r"^model conv: expected kernel >= 1, got -1\. Change kernel\.$"),
        ("conv", {"channels": ()}, r"^model conv: expected channels of at least one convolution, got \(\)\. "),
        ("conv", {"kernel": 4}, r"^model conv: expected kernel to be odd, got 4\. Use 3 or 5\.$"),
        (
            "conv",
            {"channels": (2, 2, 2, 2)},
            r"^model conv: expected images of at least 16 x 16 for 4 poolings, got 8 x 8\. Give fewer channels\.$",
        ),
        ("resnet18", {"width": 0}, r"^model resnet18: expected width >= 1, got 0\. Change width\.$"),
        ("resnet18", {"norm": "layer"}, r"^norm: expected one of batch, group, got 'layer'\. "),
        ("resnet18", {"activation": "rellu"}, r"^activation: expected one of relu, crelu, gelu, tanh, got 'rellu'\. "),
        ("vit-base", {"activation": "rellu"}, r"^activation: expected one of relu, crelu, gelu, tanh, got 'rellu'\. "),
        ("vit-base", {"norm": "none"}, r"^norm: expected one of layer, layer-plain, got 'none'\. "),
        ("vit-base", {"patch": 3}, r"^model vit: expected patch to divide the image, 8 x 8, got 3\. Set patch\.$"),
        (
            "vit-base",
            {"heads": 5},
            r"^model vit: expected heads to divide the width 768, got 5\. Set width and heads\.$",
        ),
        *(
            ("vit-tiny", {option: 0}, rf"^model vit: expected {option} >= 1, got 0\. Change {option}\.$")
            for option in ("patch", "depth", "width", "heads")
        ),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, (1, 8, 8), 3, **options)


@pytest.mark.parametrize(
    ("shape", "got"),
    [((8, 8), r"\(8, 8\)"), ((1, 0, 8), r"\(1, 0, 8\)"), ((1, 1, 8, 8), r"\(1, 1, 8, 8\)"), ((), r"\(\)")],
)
@pytest.mark.parametrize("name", MODELS)
def test_errors_of_the_shape(name: str, shape: tuple[int, ...], got: str) -> None:
    message = rf"^model: expected input_shape to be three sizes >= 1, got {got}\. Write \(channels, height, width\)\.$"
    with pytest.raises(ValueError, match=message):
        build_model(name, shape, 3)
    with pytest.raises(ValueError, match=r"^model: expected classes >= 1, got 0\. Change classes\.$"):
        build_model(name, (1, 8, 8), 0)


def test_options_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^model conv: expected option kernel to be int, got 'big' of type str"):
        build_model("conv", (1, 8, 8), 3, kernel="big")
    assert build_model("mlp", (1, 8, 8), 3, hidden=[4]).units()[0].count == 4  # as JSON and TOML write a tuple


def test_a_model_must_say_its_units() -> None:
    with pytest.raises(NotImplementedError):
        Model((1, 8, 8), 3).units()
