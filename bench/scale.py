"""`python -m bench scale`: the ladder measured where it fits, predicted everywhere, as JSON, Markdown and a picture.

    python -m bench scale [--device cuda] [--models vit-s vit-22b] [--dtypes bfloat16] [--ranks 1 8 1024] [--quick]
    python -m bench scale --from RESULTS.json       # tables and picture anew, of the cost model as it is now
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import ladder, record, scale_table
from bench.bench_scale import CASES, MEASURED, QUICK_MODEL, Rung, resident_peak, too_large
from bench.case import DTYPES, Settings, measure
from bench.cost_model import H200_NETWORK, IMAGES_PER_RANK, check_ranks
from bench.device import Device
from bench.vit_shapes import LADDER

CPU_MODELS = ("vit-s", "vit-b", "vit-l")  # half a minute each; those beyond take gigabytes and minutes
RANKS = (1, 8, 64, 256, 1024)


def parser_of_scale() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench scale", description="The ladder of vision transformers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"{', '.join(LADDER)}; all unless given")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="to measure; both on CUDA, else float32")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="to predict for")
    parser.add_argument("--images", type=int, default=IMAGES_PER_RANK, help="of one rank and training step, assumed")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; 2 unless given")
    parser.add_argument("--quick", action="store_true", help="one narrow block, few rounds: that everything runs")
    parser.add_argument("--out", type=Path, help="folder of the results; bench/results, or --from's, unless given")
    parser.add_argument("--from", type=Path, dest="source", metavar="RESULTS", help="tables and picture of these anew")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """ValueError for what cannot be measured or predicted."""
    known = {"models": (options.models, LADDER), "dtypes": (options.dtypes, DTYPES)}
    for name, (given, all_names) in known.items():
        for value in given or ():
            if value not in all_names:
                names = ", ".join(all_names)
                raise ValueError(f"scale: expected {name} to be of {names}, got {value!r}. Name one of these.")
    if options.images < 1:
        raise ValueError(f"scale: expected images to be at least 1, got {options.images}. Give those of one rank.")
    if options.source is not None and not options.source.is_file():
        raise ValueError(f"scale: expected --from to be a results file, got {options.source}. Measure one first.")
    for ranks in options.ranks:
        check_ranks(ranks, H200_NETWORK.per_node)


def main(arguments: Sequence[str]) -> int:
    """0; 1 where a case failed: named in the results, which are written all the same."""
    parser = parser_of_scale()
    options = parser.parse_args(arguments)
    try:
        check_options(options)
        if options.source is not None:
            return redraw(options)
        settings = Settings(Device(options.device, options.threads), options.quick, dtypes=options.dtypes)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    models = [name for name in LADDER if name in (options.models or LADDER)]
    load, copy_rate = record.load_average(), settings.device.copy_rate()
    cases, left_out, failed = climb(models, settings, chosen=options.models is not None)
    results = record.gather(settings, cases, load, copy_rate, left_out | failed)
    results = ladder.with_ladder(results, models, DTYPES, sorted(set(options.ranks)), options.images)
    write(results, (options.out or ladder.RESULTS) / f"{record.file_stem(results)}-scale.json")
    return 1 if failed else 0


def climb(
    models: Sequence[str], settings: Settings, chosen: bool
) -> tuple[list[dict[str, object]], dict[str, str], dict[str, str]]:
    """The cases of all models that fit, why others are left out, and what failed.

    Args:
        chosen: the models were named: a CPU then tries more than those worth its minutes.
    """
    cases: list[dict[str, object]] = []
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    own = models if chosen or settings.on_cuda else CPU_MODELS
    if settings.quick and not chosen:
        own = (QUICK_MODEL,)
    for dtype in settings.chosen_dtypes:
        for model in models:
            if model not in own:
                left_out[f"scale/{model}/{dtype}"] = "not among those worth a CPU's minutes; --models names it"
                continue
            started = time.perf_counter()
            rung = None
            for op in MEASURED:
                name = f"scale/{op}/{model}/{dtype}"
                reason = too_large(op, model, dtype, settings, built=rung is not None)
                if reason:
                    left_out[name] = reason
                    continue
                try:
                    rung = rung or Rung(model, dtype, settings)
                    case = CASES[op](rung)
                    measured = measure(case, settings)
                    for row in measured["rows"]:
                        if row["peak_bytes"] is None:
                            row["peak_bytes"] = resident_peak(case.contenders[row["name"]].run)
                    cases.append(measured)
                    del case
                except (AssertionError, RuntimeError) as error:  # the others are still worth their minutes
                    failed[name] = f"{type(error).__name__}: {error}"
                    print(f"FAILED {name}: {failed[name]}", file=sys.stderr)
            del rung
            gc.collect()  # a model, before the next one is built
            if settings.on_cuda:
                torch.cuda.empty_cache()
            print(f"{model}/{dtype}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return cases, left_out, failed


def redraw(options: argparse.Namespace) -> int:
    results = record.read(options.source)
    models = [name for name in LADDER if name in (options.models or LADDER)]
    results = ladder.with_ladder(results, models, DTYPES, sorted(set(options.ranks)), options.images)
    write(results, options.source if options.out is None else options.out / options.source.name)
    return 0


def write(results: record.Results, path: Path) -> None:
    record.write(results, path)
    path.with_suffix(".md").write_text(scale_table.as_markdown(results))
    print(scale_table.as_text(results))
    print(f"\n{path}")
    try:
        from bench import scale_plot
    except ModuleNotFoundError as error:  # the tables stand
        print(f"no picture: {error}", file=sys.stderr)
        return
    picture = path.with_suffix(".png")
    scale_plot.draw(results, picture)
    print(picture)
