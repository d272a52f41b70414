"""Which parameter is which operator: the entries a penalty works through, and the table that shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spectral_ops.conv_sizes import ConvCall, InputSize, conv_input_sizes
from spectral_ops.ops.dtensor import is_dtensor
from spectral_ops.ops.layout import Kind, Layout
from spectral_ops.recognition import Reading, is_conv_weight, read_as_operator, recognise
from spectral_ops.rules import (
    Found,
    Model,
    Owner,
    Pattern,
    Patterns,
    Rule,
    check_treatable,
    collect,
    expected,
    layout_of,
    match,
    match_any,
    match_numbers,
    number,
    refuse_sharded_operator,
    resolve_rules,
    show,
)

NOUNS = {
    Kind.MATRIX: ("matrix", "matrices"),
    Kind.BIAS: ("bias", "biases"),
    Kind.SCALE: ("scale", "scales"),
    Kind.SHIFT: ("shift", "shifts"),
}
OPERATOR = ("operator", "operators")
SWITCHES = {Kind.MATRIX: "weights", Kind.BIAS: "biases", Kind.SCALE: "norms", Kind.SHIFT: "norms"}


def nouns(layout: Layout) -> tuple[str, str]:
    """What one of its parts is called, and several."""
    return NOUNS[layout.kind] if layout.operator is None else OPERATOR


@dataclass(eq=False)
class Entry:
    """One parameter and what the penalty does with it; `layout` None means left out.

    The parameter is looked up through its module each time, so that `load_state_dict(assign=True)`, `to_empty` and
    `fully_shard`, which replace it, are followed. Only a parameter given without a module is `held`. While FSDP has
    gathered a layer for its forward pass or backward, its module holds the whole weight for that time; the parameter is
    the sharded one all the same, which the optimizer has and FSDP's record of it knows.
    """

    name: str
    module: nn.Module | None = field(repr=False)
    attribute: str
    held: nn.Parameter | None = field(repr=False)
    layout: Layout | None
    shape: tuple[int, ...]
    reason: str
    target: float = 0.0  # additive parameters go to zero
    strength: float = 1.0
    record: Any = field(default=None, repr=False)  # FSDP's, where that gathers it now and then
    ties: tuple[Owner, ...] = field(default=(), repr=False)  # where else the model has it

    @property
    def treated_as(self) -> str:
        """As the table says it: "matrix", "3 matrices", "operator", "bias", "scale", "shift" or "left out"."""
        if self.layout is None:
            return "left out"
        one, many = nouns(self.layout)
        return one if self.layout.parts == 1 else f"{self.layout.parts} {many}"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as the model holds it now."""
        found = self.held if self.module is None else self.module._parameters.get(self.attribute)
        if found is None:
            remedy = "It was removed or parametrized since; build the regularizer again"
            raise RuntimeError(expected(f"parameter {self.name!r} on its module", "none", remedy))
        if self.record is not None and found is getattr(self.record, "_unsharded_param", None):
            return self.record.sharded_param
        return found

    @property
    def note(self) -> str:
        """What the table adds to the reason; never an error."""
        if self.held is None and (self.module is None or self.module._parameters.get(self.attribute) is None):
            return "gone: removed or parametrized since"
        if self.parameter.is_meta:
            return "on meta, waits for its data"
        return "frozen now" if self.frozen else ""

    @property
    def frozen(self) -> bool:
        """Whether its parameter is left out now. What functional_call puts there is no parameter: its value counts."""
        p = self.parameter
        return not p.requires_grad and (self.module is None or isinstance(p, nn.Parameter))


