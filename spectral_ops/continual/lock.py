"""A run's folder is one process's at a time: two that write its log and checkpoints would destroy both."""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from spectral_ops.continual.run_folder import writing
from spectral_ops.continual.steps import Stopped

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"  # stays where it is: removed, it could be locked by one process and made anew by another
# Seconds. The worker of a killed parent still holds the lock: it looks for its parent between two steps and between
# two tasks, which may take some.
_PATIENCE = 15.0


@contextlib.contextmanager
def locked(folder: Path, stop: threading.Event) -> Iterator[None]:
    """Nobody else's meanwhile, in this process or another. The folder is made if need be; its lock goes with the
    process, however it ends. Where the system has no such locks, nothing is held.

    Raises:
        OSError: it is somebody else's, and still is after some seconds.
        Stopped: stop was set while waiting.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("ab")
    with opened as file:
        give_up = time.monotonic() + _PATIENCE
        said = False
        while not _take(file.fileno()):
            if time.monotonic() > give_up:
                raise OSError(
                    f"run: expected {folder} to be nobody else's, got one that another run is writing to. Wait for its "
                    "end, or end it, then give the command again."
                )
            if not said:
                print(f"run: {folder} is another run's. Waiting up to {_PATIENCE:g} s for it.", file=sys.stderr)
                said = True
            if stop.wait(0.1):
                raise Stopped
        yield  # closing the file gives the lock back


def _take(handle: int) -> bool:
    """Whether the lock is ours, or there are none."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this opening of the file, so of threads, too
    except OSError as error:
        # Other reasons are those of network file systems without locks, where runs have always gone on without.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
