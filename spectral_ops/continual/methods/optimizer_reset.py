"""optimizer-reset: a new optimizer for every task."""

from __future__ import annotations

from spectral_ops.continual.methods.method import Method
from spectral_ops.continual.methods.optimizer_state import clear_all


class OptimizerReset(Method):
    """At every task boundary the optimizer forgets moments and step counters; the network is left alone.

    Source: Asadi et al. 2023, arXiv 2306.17833.
    """

    task_boundaries = True

    def on_task_boundary(self, task: int) -> None:
        clear_all(self.context.optimizer)
