"""reset: a new network and optimizer for every task."""

from __future__ import annotations

from spectral_ops.continual.methods.method import Method
from spectral_ops.continual.methods.optimizer_state import clear_all


class Reset(Method):
    """At every task boundary the network is initialised afresh, buffers included, and the optimizer forgets all.

    What can be learned with nothing carried over: no loss of plasticity, and nothing kept. The weights of a task depend
    on the run's seed and the task alone.
    """

    task_boundaries = True

    def on_task_boundary(self, task: int) -> None:
        self.context.model.load_state_dict(self.context.initialize(task))
        clear_all(self.context.optimizer)
