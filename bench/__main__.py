"""`python -m bench`: measures every case, prints the tables, and stores them as JSON and Markdown.

    python -m bench [--quick | --full] [--device cpu] [--only accumulate_grad] [--models vit-b] [--dtypes bfloat16]
    python -m bench plot RESULTS.json [PICTURE.png]
    python -m bench roofline RESULTS.json [PICTURE.png]
    python -m bench compare A.json B.json
    python -m bench scale [--models vit-22b] [--ranks 1 8 1024]
    python -m bench tune "strips=ops.cut.MAX_STRIP_BYTES=1048576" ["NAME=..." ...] [--models vit-l]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `python bench`, or PYTHONSAFEPATH: last, so that an installed spectral_ops goes first
    sys.path.append(str(ROOT))

from bench import (  # noqa: E402
    bench_accumulate_grad,
    bench_adamw,
    bench_conv,
    bench_power_iteration,
    bench_spectral_norm,
    bench_spectral_penalty,
    bench_trainer,
    bench_training_step,
    bench_workers,
    compare,
    models,
    record,
    scale,
    table,
    tune,
)
from bench.case import DISAGREES, DTYPES, Settings, measure  # noqa: E402
from bench.device import Device  # noqa: E402

# In the order of what must be shown first, should a run's minutes end early.
OPS = {
    module.OP: module
    for module in (
        bench_accumulate_grad,
        bench_adamw,
        bench_spectral_penalty,
        bench_training_step,
        bench_spectral_norm,
        bench_power_iteration,
        bench_conv,
        bench_trainer,
        bench_workers,
    )
}
# `make gpu` builds, tests and measures within eight minutes; this is the share of measuring.
CUDA_MINUTES = 6.0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"plot": run_plot, "roofline": run_roofline, "compare": run_compare, "tune": run_tune}
    commands["scale"] = scale.main
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return run_measure(arguments)


def parser_of_measure() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench", description="Measure. Also: python -m bench plot | roofline | compare | scale | tune."
    )
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: that everything runs")
    parser.add_argument("--full", action="store_true", help="with everything that compiles for minutes; no time limit")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; 2 unless given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=list(OPS), choices=list(OPS), metavar="OP", help=", ".join(OPS))
    known = (*models.NAMES, bench_training_step.CPU_MODEL)
    parser.add_argument("--models", nargs="+", choices=known, metavar="MODEL", help=", ".join(known))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help="both on CUDA, else float32")
    minutes = f"no case is begun after; {CUDA_MINUTES:g} on CUDA, else no limit"
    parser.add_argument("--minutes", type=float, help=minutes)
    parser.add_argument("--roofline", action="store_true", help="draw the picture beside the results, too")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    return parser


def run_measure(arguments: Sequence[str]) -> int:
    """0; 1 where a case failed or a contender was wrong: named in the results, which are written all the same."""
    parser = parser_of_measure()
    options = parser.parse_args(arguments)
    try:
        device = Device(options.device, options.threads)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    minutes = options.minutes
    if minutes is None and options.device == "cuda" and not options.full:
        minutes = CUDA_MINUTES
    deadline = None if minutes is None else time.perf_counter() + 60 * minutes
    settings = Settings(device, options.quick, options.full, options.models, options.dtypes, deadline)
    todo = [(f"{op}/{name}", build) for op in options.only for name, build in OPS[op].cases(settings)]
    if not todo:
        parser.error("expected --only, --models and --dtypes to leave a case, got none. Give fewer of them.")
    load, copy_rate = record.load_average(), device.copy_rate()
    measured, failed, late = [], {}, {}
    for name, build in todo:
        if settings.remaining_s <= 0:
            late[name] = f"the {minutes:g} minutes of this run were over; --minutes gives more, --only chooses"
            continue
        started = time.perf_counter()
        try:
            measured.append(measure(build(), settings))
        except (AssertionError, RuntimeError) as error:  # the others are still worth their minutes
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"FAILED {name}: {failed[name]}", file=sys.stderr)
        gc.collect()  # a model and its compiled code, before the next one is built
        if settings.on_cuda:
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    results = record.gather(settings, measured, load, copy_rate, failed | late)
    path = options.out / f"{record.file_stem(results)}.json"
    record.write(results, path)
    path.with_suffix(".md").write_text(table.as_markdown(results))
    print(table.as_text(results))
    print(f"\n{path}")
    if options.roofline:
        try:
            run_roofline([str(path)])
        except ValueError as error:  # ops without a roof alone: the tables stand
            print(f"no picture: {error}", file=sys.stderr)
    wrong = any(reason.startswith(DISAGREES) for case in measured for reason in case["left_out"].values())
    return 1 if failed or wrong else 0


def run_roofline(arguments: Sequence[str]) -> int:
    from bench import roofline

    parser = argparse.ArgumentParser("python -m bench roofline", description="Draw GB/s over bytes.")
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="PNG; beside the results unless given")
    options = parser.parse_args(arguments)
    picture = options.picture or options.results.with_name(f"{options.results.stem}-roofline.png")
    roofline.draw(record.read(options.results), picture)
    print(picture)
    return 0


def run_plot(arguments: Sequence[str]) -> int:
    from bench import plot  # matplotlib, which measuring does not need

    parser = argparse.ArgumentParser("python -m bench plot", description="Draw a results file.")
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="PNG; beside the results unless given")
    options = parser.parse_args(arguments)
    picture = options.picture or options.results.with_suffix(".png")
    plot.draw(record.read(options.results), picture)
    print(picture)
    return 0


def run_compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench compare", description="Compare two results files.")
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    options = parser.parse_args(arguments)
    print(compare.as_text(record.read(options.a), record.read(options.b)))
    return 0


def run_tune(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench tune", description=tune.__doc__)
    parser.add_argument("variants", nargs="+", metavar="NAME=MODULE.CONSTANT=VALUE", help="constants of spectral_ops")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--op", choices=tune.OPS, default=tune.OPS[0], help="what is timed")
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds: that everything runs")
    parser.add_argument("--models", nargs="+", choices=models.CUDA_MODELS, default=["vit-l"], metavar="MODEL")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    options = parser.parse_args(arguments)
    try:
        variants = [tune.parse(text) for text in options.variants]
    except ValueError as error:
        parser.error(str(error))
    cases = [(model, dtype) for model in options.models for dtype in options.dtypes]
    print(tune.run(variants, options.device, options.quick, cases, options.op))
    return 0


if __name__ == "__main__":
    sys.exit(main())
