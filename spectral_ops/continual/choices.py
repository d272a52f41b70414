"""Names and options that a user chooses: an unknown one is an error that lists the known ones and the nearest."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar, Union

Value = TypeVar("Value")


def choose(what: str, name: str, known: Mapping[str, Value]) -> Value:
    """known[name]; `what` says in the error what was to be named, e.g. "model".

    Example:
        choose("model", "mpl", {"mlp": 1, "vit": 2})   # ValueError: model: expected one of mlp, vit, got 'mpl'. ...
    """
    if name in known:
        return known[name]
    raise ValueError(f"{what}: expected one of {', '.join(known)}, got {name!r}. {remedy(name, known)}")


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword arguments with a default: what a user may set."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.default is not p.empty}


def check_options(
    what: str, function: Callable[..., Any], options: Mapping[str, Any], set_elsewhere: Collection[str] = ()
) -> dict[str, Any]:
    """The options, each converted to the type that `function` annotates it with where nothing is lost by it.

    An int is taken for a float, a list for a tuple, a single value for a tuple of one. Keyword arguments in
    `set_elsewhere` are no options.

    Raises:
        ValueError: an option that `function` has no keyword argument for, or none of the texts that it may be.
        TypeError: a value of another type.
    """
    known = {name: p for name, p in options_of(function).items() if name not in set_elsewhere}
    for name in options:
        if name not in known:
            if not known:
                raise ValueError(f"{what}: expected no options, got {name!r}. It takes no options: leave it out.")
            raise ValueError(f"{what}: expected options among {', '.join(known)}, got {name!r}. {remedy(name, known)}")
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    return {name: _convert(what, name, value, hints.get(name, Any)) for name, value in options.items()}


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Options written on a command line: ("period=100", "norm=layer") is {"period": 100, "norm": "layer"}."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"options: expected name=value, got {text!r}. Write for instance period=100.")
        options[name] = _parse(value)
    return options


def _parse(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if "," in text:
        return [_parse(part) for part in text.split(",") if part]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def remedy(name: str, known: Iterable[str]) -> str:
    """What an error about a name says at its end."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"The nearest is {near[0]!r}." if near else "Name one of these."


def _convert(what: str, name: str, value: Any, hint: Any) -> Any:
    if value is None and str in _alternatives(hint) and type(None) not in _alternatives(hint):
        value = "none"  # a command line's none is None, but here a name, as of a norm
    for kind in _alternatives(hint):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any or (origin is typing.Literal and value in arguments):
            return value
        if origin is tuple:
            items = value if isinstance(value, list | tuple) else (value,)
            return tuple(_convert(what, name, item, arguments[0]) for item in items)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(kind, type) and isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return value
    literals = [kind for kind in _alternatives(hint) if typing.get_origin(kind) is typing.Literal]
    listed = [str(item) for kind in literals for item in typing.get_args(kind)]
    shown = " or ".join(map(_shown, _alternatives(hint)))
    if listed and isinstance(value, str):
        raise ValueError(f"{what}: expected option {name} to be {shown}, got {value!r}. {remedy(value, listed)}")
    raise TypeError(
        f"{what}: expected option {name} to be {shown}, got {value!r} of type {type(value).__name__}. "
        f"Write {name}= and a value of that kind."
    )


def _shown(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return getattr(kind, "__name__", str(kind))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)
