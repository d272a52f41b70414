"""Help of options as tyro shows it: the text under a field in one piece, one default, and what a value looks like."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union

import tyro

from spectral_ops.continual.field_texts import field_texts

Class = TypeVar("Class", bound=type)

METAVARS = {
    str: "STR",
    int: "INT",
    float: "FLOAT",
    Path: "PATH",
    tuple[str, ...]: "[NAME=VALUE ...]",
}


def described(**more: str) -> Callable[[Class], Class]:
    """A decorator under @dataclass: gives tyro the texts under the fields, whose indented lines it would not join.

    An optional field takes no {None} and shows no default: its text says what None means.

    Args:
        more: what is only known to the program, to be said after the text of the field of that name.
    """

    def decorate(cls: Class) -> Class:
        hints, texts = typing.get_type_hints(cls, include_extras=True), field_texts(cls)
        own = dict(inspect.get_annotations(cls))
        for name, text in texts.items():
            empty = cls.__dict__.get(name, ...) in (None, ())  # no default to show
            own[name] = with_help(hints[name], f"{text} {more.get(name, '')}", "" if empty else None)
        cls.__annotations__ = own
        return cls

    return decorate


def with_help(kind: Any, text: str, hint: str | None = None) -> Any:
    """The annotation with its text; `hint` stands in the place of tyro's own "(default: ...)"."""
    bare = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    alternatives = typing.get_args(bare) if typing.get_origin(bare) in (Union, UnionType) else ()
    metavar = None
    if len(alternatives) == 2 and NoneType in alternatives:
        metavar = METAVARS[next(one for one in alternatives if one is not NoneType)]
    return Annotated[kind, tyro.conf.arg(help=" ".join(text.split()), metavar=metavar, help_behavior_hint=hint)]
