"""linear with torch.nn.functional's signature, and an activation that costs nothing."""

from __future__ import annotations

from typing import Any

import torch

from dlkern import ops
from dlkern import trace as tracing
from dlkern.ops import _plain
from dlkern.ops._activation import Activation
from dlkern.reference.linear import activate

__all__ = ["linear"]


def _unusual(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """What of a call is outside our kernels (torch takes it, or raises its own error), or None."""
    if weight.dim() != 2 or input.dim() == 0 or input.size(-1) != weight.size(1):
        return "weight is not [out_features, in_features]"
    if input.dtype != weight.dtype or input.device != weight.device:
        return "input and weight differ in dtype or device"
    if bias is not None:
        if bias.dim() != 1 or bias.size(0) != weight.size(0):
            return "bias is not [out_features]"
        if bias.dtype != weight.dtype or bias.device != weight.device:
            return "bias and weight differ in dtype or device"
    if not input.is_floating_point():
        return f"no {str(input.dtype).removeprefix('torch.')} linear"
    return None


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
) -> torch.Tensor:
    """torch.nn.functional.linear, with an optional fused activation: activation(input @ weight.T + bias).

    Args:
        input: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features], or None.
        activation: dlkern.Activation to apply to the result, or None. torch has no such argument.

    Returns:
        [..., out_features], contiguous, in the inputs' dtype (autocast's inside torch.autocast).

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit together; torch's own messages.
    """
    code = 0 if activation is None else int(activation)
    try:
        column = _plain.column("linear", input)
        if column is not None:
            return ops.linear.run(column, input, weight, bias, code)
    except _plain.REFUSALS:
        pass  # the long way says what is wrong
    try:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input, weight, bias = _autocast(device, input, weight, bias)
        reason = _unusual(input, weight, bias)
    except AttributeError:  # not tensors: torch says which
        reason = "not tensors"
    if reason is None:
        return ops.linear.linear(input, weight, bias, code)
    output = torch.nn.functional.linear(input, weight, bias)
    if tracing.active:
        tracing.record("linear", "torch", reason, input, weight, bias)
    return activate(output, code)


def _autocast(device: str, *tensors: torch.Tensor | None) -> list[Any]:
    """float32 and smaller in autocast's dtype, as its lower_precision_fp list has linear; float64 stays."""
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    ]
