"""The command `spectral-ops`. Each subcommand is imported when it is called, so that one's extras are not another's."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata

# name: (module whose `main` tyro turns into options, what it does, the extra it needs)
COMMANDS = {
    "doctor": ("spectral_ops.doctor", "what is built and usable on this machine, and whether it computes right", ""),
    "bench": ("spectral_ops.benchmark", "the benchmarks of a checkout, and their roofline as a picture", "continual"),
    "scale": ("spectral_ops.scale", "vision transformers from S to 22B: measured, and predicted by ranks", "continual"),
    "demo": ("spectral_ops.demo", "loss of plasticity on real images, and what prevents it", "continual"),
    "train": ("spectral_ops.continual.train", "one network on one stream of tasks by one method", "continual"),
    "compare": ("spectral_ops.continual.compare", "methods by seeds, over several processes", "continual"),
    "sweep": ("spectral_ops.continual.sweep", "strengths by learning rates, equal trials for each method", "continual"),
    "ablate": ("spectral_ops.continual.ablate", "which parts of the spectral penalty matter", "continual"),
    "report": ("spectral_ops.continual.report", "tables and pictures of runs, from their logs", "continual"),
    "download": ("spectral_ops.continual.data.download", "a data set into the folders torchvision writes", "continual"),
}
BROKEN_PIPE = 141  # as a shell shows a process that SIGPIPE ended


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text, _) in COMMANDS.items()]
    last = "`spectral-ops COMMAND --help` lists its options."
    return "\n".join(["usage: spectral-ops COMMAND [options]", "", *lines, "", last])


def _find_modules_here() -> None:
    """Methods of one's own in the working directory are found by the script, as `python -m spectral_ops` finds them.

    After everything else, unlike there, so that a file called random.py does no harm. Workers take the path over.
    """
    if not getattr(sys.flags, "safe_path", False) and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of `spectral-ops *argv`; argv defaults to the process's own arguments."""
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()  # now, where it can be caught, and not when the interpreter ends
    except BrokenPipeError:  # of `spectral-ops ... | head`: nobody reads on
        if not _nobody_reads():
            raise
        return BROKEN_PIPE


def _nobody_reads() -> bool:
    """Whether it is standard output that broke, which is then led nowhere: the interpreter flushes it once more."""
    try:
        print(flush=True)  # a flush alone says nothing where there is no buffer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _main(argv: Sequence[str] | None) -> int:
    if argv is None:
        _find_modules_here()
    name, *options = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(metadata.version("spectral_ops"))
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        remedy = f"The nearest is {near[0]!r}." if near else "Name one of these."
        known = ", ".join(COMMANDS)
        print(f"spectral-ops: expected one of {known}, got {name!r}. {remedy}\n\n{usage()}", file=sys.stderr)
        return 2
    path, _, extra = COMMANDS[name]
    try:
        import tyro

        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if (error.name or "spectral_ops").partition(".")[0] == "spectral_ops":
            raise  # ours to mend, no package of that name to install
        wanted = f"In a checkout of spectral_ops: pip install '.[{extra}]'" if extra else f"pip install {error.name}"
        print(f"spectral-ops {name}: expected {error.name} to be installed, got {error}. {wanted}.", file=sys.stderr)
        return 1
    # --quick and not --config.quick, where main takes one typed configuration.
    command = tyro.conf.configure(tyro.conf.OmitArgPrefixes)(module.main)
    status = tyro.cli(command, args=options, prog=f"spectral-ops {name}")
    return status if isinstance(status, int) else 0
