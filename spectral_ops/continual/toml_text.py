"""Values as TOML writes them: the standard library only reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def toml_lines(content: Mapping[str, Any]) -> list[str]:
    """A line `key = value` for each entry; mappings become inline tables.

    Raises:
        ValueError: None, which TOML has no word for.
        TypeError: a value of another kind.
    """
    return [f"{_key(name)} = {_value(name, value)}" for name, value in content.items()]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(name, item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(toml_lines(value))} }}" if value else "{}"
    if value is None:
        raise ValueError(f"toml: expected {name} to have a value, got None. Leave it out.")
    raise TypeError(f"toml: expected {name} to be text, a number, a list or a table, got {type(value).__name__}.")
