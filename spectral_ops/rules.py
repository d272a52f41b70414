"""Parameters by name: who holds them, the patterns that choose among them, the rules that override recognition."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectral_ops.ops.checks import check_no_transform, is_real
from spectral_ops.ops.layout import Kind, Layout

Pattern = str | Callable[[nn.Module | None, str], bool]
Patterns = Pattern | Collection[Pattern]
Model = nn.Module | Iterable[tuple[str, Tensor]]
Value = TypeVar("Value")

RULE_KINDS = ("matrix", "matrices", "bias", "scale", "shift", "skip")
WHOLE = (1, 0)  # one part: the split that cuts nothing
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALL_NAMES = "List the names with [name for name, _ in model.named_parameters()]"


class Owner(NamedTuple):
    """One place a parameter is registered at. A shared parameter has several, `module` is None without a model."""

    module: nn.Module | None
    attribute: str
    name: str


class Found(NamedTuple):
    """A distinct parameter under the first of its names, as named_parameters() gives it, and everywhere it is held."""

    name: str
    parameter: nn.Parameter
    owners: list[Owner]


def expected(condition: str, got: object, remedy: str) -> str:
    """The house form of an error message."""
    return f"SpectralRegularizer: expected {condition}, got {got}. {remedy}."


@dataclass(frozen=True)
class Rule:
    """What to do with a parameter, given by the user as `rules={pattern: Rule(...)}`.

    Arguments:
        kind: "matrix"; "matrices", an (S, m, n) parameter that is S matrices; "bias", "scale", "shift"; or "skip".
        split: (parts, dim), for packed layers: (3, 0) for a Linear called qkv, (3, 1) for GPT-2's Conv1D c_attn.
        row_dim: which dimension counts the outputs. None, the default, is the module's own convention (1 for a
            transposed conv and for transformers' Conv1D, else 0, or 1 for "matrices"), so that a rule which only
            splits a layer does not also turn it.

    Raises ValueError for an unknown kind or a split into less than one part, TypeError for other types.

        >>> rules = {"*.qkv.weight": Rule(split=(3, 0)), "*.experts": Rule("matrices"), "*.gamma": "scale"}
    """

    kind: str = "matrix"
    split: tuple[int, int] = WHOLE
    row_dim: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in RULE_KINDS:
            condition = f"the kind of a rule to be one of {', '.join(RULE_KINDS)}"
            raise ValueError(expected(condition, repr(self.kind), "Use one of these"))
        if not (isinstance(self.split, tuple) and len(self.split) == 2 and all(type(n) is int for n in self.split)):
            condition = "the split of a rule to be two integers (parts, dim)"
            raise TypeError(expected(condition, repr(self.split), "Write Rule(split=(3, 0))"))
        if self.split[0] < 1:
            remedy = "Leave split out to keep the parameter whole"
            raise ValueError(expected("the parts of a rule's split to be >= 1", self.split[0], remedy))
        if self.row_dim is not None and type(self.row_dim) is not int:
            remedy = "It is the dimension that counts the outputs"
            raise TypeError(expected("the row_dim of a rule to be an integer", repr(self.row_dim), remedy))


def show(pattern: object) -> str:
    """A pattern as messages and tables name it."""
    return repr(pattern) if isinstance(pattern, str) else f"callable {getattr(pattern, '__qualname__', pattern)}"


def collect(model: Model) -> list[Found]:
    """Every distinct parameter with all the places that hold it, in the order of named_parameters()."""
    if isinstance(model, nn.Module):
        pairs = [
            (Owner(module, attribute, f"{prefix}.{attribute}" if prefix else attribute), parameter)
            for prefix, module in model.named_modules(remove_duplicate=False)
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        ]
    else:
        pairs = _checked_pairs(model)
    found: dict[int, Found] = {}
    for owner, parameter in pairs:
        if is_lazy(parameter):
            condition = f"parameter {owner.name!r} to be initialised"
            raise ValueError(expected(condition, "a lazy one without a shape", "Run one forward pass first"))
        found.setdefault(id(parameter), Found(owner.name, parameter, [])).owners.append(owner)
    if not found:
        remedy = "Pass the model that is trained, once it is built"
        raise ValueError(expected("a model with parameters", "none", remedy))
    return list(found.values())


def _checked_pairs(model: Iterable[tuple[str, Tensor]]) -> list[tuple[Owner, nn.Parameter]]:
    condition, remedy = "model to be a module or (name, parameter) pairs", "Pass the model or model.named_parameters()"
    if not isinstance(model, Iterable) or isinstance(model, Tensor):
        raise TypeError(expected(condition, type(model).__name__, remedy))
    pairs = []
    for item in model:
        if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(expected(condition, f"an item of type {type(item).__name__}", remedy))
        name, x = item
        if not isinstance(x, Tensor):
            raise TypeError(expected(condition, f"{type(x).__name__} under {name!r}", remedy))
        if not isinstance(x, nn.Parameter) and not (x.is_leaf and x.requires_grad):
            condition = f"{name!r} to be a parameter, or a leaf tensor that requires a gradient"
            remedy = "Wrap it in nn.Parameter, or call its requires_grad_()"
            raise TypeError(expected(condition, "another tensor", remedy))
        pairs.append((Owner(None, "", name), cast(nn.Parameter, x)))
    repeated = [name for name, times in Counter(owner.name for owner, _ in pairs).items() if times > 1]
    if repeated:
        remedy = "Prefix the names of each model"
        raise ValueError(expected("every name to be given once", f"{repeated[0]!r} repeatedly", remedy))
    return pairs


def check_treatable(name: str, parameter: nn.Parameter) -> None:
    """Refuses a parameter whose numbers cannot be read as a dense matrix of floats here."""
    check_no_transform("SpectralRegularizer", [parameter], f"parameter {name!r}", single=True)
    remedy = f"Leave it out with exclude={name!r}"
    if parameter.dtype not in FLOATS or parameter.layout is not torch.strided:
        condition = f"parameter {name!r} to be dense and float16, bfloat16, float32 or float64"
        raise TypeError(expected(condition, f"{parameter.dtype}, {parameter.layout}", remedy))


def refuse_transform(what: str) -> None:
    """NotImplementedError inside vmap, grad, jvp and the like of torch.func."""
    if torch._C._functorch.maybe_current_level() is not None:
        remedy = "Call the regularizer outside, on each model by itself, and differentiate by autograd"
        raise NotImplementedError(expected(what, "a call inside a transform of torch.func", remedy))


def refuse_sharded_operator(name: str) -> None:
    remedy = f"Read it as a matrix by rules={{{name!r}: 'matrix'}}, or leave it unsharded"
    raise NotImplementedError(expected(f"conv operator {name!r} on one rank", "a sharded weight", remedy))


def matches(pattern: Pattern, found: Found) -> bool:
    """Whether the pattern matches the parameter under any of its names."""
    # fnmatchcase: fnmatch folds case on Windows only, and the same code must choose the same layers everywhere.
    if isinstance(pattern, str):
        return any(fnmatch.fnmatchcase(owner.name, pattern) for owner in found.owners)
    return any(pattern(owner.module, owner.name) for owner in found.owners)


def as_several(patterns: Patterns | None) -> Collection[Pattern]:
    """One pattern or several as several."""
    if patterns is None:
        return []
    return patterns if isinstance(patterns, Collection) and not isinstance(patterns, str | nn.Module) else [patterns]


def match(argument: str, pattern: Pattern, parameters: Sequence[Found]) -> set[str]:
    """Names of the parameters the pattern matches under any of their names; it must match one."""
    names = {found.name for found in parameters if matches(pattern, found)}
    if names:
        return names
    condition = f"every pattern of {argument} to match a parameter"
    if not isinstance(pattern, str):
        raise ValueError(expected(condition, f"{show(pattern)}, true for none of {len(parameters)}", ALL_NAMES))
    every_name = [o.name for f in parameters for o in f.owners]
    near = difflib.get_close_matches(pattern, every_name, n=3, cutoff=0.4)
    remedy = f"The nearest names are {', '.join(map(repr, near))}" if near else ALL_NAMES
    if any(name.startswith(f"{pattern}.") for name in every_name):
        remedy = f"For all parameters of the module write '{pattern}.*'"
    raise ValueError(expected(condition, f"{show(pattern)}, which matches none", remedy))


def match_any(argument: str, patterns: Patterns, parameters: Sequence[Found]) -> set[str]:
    """Names of the parameters that one of the patterns matches."""
    if isinstance(patterns, Mapping):
        condition = f"{argument} to be a pattern or a sequence of them"
        raise TypeError(expected(condition, type(patterns).__name__, "A mapping belongs in rules"))
    names: set[str] = set()
    for pattern in as_several(patterns):
        _check_pattern(argument, pattern)
        names |= match(argument, pattern, parameters)
    return names


def match_first(
    argument: str, mapping: Mapping[Pattern, Value], parameters: Sequence[Found]
) -> dict[str, tuple[Pattern, Value]]:
    """For each parameter matched, the first (pattern, value) of the mapping that matches it."""
    if not isinstance(mapping, Mapping):
        condition = f"{argument} to be a mapping from pattern to value"
        raise TypeError(expected(condition, type(mapping).__name__, "Write {'*.weight': value}"))
    chosen: dict[str, tuple[Pattern, Value]] = {}
    for pattern, value in mapping.items():
        _check_pattern(argument, pattern)
        for name in match(argument, pattern, parameters):
            chosen.setdefault(name, (pattern, value))
    return chosen


def _check_pattern(argument: str, pattern: object) -> None:
    # A module is callable, and calling it as a pattern would run its forward.
    if isinstance(pattern, nn.Module) or not (isinstance(pattern, str) or callable(pattern)):
        condition = f"every pattern of {argument} to be a string or a callable"
        remedy = "Use a name with wildcards such as 'head.*', or a callable (module, name) -> bool"
        raise TypeError(expected(condition, type(pattern).__name__, remedy))


def number(argument: str, value: Any) -> float:
    """A finite number >= 0, as a float. `argument` says where it stands, such as "strength['*.weight']"."""
    example = "1e-3" if argument.startswith("strength") else "1.0"  # a strength of 1 is far from any useful one
    if not is_real(value):
        raise TypeError(expected(f"{argument} to be a number", type(value).__name__, f"Give a float such as {example}"))
    out = float(value)
    if not (math.isfinite(out) and out >= 0):
        raise ValueError(expected(f"{argument} to be finite and >= 0", value, f"Give a float such as {example}"))
    return out


def check_strength_value(strength: float | None) -> None:
    """None: one that cannot be read now, see `known_value`."""
    if strength is not None and not (strength >= 0 and math.isfinite(strength)):
        raise ValueError(expected("strength to be finite and not negative", strength, "Pass a float such as 1e-3"))


def checked_strength(value: Any) -> float | Tensor:
    """A strength as it is set at any time; the value of a tensor on a device is not looked at."""
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(expected("strength to be a 0-d float tensor", got, "Use torch.tensor(1e-3)"))
        if value.device.type == "cpu":
            check_strength_value(known_value(value))
        return value
    if not is_real(value):
        condition = "strength to be a number, a 0-d tensor or a mapping"
        raise TypeError(expected(condition, type(value).__name__, "Pass a float such as 1e-3"))
    value = float(value)
    check_strength_value(value)
    return value


def check_grad_scale(scale: Any) -> None:
    where, remedy = "accumulate_grad_: expected grad_scale to be", "Pass scaler.get_scale()"
    if isinstance(scale, Tensor):
        if scale.ndim != 0:
            raise ValueError(f"{where} 0-d, got shape {tuple(scale.shape)}. {remedy}.")
    elif scale is not None and not is_real(scale):
        raise TypeError(f"{where} a number or a 0-d tensor, got {type(scale).__name__}. {remedy}.")
    elif scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{where} finite and positive, got {scale}. {remedy}.")


def known_value(x: Tensor) -> float | None:
    """What a 0-d tensor holds now; None where reading it would break: traced, fake, on meta, in a capture, sharded."""
    return float(x.detach().item()) if is_readable(x) else None


def is_readable(x: Tensor) -> bool:
    """Whether its numbers may be looked at now, for a message or a table."""
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, nn.Parameter):
        return False
    # Under FakeTensorMode and the like, or one of vmap's, the read would be refused.
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def match_numbers(argument: str, mapping: Mapping[Pattern, Any], parameters: Sequence[Found]) -> dict[str, float]:
    """For each parameter matched, the number the first matching pattern gives it; every number is checked."""
    chosen = match_first(argument, mapping, parameters)
    numbers = {pattern: number(f"{argument}[{show(pattern)}]", value) for pattern, value in mapping.items()}
    return {name: numbers[pattern] for name, (pattern, _) in chosen.items()}


def resolve_rules(
    rules: Mapping[Pattern, Rule | str] | None, parameters: Sequence[Found]
) -> dict[str, tuple[Pattern, Rule]]:
    """The rule of each parameter that has one; a string is short for Rule(kind=string)."""
    chosen = match_first("rules", {} if rules is None else rules, parameters)
    resolved: dict[str, tuple[Pattern, Rule]] = {}
    for name, (pattern, rule) in chosen.items():
        if not isinstance(rule, Rule | str):
            remedy = "Write rules={'*.qkv.weight': Rule(split=(3, 0))}, or the kind alone as a string"
            raise TypeError(expected(f"rules[{show(pattern)}] to be a Rule or a string", type(rule).__name__, remedy))
        resolved[name] = (pattern, Rule(kind=rule) if isinstance(rule, str) else rule)
    return resolved


def layout_of(rule: Rule, name: str, shape: torch.Size, natural: Layout | None) -> Layout | None:
    """The rule applied to a parameter of this shape that recognition reads as `natural`; None for "skip"."""
    if rule.kind == "skip":
        return None
    if rule.kind == "matrix":
        return _matrix_layout(rule, name, shape, natural)
    if rule.kind == "matrices":
        return _matrices_layout(rule, name, shape)
    if rule.row_dim is not None:
        raise ValueError(expected(f"no row_dim in the rule for {name!r}", rule.row_dim, f"A {rule.kind} has no rows"))
    if not shape:
        remedy = "Leave it out; a single number has no norm to hold"
        raise ValueError(expected(f"{name!r} to have at least 1 dimension to be a {rule.kind}", tuple(shape), remedy))
    if rule.kind == "bias":
        if len(shape) != 1:
            condition = f"{name!r} to have 1 dimension to be a bias"
            raise ValueError(expected(condition, tuple(shape), "Use 'shift', which allows any shape"))
        return Layout(Kind.BIAS, *_checked_split(rule, name, shape))
    if rule.split != WHOLE:
        remedy = f"A {rule.kind} counts element by element"
        raise ValueError(expected(f"no split in the rule for {name!r}", rule.split, remedy))
    return Layout(Kind.SCALE if rule.kind == "scale" else Kind.SHIFT)


def _matrix_layout(rule: Rule, name: str, shape: torch.Size, natural: Layout | None) -> Layout:
    if len(shape) < 2:
        remedy = "Use 'bias', 'scale' or 'shift', or a narrower pattern"
        raise ValueError(expected(f"{name!r} to have at least 2 dimensions to be a matrix", tuple(shape), remedy))
    parts, split_dim = _checked_split(rule, name, shape)
    own = natural.row_dim if natural is not None and natural.kind is Kind.MATRIX else 0
    row_dim = own if rule.row_dim is None else _checked_dim("row_dim", rule.row_dim, name, shape)
    return Layout(Kind.MATRIX, parts, split_dim, row_dim)


def _matrices_layout(rule: Rule, name: str, shape: torch.Size) -> Layout:
    if len(shape) != 3:
        remedy = "Use 'matrix', with split=(parts, dim) for a packed one"
        raise ValueError(expected(f"{name!r} to have 3 dimensions (S, m, n) to be S matrices", tuple(shape), remedy))
    if rule.split != WHOLE:
        remedy = "'matrices' already cuts dimension 0"
        raise ValueError(expected(f"no split in the rule for {name!r}", rule.split, remedy))
    row_dim = 1 if rule.row_dim is None else _checked_dim("row_dim", rule.row_dim, name, shape)
    if row_dim == 0:
        raise ValueError(expected(f"row_dim 1 or 2 in the rule for {name!r}", 0, "Dimension 0 counts the matrices"))
    # A stack of none is one empty matrix, which counts for nothing.
    return Layout(Kind.MATRIX, max(1, shape[0]), 0, row_dim)


def _checked_split(rule: Rule, name: str, shape: torch.Size) -> tuple[int, int]:
    parts, dim = rule.split[0], _checked_dim("split dim", rule.split[1], name, shape)
    if shape[dim] % parts:
        condition = f"dimension {dim} of {name!r} to be divisible by {parts} parts"
        raise ValueError(expected(condition, tuple(shape), "Check the number of parts and the dimension"))
    return parts, dim


def _checked_dim(what: str, dim: int, name: str, shape: torch.Size) -> int:
    """The dimension counted from the front: a Layout does not know negative ones."""
    if not -len(shape) <= dim < len(shape):
        remedy = f"{name!r} has shape {tuple(shape)}"
        raise ValueError(expected(f"the {what} of the rule for {name!r} to be a dimension it has", dim, remedy))
    return dim % len(shape)
