"""Converged sigma_1 by the Triton kernels: two launches a step for all matrices, the host looking in now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_ops.kernels import spectral_norm as kernels
from spectral_ops.kernels import table as fields
from spectral_ops.kernels.penalty import Work, launch_penalty
from spectral_ops.kernels.spectral_norm import BOUNDS, ENTRIES, Krylov
from spectral_ops.ops.triton_debug import check_stopped
from spectral_ops.ops.triton_table import Memory, TritonTable

# Steps between two looks at which matrices are done, each a sync of ~20 us. On average a matrix that is done is read
# half as many times in vain.
CHECK = 8

# Lanczos vectors there is room for at first; doubled when that is not enough.
CAPACITY = 16


class Norms(NamedTuple):
    """What a call returns, allocated by the caller. u and v are flat."""

    sigma: Tensor
    bound: Tensor
    u: Tensor
    v: Tensor
    exponents: Tensor


class Run:
    """The matrices of one pair of dtypes, and those of their tiles that are still of use."""

    def __init__(self, memory: Memory, work: Work, names: Sequence[str]):
        self.memory, self.work, self._names = memory, work, names
        self._tiles = memory.rows.host_tiles
        # Of each tile's matrix, the number in sigma.
        self._matrix = memory.rows.template[self._tiles[:, 1].long(), fields.INDEX.value]
        self._kept = len(self._tiles)
        self._active = self.work

    @property
    def active(self) -> bool:
        return self._kept > 0

    def keep(self, active: Tensor) -> None:
        """Only the tiles of matrices that are `active`, a mask on the host."""
        tiles = self._tiles[active[self._matrix]]
        before, self._kept = self._kept, len(tiles)
        if 0 < self._kept < before:
            if self.work.rows.device.type == "cuda":
                tiles = tiles.pin_memory()
            self._active = self.work._replace(tiles=tiles.to(self.work.rows.device, non_blocking=True))

    def read(self, v: Tensor, v_out: Tensor, norms: Norms, *, all_matrices: bool = False) -> None:
        """One step of the penalty's iteration from v: ||y||, ||z|| and v_out, and with all matrices u too."""
        work = self.work if all_matrices else self._active
        u = norms.u if all_matrices else None
        self.memory.begin()
        launch_penalty(
            work, v, v_out, norms.exponents, norms.exponents, norms.sigma, u, None, self.memory.scalar("strength", 1.0)
        )
        self.memory.end()
        if work.debug:
            check_stopped(work, self.memory.rows, self._names)


def converge(table: TritonTable, weights: Sequence[Tensor], norms: Norms, tol: float, max_iter: int) -> int:
    """Fills `norms` for a table of matrices; how many of them had not converged after max_iter steps.

    Syncs with the host once every CHECK steps, and once more where max_iter ends the iteration.
    """
    norms.exponents.zero_()
    with table.lock, torch.cuda.device_of(weights[0]):
        runs = [Run(memory, work, table.layers.names) for memory, work in table.works(weights, 2.0)]
        # A space of n vectors is all there is.
        steps = max(1, min(max_iter, max(run.memory.rows.widest for run in runs)))
        krylov = _allocate(norms, min(CAPACITY, steps))
        for run in runs:
            kernels.launch_start(run.work, krylov)
        status = None
        for k in range(steps):
            if k + 1 == len(krylov.basis) < steps:
                krylov = _grown(krylov, min(2 * len(krylov.basis), steps))
            for run in runs:
                if run.active:
                    run.read(krylov.q, krylov.z, norms)
                    kernels.launch_lanczos(run.work, krylov, k, tol, max_iter)
            status = None
            if (k + 1) % CHECK == 0:
                status = krylov.status.cpu()
                active = status == 0
                if not active.any():
                    break
                for run in runs:
                    run.keep(active)
        for run in runs:
            kernels.launch_ritz(run.work, krylov)
            run.read(krylov.q, norms.v, norms, all_matrices=True)
            kernels.launch_bound(run.work, krylov.q, norms.v, norms.u, norms.sigma, norms.bound)
        status = krylov.status.cpu() if status is None else status
    assert not (status == 0).any(), "a matrix neither converged nor stopped"
    return int((status < 0).sum())


def _allocate(norms: Norms, capacity: int) -> Krylov:
    matrices, columns = norms.sigma.shape[0], norms.v.shape[0]
    device = norms.v.device
    return Krylov(
        basis=norms.v.new_empty(capacity, columns),
        projected=torch.empty(capacity, matrices, ENTRIES.value, dtype=torch.float64, device=device),
        bracket=torch.zeros(matrices, BOUNDS.value, dtype=torch.float64, device=device),
        status=torch.zeros(matrices, dtype=torch.int32, device=device),
        q=norms.v.new_empty(columns),
        z=norms.v.new_zeros(columns),
        rest=norms.v.new_empty(columns),
    )


def _grown(krylov: Krylov, capacity: int) -> Krylov:
    return krylov._replace(basis=_longer(krylov.basis, capacity), projected=_longer(krylov.projected, capacity))


def _longer(x: Tensor, length: int) -> Tensor:
    out = x.new_empty(length, *x.shape[1:])
    out[: len(x)] = x
    return out
