"""Spectral regularization of neural networks, almost free. See README.md."""

from spectral_ops.backends import available, use_backend
from spectral_ops.ops.conv_spectral_norm import conv_norm_bound, conv_spectral_norm
from spectral_ops.ops.power_iteration import power_iteration
from spectral_ops.ops.spectral_norm import spectral_norm
from spectral_ops.ops.spectral_penalty import spectral_penalty
from spectral_ops.optim import SpectralAdamW
from spectral_ops.regularizer import SpectralRegularizer
from spectral_ops.rules import Rule

__version__ = "0.1.0"
__all__ = [
    "Rule",
    "SpectralAdamW",
    "SpectralRegularizer",
    "available",
    "conv_norm_bound",
    "conv_spectral_norm",
    "power_iteration",
    "spectral_norm",
    "spectral_penalty",
    "use_backend",
]
