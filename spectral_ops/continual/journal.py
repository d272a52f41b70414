"""What a run leaves in its folder while it goes on: a header, its checkpoints, an end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spectral_ops.continual.checkpoint import RunState, State, save_checkpoint, unreadable
from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.provenance import provenance
from spectral_ops.continual.run_folder import Log, Record, make_folder, to_json


class Journal:
    """The log and the checkpoints of one run.

    Args:
        state: its checkpoint; None: the run begins, and a header is written.
        more: what the header has beside the usual.
    """

    def __init__(self, folder: Path, config: RunConfig, state: RunState | None, **more: Any):
        make_folder(folder, config)
        self.folder, self.method = folder, config.method
        if state is None:
            started = datetime.now(timezone.utc).isoformat(timespec="seconds")
            header = {"kind": "header", "config": to_json(config), **provenance(), "started": started, **more}
            self.log = Log.begin(folder, header)
        else:
            self.log = Log(folder, state["log_size"])
        self._before = 0.0 if state is None else state["run_seconds"]
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Of the run, those before its checkpoint among them."""
        return self._before + time.monotonic() - self._begun

    def save(self, trainer: State) -> None:
        """A checkpoint as `trainer.run` writes it.

        Raises:
            TypeError: the method's state holds what could not be read again; a state comes from code of anybody.
        """
        if (what := unreadable(trainer["method"], "state")) is not None:
            raise TypeError(
                f"checkpoint: expected state_dict() of method {self.method} to be of tensors, numbers, text, lists and "
                f"dicts, got {what}. Make it one of these there, as by float() or torch.as_tensor()."
            )
        save_checkpoint(self.folder, {"trainer": trainer, "log_size": self.log.size, "run_seconds": self.seconds})

    def end(self, records: Sequence[Record]) -> None:
        self.log.write({"kind": "end", "tasks": len(records), "seconds": self.seconds})
        _ = self.log.size  # on the disk

    def close(self) -> None:
        self.log.close()
