"""How the module that owns a parameter says it is to be read: recognition by class, never by a parameter's name alone.

A name such as "qkv" or "gamma" is a hint, not a fact. What is not recognised is left out, visibly, and a rule of the
user's names it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from spectral_ops.conv_sizes import REMEDY, ConvCall
from spectral_ops.ops.conv_operator import ConvOperator, conv_operator
from spectral_ops.ops.layout import Kind, Layout
from spectral_ops.rules import Found, Owner, expected

Reading = tuple[Layout | None, str]  # how a parameter is read, and why
Layouts = tuple[dict[str, Layout], str]  # of a module's parameters by attribute, and what the parts are
Reader = Callable[[nn.Module], Layouts]

EMBEDDING: Reading = (None, "embedding")
NOT_RECOGNISED: Reading = (None, "not recognised; name it in rules to treat it")
LAYER_SUFFIX = re.compile(r"_l\d+(_reverse)?$")  # of an RNN's parameters
NORM = re.compile(r"Norm(?!al(?!i[sz]))")  # LayerNorm and Normalization, but no DiagNormal, which is a distribution
SCALE_NAMES, SHIFT_NAMES = ("weight", "scale", "gamma"), ("bias", "beta")
# Norms that multiply by (1 + weight), so that pulling the weight to one would double the layer. Class names of
# transformers 5.23 found by `1.0 + self.weight` and the like in models/*/modeling_*.py, and Megatron's LayerNorm1P.
# A family is given by prefix so that its next member is left out rather than mistreated.
ZERO_CENTRED_NORMS = (
    "*Norm*1P*",
    "Gemma*Norm*",
    "MiniMaxM3VLRMSNorm",
    "MoonshineStreamingLayerNorm",
    "Muse*CenteredRMSNorm",
    "MuseSparkTextInputScaledRMSNorm",
    "Qwen3NextRMSNorm",
    "Qwen3_5*RMSNorm",
    "Qwen4ExpTextRMSNorm",
    "RecurrentGemmaRMSNorm",
    "Step3p7RMSNorm",
    "T5Gemma*RMSNorm",
    "VaultGemmaRMSNorm",
    "VideoPrismLayerNorm",
)
# Of the same families, but multiplying by the weight itself (transformers 5.23).
NOT_ZERO_CENTRED = ("Gemma3n*", "Gemma4*")


def recognise(found: Found) -> Reading:
    """How the modules that own a parameter say it is to be read."""
    readings = [_read(owner, found.parameter) for owner in found.owners]
    names = [owner.name for owner in found.owners[1:]]
    others = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    if EMBEDDING in readings:
        return None, f"embedding, tied with {others}" if others else "embedding"
    # A bare parameter that is also a Linear's bias, as BERT's decoder has it, is a bias.
    layout, reason = next((reading for reading in readings if reading[0] is not None), readings[0])
    return layout, f"{reason}, shared with {others}" if layout is not None and others else reason


def is_conv_weight(found: Found) -> bool:
    return any(isinstance(owner.module, _ConvNd) and owner.attribute == "weight" for owner in found.owners)


def read_as_operator(found: Found, reading: Reading, calls: Mapping[nn.Module, Sequence[ConvCall]]) -> Reading:
    """A conv weight's reading as a matrix, changed to the linear map of its layers at the sizes they are called with.

    Where windows do not overlap that map is a matrix, whatever the size.
    """
    layout, reason = reading
    assert layout is not None
    kernel = found.parameter.shape[2:]
    seen: dict[tuple[ConvOperator, int], tuple[str, ConvCall]] = {}
    for owner in found.owners:
        module, name = owner.module, _layer(owner)
        if isinstance(module, _ConvNd):
            for call in calls.get(module, ()):
                seen.setdefault((_operator_of(module, name, found, call), module.groups), (name, call))
    remedy = f"{REMEDY}, name {found.name!r} in exclude, or set rules={{{found.name!r}: 'matrix'}}"
    if not seen:
        got = "an unknown one: no forward or pattern reaches it"
        raise ValueError(expected(f"the input size of {_layer(found.owners[0])}", got, remedy))
    if all(operator.is_matrix(kernel) for operator, _ in seen) and len({groups for _, groups in seen}) == 1:
        return Layout(Kind.MATRIX, layout.parts), f"{reason}, exact as a matrix (windows do not overlap)"
    if len(seen) > 1:
        each = zip(_differences(list(seen)), seen.values(), strict=True)
        got = ", ".join(f"{difference} in {name}" for difference, (name, _) in each)
        if len({call.size for _, call in seen.values()}) == 1:
            remedy = f"Name {found.name!r} in exclude, or set rules={{{found.name!r}: 'matrix'}}"
        raise ValueError(expected(f"one convolution with the weight {found.name!r}, of one input size", got, remedy))
    operator, _ = next(iter(seen))
    return layout._replace(operator=operator), f"{reason}, operator on {_by(operator.input_size)}"


def _differences(maps: Sequence[tuple[ConvOperator, int]]) -> list[str]:
    """Of each operator, and its groups, what is not the same in all of them."""

    def facts(operator: ConvOperator, groups: int) -> dict[str, str]:
        padding = _by(operator.before) if operator.before == operator.after else f"{operator.before}-{operator.after}"
        return {
            "input_size": _by(operator.input_size),
            "kind": "a transposed convolution" if operator.transposed else "a convolution",
            "stride": f"stride {_by(operator.stride)}",
            "padding": f"{'circular ' if operator.circular else ''}padding {padding}",
            "dilation": f"dilation {_by(operator.dilation)}",
            "output_padding": f"output_padding {_by(operator.output_padding)}",
            "groups": f"groups {groups}",
        }

    all_facts = [facts(*one) for one in maps]
    differing = [name for name in all_facts[0] if len({one[name] for one in all_facts}) > 1]
    return [" and ".join(one[name] for name in differing) for one in all_facts]


def _pads(module: _ConvNd) -> bool:
    if module.padding == "same":
        return any(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.padding != "valid" and any(module.padding)


def _operator_of(module: _ConvNd, name: str, found: Found, call: ConvCall) -> ConvOperator:
    mode, padding = module.padding_mode, module.padding
    if mode in ("reflect", "replicate"):
        if _pads(module):
            condition = f"padding_mode 'zeros' or 'circular' of {name}"
            remedy = f"Read it as a matrix by rules={{{found.name!r}: 'matrix'}}, or name it in exclude"
            raise NotImplementedError(expected(condition, f"{mode!r}, which has no operator form here", remedy))
        mode = "zeros"  # nothing is padded
    operator = conv_operator(
        f"SpectralRegularizer, {name}",
        found.parameter.shape,
        call.size,
        stride=module.stride,
        padding=padding,
        dilation=module.dilation,
        output_padding=module.output_padding,
        groups=module.groups,
        padding_mode=mode,
        transposed=module.transposed,
    )
    output = operator.output_size(found.parameter.shape[2:])
    if call.output is None or call.output == output:
        return operator
    # Called with output_size, a transposed layer chooses its output_padding.
    extra = tuple(e + n - m for e, n, m in zip(operator.output_padding, call.output, output, strict=True))
    most = (max(s, d) for s, d in zip(operator.stride, operator.dilation, strict=True))
    if operator.transposed and all(0 <= e < limit for e, limit in zip(extra, most, strict=True)):
        return operator._replace(output_padding=extra)
    condition = f"{name} to take {_by(call.size)} to {_by(output)}, as its arguments say"
    remedy = f"Its class computes something else: set rules={{{found.name!r}: 'matrix'}}, or name it in exclude"
    raise ValueError(expected(condition, _by(call.output), remedy))


def _layer(owner: Owner) -> str:
    name = owner.name.rpartition(".")[0]
    return f"layer {name!r}" if name else "the model itself"


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _read(owner: Owner, parameter: nn.Parameter) -> Reading:
    module, attribute, name = owner
    if module is None:
        return _read_without_module(name, parameter)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and attribute == "weight":
        return EMBEDDING
    if isinstance(module, ParametrizationList):
        return None, "parametrized; give the pattern in rules to treat it"
    if attribute in SCALE_NAMES and _is_zero_centred(module):
        return None, "zero-centred norm, multiplies by (1 + weight); 'shift' in rules would pull it to 0"
    reader = _reader(module)
    layouts, parts_are = ({}, "") if reader is None else reader(module)
    layout = layouts.get(LAYER_SUFFIX.sub("", attribute))
    # What is stored in another shape (flattened, packed to 4 bits) is no longer what its module says.
    fits = {Kind.MATRIX: parameter.ndim > 1, Kind.BIAS: parameter.ndim == 1, Kind.SCALE: True, Kind.SHIFT: True}
    if layout is None or not fits[layout.kind]:
        return NOT_RECOGNISED
    return layout, f"{_label(module)} {attribute}" + (f": {parts_are}" if layout.parts > 1 else "")


def _read_without_module(name: str, parameter: nn.Parameter) -> Reading:
    if parameter.ndim >= 2:
        return Layout(), "no module given: read as one matrix"
    if parameter.ndim == 1 and (name == "bias" or name.endswith(".bias")):
        return Layout(Kind.BIAS), "no module given: read as a bias by its name"
    return None, "no module given: name it in rules"


def _reader(module: nn.Module) -> Reader | None:
    """Looked up along the bases, so that a subclass is read as the class it derives from."""
    bases = type(module).__mro__
    by_class = next((READERS[base] for base in bases if base in READERS), None)
    if by_class is not None:
        return by_class
    if "Conv1D" in [base.__name__ for base in bases] and hasattr(module, "nf"):
        return _conv1d
    # A leaf with a 1-D scale: keeps out blocks named after their norms, and fused norm-and-linear layers.
    scales = [p for name, p in module.named_parameters(recurse=False) if name in SCALE_NAMES and p.ndim == 1]
    if scales and not module._modules and any(NORM.search(base.__name__) for base in bases):
        return _norm_by_name
    return None


def _is_zero_centred(module: nn.Module) -> bool:
    if getattr(module, "zero_centered_gamma", False):  # TransformerEngine's norms
        return True
    names = [base.__name__ for base in type(module).__mro__]
    return _any_match(names, ZERO_CENTRED_NORMS) and not _any_match(names, NOT_ZERO_CENTRED)


def _any_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _label(module: nn.Module) -> str:
    name = type(module).__name__
    return f"nn.{name}" if getattr(nn, name, None) is type(module) else name


def _linear(module: nn.Module) -> Layouts:
    return {"weight": Layout(), "bias": Layout(Kind.BIAS)}, ""


def _conv1d(module: nn.Module) -> Layouts:
    return {"weight": Layout(row_dim=1), "bias": Layout(Kind.BIAS)}, ""  # stored (in, out)


def _conv(module: nn.Module, row_dim: int) -> Layouts:
    groups = cast(int, module.groups)
    return {"weight": Layout(Kind.MATRIX, groups, 0, row_dim), "bias": Layout(Kind.BIAS, groups)}, "one per group"


def _attention(module: nn.Module) -> Layouts:
    packed = {"in_proj_weight": Layout(Kind.MATRIX, 3), "in_proj_bias": Layout(Kind.BIAS, 3)}
    return packed | {f"{letter}_proj_weight": Layout() for letter in "qkv"}, "q, k, v"


def _recurrent(module: nn.Module, gates: int) -> Layouts:
    layouts = {f"weight_{side}": Layout(Kind.MATRIX, gates) for side in ("ih", "hh")}
    layouts |= {f"bias_{side}": Layout(Kind.BIAS, gates) for side in ("ih", "hh")}
    return layouts | {"weight_hr": Layout()}, "one per gate"


def _norm(module: nn.Module) -> Layouts:
    return {"weight": Layout(Kind.SCALE), "bias": Layout(Kind.SHIFT)}, ""


def _norm_by_name(module: nn.Module) -> Layouts:
    scales = {name: Layout(Kind.SCALE) for name in SCALE_NAMES}
    return scales | {name: Layout(Kind.SHIFT) for name in SHIFT_NAMES}, ""


READERS: dict[type, Reader] = {
    nn.Linear: _linear,
    _ConvNd: partial(_conv, row_dim=0),
    _ConvTransposeNd: partial(_conv, row_dim=1),
    nn.MultiheadAttention: _attention,
    nn.RNN: partial(_recurrent, gates=1),
    nn.RNNCell: partial(_recurrent, gates=1),
    nn.LSTM: partial(_recurrent, gates=4),
    nn.LSTMCell: partial(_recurrent, gates=4),
    nn.GRU: partial(_recurrent, gates=3),
    nn.GRUCell: partial(_recurrent, gates=3),
    nn.LayerNorm: _norm,
    nn.GroupNorm: _norm,
    nn.RMSNorm: _norm,
    _NormBase: _norm,  # BatchNorm, SyncBatchNorm and InstanceNorm
}
