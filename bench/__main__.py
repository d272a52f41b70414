"""`python -m bench`: measures every case, prints the tables, and stores them as JSON and Markdown.

    python -m bench [--quick] [--threads 2] [--device cpu] [--only accumulate_grad] [--out bench/results]
    python -m bench plot RESULTS.json [PICTURE.png]
    python -m bench compare A.json B.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `python bench`, or PYTHONSAFEPATH: last, so that an installed spectral_ops goes first
    sys.path.append(str(ROOT))

from bench import (  # noqa: E402
    bench_accumulate_grad,
    bench_power_iteration,
    bench_spectral_norm,
    bench_spectral_penalty,
    compare,
    record,
    table,
)
from bench.case import Settings, measure  # noqa: E402
from bench.device import Device  # noqa: E402

OPS = {
    module.OP: module
    for module in (bench_accumulate_grad, bench_spectral_penalty, bench_power_iteration, bench_spectral_norm)
}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"plot": run_plot, "compare": run_compare}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return run_measure(arguments)


def run_measure(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench", description="Measure. Also: python -m bench plot | compare.")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; 2 unless given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=list(OPS), choices=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    options = parser.parse_args(arguments)
    settings = Settings(Device(options.device, options.threads), options.quick)
    load = record.load_average()
    measured = []
    for op in options.only:
        for build in OPS[op].cases(settings):
            started = time.perf_counter()
            case = build()
            measured.append(measure(case, settings))
            print(f"{case.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            del case  # a model and its compiled code, before the next one is built
    results = record.gather(settings, measured, load)
    path = options.out / f"{record.file_stem(results)}.json"
    record.write(results, path)
    path.with_suffix(".md").write_text(table.as_markdown(results))
    print(table.as_text(results))
    print(f"\n{path}")
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


if __name__ == "__main__":
    sys.exit(main())
