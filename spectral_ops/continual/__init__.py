"""The reference continual-learning trainer: data, streams of tasks, models, methods, measures and reports.

See docs/trainer.md.
"""

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.ensemble import run_together
from spectral_ops.continual.measures import probe
from spectral_ops.continual.methods.method import Context, Method
from spectral_ops.continual.run_folder import Run, read_run
from spectral_ops.continual.steps import Stopped
from spectral_ops.continual.streams.stream import Stream, Task
from spectral_ops.continual.trainer import Trainer, run

__all__ = [
    "Context",
    "Method",
    "Run",
    "RunConfig",
    "Stopped",
    "Stream",
    "Task",
    "Trainer",
    "probe",
    "read_run",
    "run",
    "run_together",
]
