"""Variants of a run: what a method of a comparison sets besides what all share, as text or as a table of a TOML file.

spectral,strength=1e-3,target=2,model_options.norm=layer

[[methods]]
method = "spectral"
strength = 1e-3
target = 2.0
model_options = { norm = "layer" }
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spectral_ops.continual.choices import parse_options
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.jobs import Job
from spectral_ops.continual.methods import Context, find_method
from spectral_ops.continual.models import build_model
from spectral_ops.continual.run_folder import check_folder
from spectral_ops.continual.settings import checked, load_toml, resolve
from spectral_ops.continual.streams import Stream
from spectral_ops.continual.trainer import check, make_optimizer, make_stream, method_options

OWN = ("strength", "lr", "optimizer", "momentum", "model")  # fields of a run that a variant may set
TABLES = ("options", "model_options")
BY_VARIANT = ("method", "strength", "options", "seed")  # what a comparison gives each of its runs
REPORT_SEED = 10  # seeds from here on are reported; those below choose strengths and learning rates
REPORT = "report"  # the folder beside those of the variants
_LABEL = 80  # characters of a label: it is the name of a folder

Table = dict[str, Any]


class Variant(NamedTuple):
    """Fields of RunConfig that differ from the others', under a name that no other has and that a folder may have."""

    label: str
    fields: Table

    def config(self, base: RunConfig, seed: int) -> RunConfig:
        """The run of this variant. Options of the network add to those of `base` where it is the same network."""
        shared = base if self.fields.get("model", base.model) == base.model else replace(base, model_options={})
        tables = {name: {**getattr(shared, name), **self.fields[name]} for name in TABLES if name in self.fields}
        return replace(shared, **{**self.fields, **tables, "seed": seed})


def parse_variant(text: str) -> Table:
    """The table that says the same as `text`: {"method": "l2", "strength": 1e-4} for "l2,strength=1e-4".

    A part without "=" belongs to the value before it: "l2,model_options.hidden=100,100" has one list.
    """
    method, *parts = text.split(",")
    if "=" in method:
        remedy = "Its method comes first, with a comma between and no space: l2,strength=1e-4"
        raise ValueError(f"methods: expected name,key=value,..., got {text!r}. {remedy}.")
    settings: list[str] = []
    for part in parts:
        if "=" in part:
            settings.append(part)
        elif settings:
            settings[-1] += f",{part}"
        else:
            raise ValueError(
                f"methods: expected name,key=value,..., got {text!r}. Write for instance l2,strength=1e-4."
            )
    table: Table = {"method": method}
    for setting in settings:
        path, _, value = setting.partition("=")
        of, _, name = path.rpartition(".")
        parsed = parse_options([f"{name}={value}"])
        if of:
            table.setdefault(of, {}).update(parsed)
        else:
            table.update(parsed)
    return table


def fields_of(table: Mapping[str, Any]) -> Table:
    """The fields of RunConfig that a table sets; what is no such field is an option of the method.

    Raises:
        ValueError: no method, or a field that the methods of a comparison share, such as the stream.
        TypeError: a value of another type.
    """
    method = table.get("method")
    if not isinstance(method, str) or not method:
        raise ValueError(f"methods: expected each to name its method, got {dict(table)}. Give it a key method.")
    what = f"method {method}"
    known = {field.name for field in fields(RunConfig)} - set(TABLES) - {"method"}
    shared = known - set(OWN)
    content: Table = {"method": method}
    options: Table = {}
    for name, value in table.items():
        if name in shared:
            raise ValueError(
                f"{what}: expected {name} to be the same for all methods, got {name}={value!r}. Set it for all of them "
                f"with --{name.replace('_', '-')}; an option of the method of that name is options.{name}."
            )
        if name in OWN:
            content[name] = value
        elif name in TABLES:
            _table(what, name, value)
            (options if name == "options" else content.setdefault(name, {})).update(value)
        elif name not in ("method", "label"):
            options[name] = value
    if options:
        content["options"] = options
    return checked(content, what)


def named(tables: Iterable[Mapping[str, Any]]) -> list[Variant]:
    """Variants with labels: a table's own, or what it sets, e.g. "l2,strength=0.0001"; a number tells equal ones apart.

    They differ in more than the case of letters, which some file systems do not see.
    """
    variants: list[Variant] = []
    used = {REPORT}
    for table in tables:
        content = fields_of(table)
        wanted = _as_name(str(table.get("label") or describe(content)))
        label, number = wanted, 1
        while label.lower() in used:
            number += 1
            label = f"{wanted}-{number}"
        used.add(label.lower())
        variants.append(Variant(label, content))
    return variants


def describe(content: Mapping[str, Any]) -> str:
    """What fields of RunConfig set, in a line: the method's name (of a class without its module), then the rest."""
    parts = [content["method"].rpartition(":")[2]]
    parts += [f"{name}={_show(content[name])}" for name in OWN if name in content]
    for name in TABLES:
        parts += [f"{key}={_show(value)}" for key, value in content.get(name, {}).items()]
    return ",".join(parts)


