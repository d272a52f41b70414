"""The sums of the sharded step by compiled code: one call or launch before the all-reduce, one behind it.

csrc/sharded.cpp on the CPU, kernels/sharded.py on CUDA; `Reader` has the same in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_ops import backends
from spectral_ops.ops.device_number import DeviceNumber
from spectral_ops.ops.eager_penalty import Kept
from spectral_ops.sharding.mesh import all_reduce
from spectral_ops.sharding.pieces import Piece
from spectral_ops.sharding.read import Products, State

FIELDS = 7  # csrc/sharded.h: ShardedMatrix


class CompiledSums:
    """Of matrices all of whose columns are on this rank."""

    def __init__(
        self, matrices: Sequence[Piece], counts_of_z: Sequence[bool], counts_of_y: Sequence[bool], targets: Tensor,
        scales: Tensor,
    ):  # fmt: skip
        rows, v_at, u_at = [], 0, 0
        for piece, of_z, of_y in zip(matrices, counts_of_z, counts_of_y, strict=True):
            rows.append((v_at, piece.n, u_at, piece.rows, of_z, of_y, piece.is_empty_matrix))
            v_at, u_at = v_at + piece.n, u_at + piece.rows
        self._size, self._count = v_at, len(rows)
        self._matrices = torch.tensor(rows, dtype=torch.int64).view(-1, FIELDS).to(targets.device)
        self._targets, self._scales = targets, scales
        self._exponent = DeviceNumber()

    def exchange(
        self, backend: str, v: Tensor, local: Kept, exponents: Tensor, vectors: Tensor, group: object
    ) -> Products:
        """`Reader.exchange`."""
        buffer = torch.empty(self._size + self._count + vectors.numel(), dtype=torch.float64, device=v.device)
        z, squares, summed = buffer.split([self._size, self._count, vectors.numel()])
        y_norms = torch.empty_like(squares)
        summed.copy_(vectors)
        if backend == "native":
            backends.native().sharded_pack(
                v.dtype == torch.float64,
                self._matrices.data_ptr(),
                self._count,
                v.data_ptr(),
                exponents.data_ptr(),
                local.sigma.data_ptr(),
                local.v.data_ptr(),
                [x.data_ptr() for x in (z, squares, y_norms)],
                torch.get_num_threads(),
            )
        elif self._count:
            from spectral_ops.kernels.sharded import Sums, launch_pack  # imports triton, which may be missing

            with torch.cuda.device_of(v):
                launch_pack(self._matrices, v, exponents, local.sigma, local.v, Sums(z, squares, y_norms))
        all_reduce(buffer, group)
        return Products(z, squares, y_norms, local.u, summed)

    def finish(
        self, backend: str, products: Products, state: State, exponent: float, found_inf: Tensor | None
    ) -> Tensor:
        """`Reader.finish`: the terms of R. On the CPU of a step that is not skipped."""
        terms = torch.empty_like(products.squares)
        sums = products.z, products.squares, products.u_norm
        if backend == "native":
            backends.native().sharded_finish(
                state.v.dtype == torch.float64,
                self._matrices.data_ptr(),
                self._count,
                [x.data_ptr() for x in sums],
                self._targets.data_ptr(),
                self._scales.data_ptr(),
                exponent,
                *(x.data_ptr() for x in state),
                products.u.data_ptr(),
                terms.data_ptr(),
                torch.get_num_threads(),
            )
        elif self._count:
            from spectral_ops.kernels.sharded import Sums, Vectors, launch_finish

            with torch.cuda.device_of(terms):
                launch_finish(
                    self._matrices,
                    Sums(*sums),
                    self._targets,
                    self._scales,
                    self._exponent.at(exponent, terms.device),
                    Vectors(*state),
                    products.u,
                    terms,
                    found_inf,
                    exponent == 2.0,
                )
        return terms
