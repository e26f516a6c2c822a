"""The short way of a call, for the host time of small tensors.

Nearly every call is plain: eager, without torch.func transforms, forward-mode AD, autocast, tensor subclasses, function
modes, an open trace or a forced column. The functions of dlkern.nn.functional ask `column` first, and hand a plain call
with arguments in their usual form straight to a column. Nothing is left unchecked by that: the raw op checks all of its
arguments before a kernel starts. What it refuses goes the long way, which hands on to torch what is torch's to answer,
so that the exception is torch's own.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function, has_torch_function_unary

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops._autograd import functorch_active

__all__ = ["REFUSALS", "column", "laid_out", "number", "overridden", "pair"]

# What a raw op raises for wrong arguments, and what tensors' attributes raise on other things.
REFUSALS = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)

_autocasts = torch._C._is_any_autocast_enabled
_mode_active = torch._C._is_torch_function_mode_enabled
_state = columns.state
_usual = columns.usual


def column(op: str, input: Any, facts: tuple[Hashable, ...] = ()) -> str | None:
    """The column of a plain call of `op` (facts as in columns.choose), None for a call that has to go the long way."""
    if (
        torch.compiler.is_compiling()
        or functorch_active()
        or forward_ad._current_level >= 0
        or _autocasts()
        or tracing.active
        or _state.forced != "auto"
        or _mode_active()
        or (type(input) is not torch.Tensor and has_torch_function_unary(input))
    ):
        return None
    return _usual[op, input.device, input.dtype, facts]


def overridden(*tensors: Any) -> bool:
    """Whether a TorchFunctionMode, a tensor subclass or an fx proxy is to be asked before a function runs.

    A mode is asked once then, and not at each attribute of a tensor that the function looks at.
    """
    return not torch.compiler.is_compiling() and has_torch_function(tensors)


def laid_out(*tensors: torch.Tensor | None) -> str | None:
    """Why tensors cannot be read by kernels: they are nested, sparse, or in another library's layout. Or None."""
    for t in tensors:
        if t is not None and (t.layout != torch.strided or t.is_nested):
            return "a nested tensor" if t.is_nested else f"layout {t.layout}"
    return None


def pair(value: Any) -> tuple[int, int] | None:
    """An int or a tuple of two as (height, width), None for other forms."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    return None


def number(value: Any) -> int | None:
    """An int or a tuple of one as an int, None for other forms."""
    if type(value) is tuple and len(value) == 1:
        value = value[0]
    return value if type(value) is int else None
