"""What is checked against of conv layers: im2col and Fourier transforms in float64, layer by layer.

Written apart from the library and from the baselines, which call torch's convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.models import Conv


class ConvStep(NamedTuple):
    """One warm step of every layer."""

    sigma: Tensor  # (L,)
    v: list[Tensor]  # (1, inputs, size, size)
    value: Tensor
    dw: list[Tensor]
    scale: list[float]  # of each of dw: its norm before the two terms of s^k - t^k cancel


@torch.no_grad()
def warm_step(
    weights: Sequence[Tensor],
    convs: Sequence[Conv],
    v: Sequence[Tensor],
    *,
    exponent: float = 2.0,
    target: float = 1.0,
) -> ConvStep:
    """With C the layer, y = C v, z = C'y, s = ||z|| / ||y||; R = sum (s^k - t^k)^2, dR at fixed u = y / ||y||."""
    k = exponent
    value = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    sigmas, vs, dw, scale = [], [], [], []
    for w, conv, x in zip(weights, convs, v, strict=True):
        windows: dict[str, Any] = {"kernel_size": conv.kernel, "stride": conv.stride, "padding": conv.padding}
        matrix = w.detach().double().flatten(1)  # (outputs, inputs * kernel^2)
        image = x.double().view(1, conv.inputs, conv.size, conv.size)
        y = matrix @ F.unfold(image, **windows)[0]  # (outputs, windows)
        z = F.fold((matrix.T @ y)[None], (conv.size, conv.size), **windows)
        s, u, v_new = z.norm() / y.norm(), y / y.norm(), z / z.norm()
        # u'C v = sum of u * (W unfold(v)), so that its gradient is u unfold(v)'.
        gradient = (u @ F.unfold(v_new, **windows)[0].T).view_as(w)
        value += (s**k - target**k) ** 2
        sigmas.append(s)
        vs.append(v_new)
        dw.append(2 * k * s ** (k - 1) * (s**k - target**k) * gradient)
        scale.append((2 * k * s ** (k - 1) * (s**k + target**k) * gradient.norm()).item())
    return ConvStep(torch.stack(sigmas), vs, value, dw, scale)


@torch.no_grad()
def circular_norms(weights: Sequence[Tensor], convs: Sequence[Conv]) -> Tensor:
    """sigma_1 (L,) of the layers with circular padding and stride 1: over all frequencies, Sedghi et al. 2019.

    From the eigenvalues of the smaller Gram matrix of every frequency: see `truth.largest_singular_values`.
    """
    out = []
    for w, conv in zip(weights, convs, strict=True):
        spectrum = torch.fft.rfft2(w.detach().double(), s=(conv.size, conv.size)).flatten(2).permute(2, 0, 1)
        tall = spectrum if spectrum.shape[1] >= spectrum.shape[2] else spectrum.mH
        out.append(torch.linalg.eigvalsh(tall.mH @ tall)[:, -1].max().sqrt())
    return torch.stack(out)