def read_file(path: Path) -> tuple[Table, list[Table], list[int]]:
    """A TOML file with fields of RunConfig, `methods` (tables or texts) and `tuning_seeds`, each of them optional."""
    content = load_toml(path)
    methods, seeds = content.pop("methods", []), content.pop("tuning_seeds", [])
    if not isinstance(methods, list) or not all(isinstance(method, dict | str) for method in methods):
        raise ValueError(
            f"config {path}: expected methods to be tables [[methods]], got {methods!r}. Correct the file."
        )
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"config {path}: expected tuning_seeds to be integers, got {seeds!r}. Correct the file.")
    for name in content:
        if name in BY_VARIANT:
            raise ValueError(
                f"config {path}: expected {name} within [[methods]] or as --seeds, got it for all. Move it there."
            )
    tables = [parse_variant(method) if isinstance(method, str) else method for method in methods]
    return checked(content, f"config {path}"), tables, seeds


def resolve_shared(settings: Any) -> tuple[RunConfig, list[Table], list[int]]:
    """What all variants share, as `resolve` has it, and the methods and tuning seeds of the file, if it names any."""
    if settings.config is None:
        return resolve(settings), [], []
    content, methods, seeds = read_file(settings.config)
    return resolve(settings, content), methods, seeds


def resolve_methods(settings: Any) -> tuple[RunConfig, list[Table], list[int]]:
    """As `resolve_shared`, with the methods of --methods where the file names none.

    Raises:
        ValueError: both name methods.
    """
    base, tables, seeds = resolve_shared(settings)
    if tables and settings.methods:
        raise ValueError(f"methods: expected them once, got --methods and those of {settings.config}. Drop one.")
    return base, tables or [parse_variant(text) for text in settings.methods], seeds


def plan_jobs(base: RunConfig, variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> list[Job]:
    """A job for each variant and seed, in out/<label>/seed-<n>; all variants of a seed before the next seed.

    A seed decides the stream and the initial weights, so that variants are compared on the same ones.

    Raises:
        ValueError: no variant or seed, or the same one twice.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds: expected distinct ones >= 0, got {tuple(seeds)}. Change --seeds.")
    if not variants:
        raise ValueError("methods: expected at least one, got none. Give --methods, e.g. none l2,strength=1e-4.")
    runs: list[tuple[str, RunConfig]] = []
    for variant in variants:
        config = variant.config(base, seeds[0])
        twin = next((label for label, other in runs if other == config), None)
        if twin is not None:
            raise ValueError(
                f"methods: expected different ones, got {variant.label} and {twin}, which are the same run. Drop one."
            )
        runs.append((variant.label, config))
    return [
        Job(variant.label, variant.config(base, seed), out / variant.label / f"seed-{seed}")
        for seed in seeds
        for variant in variants
    ]


def check_jobs(jobs: Sequence[Job]) -> Stream:
    """Refuses before anything has run what would make runs fail: names, options, data, folders of something else.

    The data are read once, and every method is built once with each network and each of its options. Returned is the
    first job's stream, whose images are of the size of all.
    """
    for job in jobs:
        check(job.config)
        check_folder(job.folder, job.config, resume=True)
    stream = make_stream(jobs[0].config)
    built: list[tuple[Any, ...]] = []
    for config in (job.config for job in jobs):
        options = method_options(config)
        key = (config.method, options, config.model, config.model_options, config.optimizer)
        if key not in built:
            built.append(key)
            _build(config, options, stream)
    return stream


def _build(config: RunConfig, options: Table, stream: Stream) -> None:
    """Network, optimizer and method, as the trainer makes them: what they refuse is seen in no other way."""
    kind = find_method(config.method)
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.model, stream.input_shape, stream.classes, **config.model_options)
        kind.prepare(model)
        optimizer = make_optimizer(config, model)
        context = Context(
            model,
            optimizer,
            model.units(),
            model.output,
            torch.Generator(),
            lambda task: copy.deepcopy(model.state_dict()),
        )
        try:
            kind(context, **options)
        except (ValueError, TypeError, RuntimeError, OSError):  # said as all commands say it
            raise
        except Exception as error:  # of a method of one's own
            raise RuntimeError(
                f"method {config.method}: expected it to be made with the options {options}, got "
                f"{type(error).__name__}: {error}. Mend its __init__."
            ) from error


def _table(what: str, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{what}: expected {name} to be a table, got {value!r}. Write {name}.<option>=<value>.")


def _as_name(text: str) -> str:
    """The text with nothing that shells, file systems or remote paths take for something else."""
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text)[:_LABEL].strip(".,-")
    return safe or "variant"


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_show, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
