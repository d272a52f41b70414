"""The sizes that conv layers are used with: what a convolution needs besides its weight to be a linear map."""

from __future__ import annotations

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from spectral_ops.rules import Found, Owner, Pattern, expected, match_first, show

Size = tuple[int, ...]
InputSize = Sequence[int] | Sequence[Sequence[int]] | Mapping[Pattern, int | Sequence[int]]

BATCH = 2  # of one, BatchNorm in training refuses what has become 1x1
CONTAINERS = (list, dict, set)
REMEDY = "Give input_size as a mapping from layer to spatial size, such as {'features.*': (32, 32)}"


class ConvCall(NamedTuple):
    """The spatial size of a layer's input and, where a forward has shown it, of its output."""

    size: Size
    output: Size | None = None


def conv_input_sizes(model: nn.Module, input_size: InputSize) -> dict[nn.Module, list[ConvCall]]:
    """The distinct sizes that every conv layer of a model is called with; layers that are not called are missing.

    Found by one forward on meta tensors, which have shapes and no data, with a batch of 2. The model is left as it was:
    parameters and buffers are replaced for the time of the call, BatchNorm's among them, what its modules hold besides
    is put back, and so are the random states of torch, NumPy and Python. Forward hooks that the model has are run.

    Args:
        model: run in the mode it is in; in training some draw numbers and look at them, which meta tensors have not.
        input_size: the shape of an input without its batch dimension, (C, H, W); several of these for a model that
            takes several positional inputs; or, for models that do not run on meta tensors or take inputs that are not
            floating point, a mapping from pattern (of a layer's name, or its weight's; the first match counts) to the
            spatial size of the layer's input. A mapping runs nothing.

    Raises:
        ValueError, TypeError: an input_size of another form, a pattern that matches no layer, a forward that fails,
            whose error is the cause.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3))
        >>> [calls for calls in conv_input_sizes(model, (3, 32, 32)).values()]
        [[ConvCall(size=(32, 32), output=(16, 16))], [ConvCall(size=(16, 16), output=(14, 14))]]
    """
    if isinstance(input_size, Mapping):
        return _sizes_by_pattern(model, input_size)
    shapes = _input_shapes(input_size)
    calls: dict[nn.Module, list[ConvCall]] = {}
    held = {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []  # conv layers, the innermost last

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, _ConvNd) and module in held:
            running.append(module)

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(module, _ConvNd) or module not in held:  # the hook is global: another thread's model
            return
        if module in running:  # another thread may have entered before there was a hook
            running.remove(module)
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            dims = len(module.kernel_size)
            call = ConvCall(tuple(x.shape[-dims:]), tuple(output.shape[-dims:]) if isinstance(output, Tensor) else None)
            if call not in calls.setdefault(module, []):
                calls[module].append(call)

    with unchanged(model):
        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(record, with_kwargs=True)
        try:
            _run_on_meta(model, shapes)
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            inputs = " and ".join(str((BATCH, *shape)) for shape in shapes)
            where = f" in layer {held[running[-1]]!r}" if running and held[running[-1]] else ""
            got = f"{type(error).__name__}{where}: {text.rstrip('.')}"
            remedy = f"Correct input_size, which has no batch dimension, if it is not what the model takes. {REMEDY}"
            raise ValueError(expected(f"a forward on meta tensors of shape {inputs} to run", got, remedy)) from error
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def _run_on_meta(model: nn.Module, shapes: Sequence[Size]) -> None:
    held = [*model.named_parameters(), *model.named_buffers()]  # tied ones once, under their first name
    dtype = next((p.dtype for _, p in held if p.is_floating_point()), torch.get_default_dtype())
    on_meta = {name: torch.empty_like(x, device="meta") for name, x in held}
    inputs = tuple(torch.empty(BATCH, *shape, dtype=dtype, device="meta") for shape in shapes)
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Using `torch.compile")  # with global hooks, which it does not need
        # For what a forward makes without naming a device, such as positions.
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.no_grad())
        torch.func.functional_call(model, on_meta, inputs)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What the modules hold, and every random state, is put back: parameters, counters, caches, an LSTM's weight list.

    By identity: what a forward changes within an object that is none of torch's containers stays changed.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers = [(x, x.copy()) for _, kept in before for x in kept.values() if type(x) in CONTAINERS]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for attributes, kept in before:
            _put_back(attributes, kept)
        for container, copied in containers:
            _put_back(container, copied)
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def _put_back(container: Any, kept: Any) -> None:
    if isinstance(container, list):
        container[:] = kept
    else:
        container.clear()
        container.update(kept)


def _sizes_by_pattern(model: nn.Module, sizes: Mapping[Pattern, Any]) -> dict[nn.Module, list[ConvCall]]:
    found: dict[nn.Module, Found] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if isinstance(module, _ConvNd) and weight is not None:
            owners = found.setdefault(module, Found(name, weight, [])).owners
            owners += [Owner(module, "weight", f"{name}.weight" if name else "weight"), Owner(module, "weight", name)]
    for pattern, size in sizes.items():
        several = size if isinstance(size, tuple | list) else [size]
        if not several or not all(type(n) is int for n in several):
            condition = f"input_size[{show(pattern)}] to be a spatial size"
            raise TypeError(expected(condition, repr(size), "Write 32 or (32, 32), without channels"))
    chosen = match_first("input_size", sizes, list(found.values()))
    out = {}
    for module, layer in found.items():
        if layer.name in chosen:
            _, size = chosen[layer.name]
            dims = layer.parameter.ndim - 2
            out[module] = [ConvCall((size,) * dims if isinstance(size, int) else tuple(size))]
    return out


def _input_shapes(input_size: Any) -> list[Size]:
    several = list(input_size) if isinstance(input_size, tuple | list) else None
    if several and not any(isinstance(shape, tuple | list) for shape in several):
        several = [several]
    if not several or not all(isinstance(x, tuple | list) and all(type(n) is int for n in x) for x in several):
        condition = "input_size to be the shape of one input without its batch dimension"
        remedy = "Write (3, 224, 224), several of these for several inputs, or a mapping from layer to spatial size"
        is_tensor = isinstance(input_size, Tensor)
        got = f"a tensor of shape {tuple(input_size.shape)}" if is_tensor else repr(input_size)
        raise TypeError(expected(condition, got, remedy))
    if any(n < 1 for shape in several for n in shape):
        raise ValueError(expected("input_size to hold sizes >= 1", repr(input_size), "Write (3, 224, 224)"))
    return [tuple(shape) for shape in several]