def discover(
    model: Model,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    rules: Mapping[Pattern, Rule | str] | None = None,
    target: float | Mapping[Pattern, float] = 1.0,
    strength: Mapping[Pattern, float] | None = None,
    weights: bool = True,
    biases: bool = True,
    norms: bool = True,
    conv: str = "reshape",
    input_size: InputSize | None = None,
) -> list[Entry]:
    """One `Entry` per distinct parameter, those left out among them, in the order of `model.named_parameters()`.

    A pattern is a string (`fnmatch` on the full name, or on any name of a shared parameter) or a callable
    `(module, name) -> bool` given the owning module. In a mapping the first pattern that matches wins.

    Arguments:
        model: a module, or (name, parameter) pairs, which are read by shape and name alone.
        include: treat nothing else. It does not make an unrecognised parameter treated; rules do.
        exclude: leave these out, whatever the other arguments say.
        rules: pattern to `Rule`, or to its kind as a string; wins over recognition and over the three switches.
            A rule that splits a weight along its outputs splits the bias of the same layer too.
        target: t of the matrices; norm scales stay at 1. A mapping sets both; what it does not match gets 1.
        strength: multiplier of the global strength; a mapping must cover every treated parameter.
        weights, biases, norms: False leaves out what was recognised as matrix, as bias, as scale or shift.
        conv: "reshape" reads conv weights as matrices, "operator" as the linear maps that their layers are on inputs of
            their size. A rule for a conv weight wins: "matrix" reshapes that one. Where the windows of a layer do not
            overlap, its norm is that of a matrix, and it is read as that.
        input_size: with "operator": the shape of an input of the model without its batch dimension, (C, H, W), several
            of these, or a mapping from pattern to spatial size; see `conv_input_sizes`.

    Raises ValueError for a pattern that matches nothing, a rule that does not fit its parameter, an uninitialised
    lazy parameter, a conv layer of no or several input sizes, or when nothing is left to treat; TypeError for
    arguments of another type and for treated parameters that are not dense floating point; RuntimeError for sharded
    parameters; NotImplementedError for "operator" with reflect or replicate padding.

        >>> [(e.name, e.treated_as) for e in discover(nn.Linear(3, 2))]
        [('weight', 'matrix'), ('bias', 'bias')]
    """
    _check_conv(model, conv, input_size)
    parameters = collect(model)
    included = None if include is None else match_any("include", include, parameters)
    excluded = set() if exclude is None else match_any("exclude", exclude, parameters)
    ruled = resolve_rules(rules, parameters)
    rule_of = {owner.name: (f, ruled[f.name][1]) for f in parameters if f.name in ruled for owner in f.owners}
    switched_on = {Kind.MATRIX: weights, Kind.BIAS: biases, Kind.SCALE: norms, Kind.SHIFT: norms}
    entries = []
    calls: dict[nn.Module, list[ConvCall]] | None = None
    for found in parameters:
        reading: Reading
        if found.name in excluded:
            reading = None, "excluded"
        elif included is not None and found.name not in included:
            reading = None, "not in include"
        elif found.name in ruled:
            reading = _apply_rule(found, *ruled[found.name])
        else:
            reading = _split_with_weight(found, recognise(found), rule_of)
            if reading[0] is not None and not switched_on[reading[0].kind]:
                reading = None, f"{SWITCHES[reading[0].kind]}=False"
        if reading[0] is not None:
            check_treatable(found.name, found.parameter)
            if conv == "operator" and found.name not in ruled and is_conv_weight(found):
                if is_dtensor(found.parameter):  # before a forward pass, whose error would say less
                    refuse_sharded_operator(found.name)
                assert isinstance(model, nn.Module) and input_size is not None
                calls = conv_input_sizes(model, input_size) if calls is None else calls
                reading = read_as_operator(found, reading, calls)
        module, attribute, _ = found.owners[0]
        held = found.parameter if module is None else None
        layout, reason = reading
        entry = Entry(found.name, module, attribute, held, layout, tuple(found.parameter.shape), reason)
        entry.ties = tuple(owner for owner in found.owners[1:] if owner.module is not module)
        entries.append(entry)
    if all(entry.layout is None for entry in entries):
        reasons = "; ".join(reason for reason, _ in Counter(entry.reason for entry in entries).most_common(3))
        remedy = "Name a parameter in rules, or leave out less"
        raise ValueError(expected("at least one parameter to treat", f"{len(entries)} left out ({reasons})", remedy))
    _set_targets(entries, target, parameters)
    _set_strengths(entries, strength, parameters)
    return entries


