"""Runs that differ only in their seed, put together under a label that says what differs between groups."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.run_folder import NOT_OF_THE_RUN, Run

TABLES = {"options": "", "model_options": "model.", "stream_options": "stream."}  # and what their options are called
BARE = ("method", "strength")  # shown without their names, the method always
STREAM = ("stream", "data", "samples", "tasks")  # with stream_options: what decides which tasks a seed makes
# A variant of ablate under the name that it has there; it is no method by name.
CLASSES = {"spectral_ops.continual.ablate:InitialTarget": "target-initial"}
ORDER = (*BARE, "lr", *(f.name for f in fields(RunConfig) if f.name not in (*BARE, "lr")))

Settings = dict[str, Any]


class Group(NamedTuple):
    """Runs of one configuration in the order of their seeds; `settings` are flat and without the seed."""

    label: str
    settings: Settings
    runs: list[Run]

    @property
    def stream(self) -> Settings:
        """The settings that two groups must share for a seed to mean the same tasks in both."""
        return {k: _alike(v) for k, v in self.settings.items() if k in STREAM or k.startswith("stream.")}


def flat_settings(config: Settings) -> Settings:
    """{"strength": 0.1, "period": 100, "model.norm": "layer", ...}: options under names of their own."""
    out: Settings = {}
    for name in sorted(config, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        value = config[name]
        if name in TABLES and isinstance(value, dict):
            taken = {key for key in config if config[key] is not None}  # an option may be called as a setting is
            for option, item in sorted(value.items()):
                key = TABLES[name] + option
                out[f"{name}.{option}" if key in taken else key] = item
        else:
            out[name] = value
    return out


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """The groups, by method, strength, learning rate and the rest, and what is wrong with runs left out of them.

    A run of a configuration and seed that another one has already is left out: it would count twice.
    """
    grouped: dict[str, tuple[Settings, dict[int, Run]]] = {}
    problems = []
    for run in runs:
        config = {k: v for k, v in run.config.items() if k != "seed" and k not in NOT_OF_THE_RUN}
        key = json.dumps(_alike(config), sort_keys=True)
        settings, of_seed = grouped.setdefault(key, (flat_settings(config), {}))
        seed = run.config["seed"]
        if seed in of_seed:
            problems.append(
                f"report: expected one run of a configuration and seed, got {of_seed[seed].folder} and {run.folder}. "
                "The second is left out; name one of them."
            )
        else:
            of_seed[seed] = run
    labels = label_settings([settings for settings, _ in grouped.values()])
    groups = [
        Group(label, settings, [run for _, run in sorted(of_seed.items())])
        for label, (settings, of_seed) in zip(labels, grouped.values(), strict=True)
    ]
    return sorted(groups, key=_place), problems


def label_settings(several: Sequence[Settings]) -> list[str]:
    """For each group "spectral 0.001 lr=0.01": its method, and what else is not the same in all groups."""
    names = list(dict.fromkeys(name for settings in several for name in settings))
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    differ = [name for name in names if len({_shown(settings.get(name)) for settings in several}) > 1]
    methods = short_names(settings["method"] for settings in several)
    labels = [_label(settings, methods, [name for name in differ if name != "method"]) for settings in several]
    # Tables go by labels: should two look the same (an option "2" and 2), they are told apart by number.
    return [label + f" #{labels[:i].count(label) + 1}" * (labels.count(label) > 1) for i, label in enumerate(labels)]


def short_names(methods: Iterable[str]) -> dict[str, str]:
    """Class for package.module:Class, unless another of them is called so too."""
    full = set(methods)
    short = {method: CLASSES.get(method, method.rpartition(":")[2]) for method in full}
    taken = list(short.values())
    return {method: name if taken.count(name) == 1 else method for method, name in short.items()}


def _label(settings: Settings, methods: Mapping[str, str], names: Sequence[str]) -> str:
    words = [methods[settings["method"]]]
    for name in names:
        value = settings.get(name)
        if value is not None:
            words.append(_shown(value) if name in BARE else f"{name}={_shown(value)}")
    return " ".join(words)


def _alike(value: Any) -> Any:
    """What two files or command lines may write differently and mean the same: 2 and 2.0, 100 and [100]."""
    if isinstance(value, dict):
        return {name: _alike(item) for name, item in value.items()}
    if isinstance(value, list):
        return _alike(value[0]) if len(value) == 1 else [_alike(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return ",".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _place(group: Group) -> tuple[Any, ...]:
    """`none` first, then by name; numbers by size."""
    method, strength, lr = (group.settings.get(name) for name in ("method", "strength", "lr"))
    return method != "none", method, strength is not None, strength or 0.0, lr or 0.0, group.label
