"""What conv operators are compared with: torch's convolutions layer by layer, and two methods by Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.models import Conv

# After t of them the bound of a map of rank r is at most r^(1 / 2^(t + 1)) times the norm: within 5 % for r = 512.
GRAM_ITERATIONS = 6


class LayerByLayer:
    """The usual code: a convolution and its adjoint for every layer, v kept warm between calls.

    The norm is that of C'u, which the normalisation computes anyway, and the gradient is written out: two convolutions
    a layer, three with the gradient. Code that reads sigma off u'C v and calls backward takes one more.

    Args:
        weights: parameters; where gradients are asked for, with a .grad.
        v: (1, inputs, size, size) each.
        strength: the coefficient.
        in_place: the next v is written where v was, for a CUDA graph.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        convs: Sequence[Conv],
        v: Sequence[Tensor],
        *,
        strength: float = 1.0,
        in_place: bool = False,
    ):
        self.convs, self.strength, self._in_place = list(convs), strength, in_place
        self._parameters, self.weights = list(weights), [w.detach() for w in weights]
        self.v = [x.clone() for x in v]
        # What the adjoint of a strided layer cannot tell from its input.
        self._left_over = [
            c.size + 2 * c.padding - c.kernel - (c.output_size - 1) * c.stride for c in self.convs
        ]

    def restart(self, v: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self.v, list(v))

    @torch.no_grad()
    def power_iteration(self) -> Tensor:
        """sigma (L,)."""
        return torch.stack([self._step(i)[0] for i in range(len(self.weights))])

    @torch.no_grad()
    def accumulate_grad_(self) -> Tensor:
        """strength * sum (sigma^2 - 1)^2; its gradient added into .grad."""
        sigmas = []
        for i, (p, w, conv) in enumerate(zip(self._parameters, self.weights, self.convs, strict=True)):
            sigma, u = self._step(i)
            sigmas.append(sigma)
            upstream = (4 * self.strength * sigma * (sigma.square() - 1)) * u
            assert p.grad is not None  # allocated beforehand
            p.grad += nn.grad.conv2d_weight(self.v[i], w.shape, upstream, conv.stride, conv.padding)
        return self.strength * (torch.stack(sigmas).square() - 1).square().sum()

    def _step(self, i: int) -> tuple[Tensor, Tensor]:
        """sigma and u; v becomes the next one."""
        w, conv = self.weights[i], self.convs[i]
        y = F.conv2d(self.v[i], w, None, conv.stride, conv.padding)
        u = y / torch.linalg.vector_norm(y)
        z = F.conv_transpose2d(u, w, None, conv.stride, conv.padding, self._left_over[i])
        sigma = torch.linalg.vector_norm(z)
        if self._in_place:
            torch.div(z, sigma, out=self.v[i])
        else:
            self.v[i] = z / sigma
        return sigma, u


def spectrum(w: Tensor, size: int) -> Tensor:
    """(frequencies, outputs, inputs): what a circular layer of stride 1 does at every frequency of its input.

    A real kernel's other half of the frequencies are their conjugates: same singular values.
    """
    return torch.fft.rfft2(w, s=(size, size)).flatten(2).permute(2, 0, 1)


@torch.no_grad()
def fft_norms(weights: Sequence[Tensor], convs: Sequence[Conv]) -> Tensor:
    """sigma_1 (L,) with circular padding and stride 1, exact: Sedghi et al., ICLR 2019, arXiv 1805.10408."""
    return torch.stack(
        [torch.linalg.svdvals(spectrum(w, conv.size)).max() for w, conv in zip(weights, convs, strict=True)]
    )


@torch.no_grad()
def gram_bounds(weights: Sequence[Tensor], convs: Sequence[Conv], iterations: int = GRAM_ITERATIONS) -> Tensor:
    """Upper bounds (L,) of the same: Delattre et al., ICML 2023, arXiv 2305.16173.

    G <- G*G squares every singular value, and sigma_1(G) <= ||G||_F. Scaled at every step; the scale goes along as its
    logarithm.
    """
    out = []
    for w, conv in zip(weights, convs, strict=True):
        g = spectrum(w if w.shape[0] >= w.shape[1] else w.transpose(0, 1), conv.size)
        log_scale = w.new_zeros(len(g))
        for _ in range(iterations):
            norm = torch.linalg.matrix_norm(g)
            g = g / norm[:, None, None]
            g = g.mH @ g
            log_scale = 2 * (log_scale + norm.log())
        log_norm = torch.linalg.matrix_norm(g).log() + log_scale
        out.append((log_norm / 2**iterations).exp().max())
    return torch.stack(out)
