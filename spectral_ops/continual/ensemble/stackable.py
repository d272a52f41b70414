"""Which runs can share their steps."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from spectral_ops.continual.config import RunConfig
from spectral_ops.continual.ensemble.methods import check_method, stack_method
from spectral_ops.continual.ensemble.optimizers import stack_optimizer
from spectral_ops.continual.ensemble.refused import REMEDY, CannotShare
from spectral_ops.continual.ensemble.stack import Stack
from spectral_ops.continual.methods import Context, find_method
from spectral_ops.continual.models import Model, build_model
from spectral_ops.continual.trainer import make_optimizer, method_options


def why_alone(config: RunConfig, input_shape: tuple[int, ...], classes: int) -> str | None:
    """What is expected of runs that share their steps, and what these have; None: they can.

    A stack of two such networks is made, without data.
    """
    try:
        check_method(config.method)
        with torch.random.fork_rng(devices=[]):
            models = [build_model(config.model, input_shape, classes, **config.model_options) for _ in range(2)]
        optimizers = [make_optimizer(config, model) for model in models]
        kind, options = find_method(config.method), method_options(config)
        methods = [kind(_context(*single), **options) for single in zip(models, optimizers, strict=True)]
        stack = Stack(models)
        context = _context(stack.model, stack_optimizer(config, stack, optimizers))
        stack_method(stack, context, methods, options)
    except CannotShare as reason:
        return str(reason).removeprefix("run_together: expected ").removesuffix(REMEDY).rstrip()
    return None


def _context(model: Model, optimizer: Optimizer) -> Context:
    generator = torch.Generator()
    return Context(model, optimizer, model.units(), model.output, generator, lambda task: model.state_dict())