def format_table(
    entries: Sequence[Entry],
    sigmas: Mapping[str, Sequence[float]] | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """The entries as an aligned plain-text table with a line of totals under it.

    Arguments:
        entries: from `discover`.
        sigmas: parameter name to the sigmas of its parts; several are shown as min..max.
        notes: parameter name to a word added to the reason, such as "frozen".
    """
    sigmas, notes = sigmas or {}, notes or {}
    treated = [entry for entry in entries if entry.layout is not None]
    with_strength = len({entry.strength for entry in treated}) > 1
    rows = [["parameter", "treated as", "shape", "target", "strength", "sigma", "reason"]]
    for e in entries:
        has_target = e.layout is not None and e.layout.kind in (Kind.MATRIX, Kind.SCALE)
        rows.append(
            [
                e.name,
                e.treated_as,
                "x".join(map(str, e.shape)) or "scalar",
                f"{e.target:g}" if has_target else "-",
                f"{e.strength:g}" if e.layout is not None else "-",
                _show_sigmas(sigmas.get(e.name, ())),
                f"{e.reason}; {notes[e.name]}" if e.name in notes else e.reason,
            ]
        )
    kept = [i for i, title in enumerate(rows[0]) if with_strength or title != "strength"]
    widths = [max(len(row[i]) for row in rows) for i in kept]
    lines = ["  ".join(row[i].ljust(width) for i, width in zip(kept, widths, strict=True)).rstrip() for row in rows]
    totals = dict.fromkeys((OPERATOR, *NOUNS.values()), 0)
    for e in treated:
        if e.layout is not None:
            totals[nouns(e.layout)] += e.layout.parts
    counts = ", ".join(f"{n} {noun[n != 1]}" for noun, n in totals.items() if n)
    return "\n".join([*lines, "", f"{len(treated)} of {len(entries)} parameters: {counts or 'nothing treated'}"])


def _show_sigmas(sigmas: Sequence[float]) -> str:
    shown = [f"{sigma:.4g}" for sigma in sigmas]
    if len(shown) < 2:
        return shown[0] if shown else "-"
    # min and max skip a NaN or not depending on its place.
    return "nan" if "nan" in shown else f"{min(sigmas):.4g}..{max(sigmas):.4g}"


def _check_conv(model: Model, conv: str, input_size: InputSize | None) -> None:
    if conv not in ("reshape", "operator"):
        raise ValueError(expected("conv to be 'reshape' or 'operator'", repr(conv), "Name one of these"))
    if conv == "reshape":
        if input_size is not None:
            remedy = "Add conv='operator', or leave input_size out"
            raise ValueError(expected("no input_size with conv='reshape'", repr(input_size), remedy))
    elif not isinstance(model, nn.Module):
        got = f"{type(model).__name__}, which tells nothing of the layers"
        raise TypeError(expected("a module with conv='operator'", got, "Pass the model itself"))
    elif input_size is None:
        remedy = "Give the shape of an input without its batch dimension, as input_size=(3, 224, 224)"
        raise ValueError(expected("an input_size with conv='operator'", "none", remedy))


def _apply_rule(found: Found, pattern: Pattern, rule: Rule) -> Reading:
    layout = layout_of(rule, found.name, found.parameter.shape, recognise(found)[0])
    return layout, f"rule {show(pattern)}" + (": skip" if layout is None else "")


def _split_with_weight(found: Found, reading: Reading, rule_of: Mapping[str, tuple[Found, Rule]]) -> Reading:
    """A bias is split exactly as its weight: where a rule splits the weight, the bias follows."""
    layout, reason = reading
    if layout is None or layout.kind is not Kind.BIAS:
        return reading
    for owner in found.owners:
        prefix, dot, attribute = owner.name.rpartition(".")
        weight, rule = rule_of.get(prefix + dot + attribute.replace("bias", "weight"), (None, None))
        if weight is None or rule is None or rule.kind != "matrix":
            continue
        natural = recognise(weight)[0]
        ruled = layout_of(rule, weight.name, weight.parameter.shape, natural)
        assert ruled is not None
        if natural is not None and ruled[1:3] == natural[1:3]:
            return reading
        parts = ruled.parts if ruled.split_dim == ruled.row_dim else 1
        split = layout_of(Rule("bias", split=(parts, 0)), found.name, found.parameter.shape, None)
        return reading if split == layout else (split, f"{reason}; cut as its weight, by rule")
    return reading


def _set_targets(
    entries: Sequence[Entry], target: float | Mapping[Pattern, float], parameters: Sequence[Found]
) -> None:
    chosen: dict[str, float] = {}
    of_kind = {Kind.MATRIX: 1.0, Kind.SCALE: 1.0}
    if isinstance(target, Mapping):
        chosen = match_numbers("target", target, parameters)
        for pattern in target:
            names = match("target", pattern, parameters)
            kinds = {entry.layout.kind for entry in entries if entry.layout is not None and entry.name in names}
            if kinds and not kinds & of_kind.keys():
                condition, remedy = "to match a matrix or a scale", "Biases and shifts go to 0 and have no target"
                raise ValueError(expected(f"every pattern of target {condition}", show(pattern), remedy))
    else:
        of_kind[Kind.MATRIX] = number("target", target)
    for entry in entries:
        if entry.layout is not None and entry.layout.kind in of_kind:
            entry.target = chosen.get(entry.name, of_kind[entry.layout.kind])


def _set_strengths(
    entries: Sequence[Entry], strengths: Mapping[Pattern, float] | None, parameters: Sequence[Found]
) -> None:
    if strengths is None:
        return
    chosen = match_numbers("strength", strengths, parameters)
    for entry in entries:
        if entry.layout is not None and entry.name not in chosen:
            condition = "strength to cover every treated parameter"
            raise ValueError(expected(condition, f"no pattern for {entry.name!r}", "Add a '*' pattern"))
        entry.strength = chosen.get(entry.name, 1.0)
