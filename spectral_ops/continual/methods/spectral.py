"""spectral: the largest singular value of every layer toward one, by this library's SpectralRegularizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from spectral_ops import SpectralRegularizer
from spectral_ops.continual.methods.method import Context, Method


class Spectral(Method):
    """Adds strength * R(theta), straight into the gradient, by `SpectralRegularizer.accumulate_grad_`; coupled.

        R = sum over matrices (sigma_1^k - t^k)^2 + sum over biases ||b||^(2k)
          + sum over norm scales sum_i (|g_i|^k - 1)^2 + sum over norm shifts sum_i |s_i|^(2k)

    Args:
        strength: the coefficient of R.
        target: t.
        exponent: k.
        weights, biases, norms: whether these are among them.
        output: whether the layer that gives the scores is.
        conv: "reshape" reads a conv weight as the matrix (out, in * kernel), "operator" as the map on images.
        input_size: of one image, (C, H, W), for conv="operator".

    The vectors of the power iteration are in `state_dict`.

    Source: Lewandowski et al. 2025, arXiv 2406.06811.
    """

    grid = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

    def __init__(
        self,
        context: Context,
        *,
        strength: float = 1e-3,
        target: float = 1.0,
        exponent: float = 2.0,
        weights: bool = True,
        biases: bool = True,
        norms: bool = True,
        output: bool = True,
        conv: Literal["reshape", "operator"] = "reshape",
        input_size: tuple[int, ...] | None = None,
    ):
        super().__init__(context)
        self.regularizer = SpectralRegularizer(
            context.model,
            strength=strength,
            target=target,
            exponent=exponent,
            exclude=None if output else f"{context.output}.*",
            weights=weights,
            biases=biases,
            norms=norms,
            conv=conv,
            input_size=input_size,
        )

    def after_backward(self) -> None:
        self.regularizer.accumulate_grad_()

    def state_dict(self) -> dict[str, Any]:
        return self.regularizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.regularizer.load_state_dict(state)
