"""How runs are configured on a command line: a preset or a TOML file, and options that count before it.

A preset is a TOML file in presets/, named after its experiment. Both hold fields of RunConfig:

    stream = "random-labels"
    lr = 3e-3
    [options]
    target = 2.0
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, make_dataclass
from pathlib import Path
from typing import Any

from spectral_ops.continual.choices import check_options, choose, parse_options
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.described import with_help
from spectral_ops.continual.field_texts import field_texts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"
# What is named, and the table of its options.
OPTIONS_OF = {"stream": "stream_options", "model": "model_options", "method": "options"}


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _settings_class() -> type:
    """RunConfig with every field optional, so that what is not given may come from elsewhere."""
    hints, texts, made = typing.get_type_hints(RunConfig), field_texts(RunConfig), []
    made.append(_field("preset", str, f"A preset: {', '.join(preset_names())}."))
    made.append(_field("config", Path, "A TOML file with fields of a run; counts before the preset."))
    for field in fields(RunConfig):
        kind, text, default = hints[field.name], texts[field.name], None
        if kind == dict[str, Any]:
            kind, text = tuple[str, ...], f"{text} As name=value."
        elif field.default is not MISSING:
            default = field.default
        made.append(_field(field.name, kind, text, "" if default is None else f"(default: {default})"))
    return make_dataclass("Settings", made, frozen=True, kw_only=True)


def _field(name: str, kind: Any, text: str, hint: str = "") -> tuple[str, Any, Any]:
    optional = kind if typing.get_args(kind)[-1:] == (type(None),) else kind | None
    return name, with_help(optional, text, hint), None


def resolve(settings: Any, file: Mapping[str, Any] | None = None, **overrides: Any) -> RunConfig:
    """The configuration: what is given on the command line, else in the TOML file, else in the preset, else defaults.

    Args:
        file: the fields of a run in `settings.config`, where that holds more than those and has been read; None: read
            it.

    Raises:
        ValueError, TypeError: an unknown preset, field or option, or a value of another type.
        FileNotFoundError: no such file.
    """
    content: dict[str, Any] = {}
    if settings.preset is not None:
        known = {name: PRESETS / f"{name}.toml" for name in preset_names()}
        content |= read_toml(choose("preset", settings.preset, known))
    if file is not None:
        content |= file
    elif settings.config is not None:
        content |= read_toml(settings.config)
    for name, table in OPTIONS_OF.items():
        given = getattr(settings, name)
        if name == "method" and name not in content:
            continue  # none takes no options: those of a file without a method are of the one that is named now
        if given is not None and given != content.get(name, getattr(RunConfig, name)):
            content.pop(table, None)  # of another stream, network or method than the one that is named now
            if name == "method":
                content.pop("strength", None)  # an option like any other, with a place of its own
    for field in fields(RunConfig):
        value = getattr(settings, field.name)
        if value is None:
            continue
        is_table = isinstance(value, tuple)
        content[field.name] = {**content.get(field.name, {}), **parse_options(value)} if is_table else value
    return RunConfig(**(content | overrides))


def read_toml(path: Path) -> dict[str, Any]:
    """Fields of RunConfig in a TOML file, checked."""
    return checked(load_toml(path), f"config {path}")


def load_toml(path: Path) -> dict[str, Any]:
    """All that is in a TOML file."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise type(error)(
            f"config: expected {path} to be a file that can be read, got {error.strerror or error}. Change --config."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: expected {path} to be TOML, got {error}. Correct the file.") from error


def checked(content: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Fields of RunConfig with values of their types."""
    tables = {name: value for name, value in content.items() if isinstance(value, dict)}
    for name in tables:
        if name not in ("options", "model_options", "stream_options"):
            raise ValueError(
                f"{what}: expected tables options, model_options, stream_options, got {name!r}. Rename it."
            )
    simple = {name: value for name, value in content.items() if name not in tables}
    if "data_root" in simple:
        root = simple["data_root"]
        if not isinstance(root, str | Path):
            raise TypeError(f'{what}: expected data_root to be text, got {root!r}. Write data_root = "/path".')
        simple["data_root"] = Path(root)
    return check_options(what, RunConfig, simple) | tables


Settings: Any = _settings_class()
