"""spectral: the largest singular value of every layer toward one, by this library's SpectralRegularizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from spectral_ops import SpectralAdamW, SpectralRegularizer
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

    The vectors of the power iteration are in `state_dict`. With `--optimizer spectral-adamw` the optimizer has them:
    its step takes the penalty in, and this method leaves gradients alone and takes no time.

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
        self.regularizer: SpectralRegularizer | None = None
        if isinstance(context.optimizer, SpectralAdamW):
            return
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
        if self.regularizer is not None:
            self.regularizer.accumulate_grad_()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.regularizer is None else self.regularizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state)


def spectral_adamw(
    model: nn.Module,
    lr: float,
    *,
    strength: float = 1e-3,
    output: bool = True,
    conv: str = "reshape",
    input_size: tuple[int, ...] | None = None,
    **options: Any,
) -> SpectralAdamW:
    """Adam with the method's penalty folded into its step; the method's options."""
    if conv != "reshape" or input_size is not None:
        raise ValueError(
            f"method spectral: expected conv='reshape' with --optimizer spectral-adamw, got {conv!r}. It reads conv "
            "weights as matrices: drop the options conv and input_size, or use --optimizer adam."
        )
    exclude = None if output else f"{model.output}.*"
    return SpectralAdamW(
        model.parameters(), lr=lr, weight_decay=0.0, model=model, strength=strength, exclude=exclude, **options
    )
