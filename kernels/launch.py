"""Launches of a kernel as Triton compiled it before, without Triton's own way there.

`kernel[grid](...)` binds the arguments, makes strings of them and of the options, and compares every global constant
that the kernel and what it calls have read: 14 us for kernels/penalty.py under Triton 3.6 and 54 under 3.9, against 6-8
here (AMD EPYC, Python 3.11, 2026-11, no GPU: the driver's own part is left out). That was most of a small step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton import JITFunction, knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

# By everything that Triton's choice of a compilation depends on: (the compiled kernel, its constants in order).
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(kernel: Any, programs: int, *args: Any, **named: Any) -> None:
    """`programs` programs of `kernel`, on the current device and stream.

    Equivalent to

        kernel[(programs,)](*args, **named)

    The first launch of its kind goes there. Triton's launch hooks are called at every launch; a global constant that
    was changed since the first is not seen, which Triton refuses.

    Args:
        args: tensors, None, integers that the kernel names in do_not_specialize, floats; in the kernel's order.
        named: the constants that follow them, and options; hashable.
    """
    if not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:  # else it is interpreted
        kernel[(programs,)](*args, **named)
        return
    values: list[Any] = []
    looks: list[Any] = []
    for x in args:
        if x is None:
            values.append(None)
            looks.append(None)
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            looks.append(x.dtype)
            looks.append(address % 16)
            # An address is taken as it is, for less. Of another tensor Triton finds out whether a device can reach it.
            values.append(address if x.is_cuda else x)
        else:
            values.append(x)
            looks.append(x.__class__)
            looks.append(-(2**31) <= x < 2**31)  # int32, or else int64
    active = driver.active
    device = active.get_current_device()
    settings = knobs.runtime.debug, knobs.compilation.instrumentation_mode, knobs.runtime.add_stages_inspection_hook
    key = (kernel.fn, device, settings, *named, *named.values(), *looks)
    known = _compiled.get(key)
    if known is None:
        made = kernel[(programs,)](*args, **named)
        # On ROCm Triton looks at more of a tensor. None, or a promise, where the compiler has been taken over.
        if isinstance(made, CompiledKernel) and made.metadata.target.backend == "cuda":
            _compiled[key] = made, tuple(named[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, constants = known
    compiled[(programs, 1, 1)](*values, *constants, stream=active.get_current_stream(device))
