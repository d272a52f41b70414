"""Real training of a vision transformer, on one device or many: what a penalty costs, in images per second and memory.

    torchrun --nproc-per-node 8 bench/train_vit.py --model vit-l --penalty none l2 usual accumulate spectral-adamw \\
        --data tiny-imagenet --steps 200 --checkpoint runs/vit-l --resume --out vit-l.json

FSDP2, bfloat16 and torch.compile unless told otherwise; NCCL on CUDA, gloo on CPUs. Several penalties train in turns,
each a model of its own from the same weights on the same batches, so that their ratios are of the same minutes. A run
that was killed goes on with --resume from its newest checkpoint, on another number of processes too. One process needs
no torchrun.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # last, so that an installed spectral_ops goes first
    sys.path.append(str(ROOT))

from bench import record  # noqa: E402
from bench.device import Device  # noqa: E402
from bench.timing import Rounds, summarise  # noqa: E402
from bench.vit_training.data import Batches, load  # noqa: E402
from bench.vit_training.loop import Training, train, warm_up  # noqa: E402
from bench.vit_training.memory import memory_of  # noqa: E402
from bench.vit_training.network import patch_of, shard_of  # noqa: E402
from bench.vit_training.options import Options, parse  # noqa: E402
from bench.vit_training.penalties import NOTES  # noqa: E402
from bench.vit_training.processes import Processes, processes  # noqa: E402

FORMAT, VERSION = "spectral_ops ViT training", 1


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 where the options, the data or a checkpoint are not what they must be, with a line that says so."""
    try:
        options = parse(arguments)
        with processes(options) as group:
            results = run(options, group)
            if group.rank == 0:
                print(as_text(results))
                if options.out is not None:
                    write(results, options.out)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(options: Options, group: Processes) -> dict[str, Any]:
    def show(line: str) -> None:
        if group.rank == 0:
            print(line, flush=True)

    kind, patch = shard_of(options, group), patch_of(options)
    data = load(options)
    batches = Batches(data, options, group)
    warm_up(group)
    trainings = {name: Training(name, options, data.classes, group) for name in options.penalty}
    rounds = train(options, trainings, batches, group, show)
    commit, dirty = record.describe_commit()
    any_training = next(iter(trainings.values()))
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "device": Device(group.kind, torch.get_num_threads()).describe(),
        "versions": record.describe_versions(),
        "load": record.load_average(),
        "world": group.world,
        "shard": kind,
        "options": options.shown(),
        "model": {
            "implementation": any_training.network.origin, "parameters": any_training.parameters,
            "image": options.side, "patch": patch, "classes": data.classes,
        },
        "memory": memory_of(group.kind)[1],
        "rows": [row(name, training, rounds, options, group) for name, training in trainings.items()],
    }  # fmt: skip


def row(name: str, training: Training, rounds: Rounds, options: Options, group: Processes) -> dict[str, Any]:
    """One penalty's figures. to_base: how many times the seconds of the first penalty, turn by turn."""
    seconds = rounds.seconds[name]
    memory = {key: getattr(training.memory, key) for key in ("held", "peak")}
    return {
        "penalty": name,
        "note": NOTES[name],
        "turns": len(seconds),
        "images_per_second": asdict(summarise([options.batch / s for s in seconds])) if seconds else None,
        "to_base": asdict(rounds.ratios(name, options.penalty[0])) if seconds else None,
        # Of the process that needs most.
        **{
            f"{key}_bytes": None if value is None else int(group.largest(torch.tensor(value)).item())
            for key, value in memory.items()
        },
        "losses": training.losses,
    }


def write(results: dict[str, Any], path: Path) -> None:
    if path.suffix != ".json":
        path = path / f"{results['device']['slug']}-{results['date'][:10]}-train-vit.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def as_text(results: dict[str, Any]) -> str:
    """A table: throughput, what it is of the first penalty's, peak memory, the last loss."""
    base = results["options"]["penalty"][0]
    lines = [f"{'penalty':<16}{'images/s':>10}{f'time / {base}':>16}{'peak MiB':>10}{'loss':>9}"]
    for row in results["rows"]:
        rate, ratio, peak = row["images_per_second"], row["to_base"], row["peak_bytes"]
        lines.append(
            f"{row['penalty']:<16}"
            + (f"{rate['median']:>10.1f}{ratio['median']:>16.4f}" if rate else f"{'-':>10}{'-':>16}")
            + (f"{peak / 2**20:>10.0f}" if peak is not None else f"{'-':>10}")
            + (f"{row['losses'][-1]:>9.4f}" if row["losses"] else f"{'-':>9}")
        )
    return "\n".join([*lines, f"peak: {results['memory']}"])


if __name__ == "__main__":
    sys.exit(main())
