"""Convolution with torch.nn.functional's signature."""

from __future__ import annotations

import operator
from typing import Any

import torch

from dlkern import ops
from dlkern import trace as tracing
from dlkern.ops import _plain

__all__ = ["conv2d"]


def _pair(value: Any) -> tuple[int, int] | None:
    """An int, or one or two of them, as a pair; None for what torch has to judge."""
    try:
        if isinstance(value, tuple | list):
            if len(value) == 2:
                return operator.index(value[0]), operator.index(value[1])
            if len(value) != 1:
                return None
            value = value[0]
        if isinstance(value, bool):
            return None
        value = operator.index(value)
        return value, value
    except TypeError:
        return None


def _refuses(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int] | None,
    padding: tuple[int, int] | None,
    dilation: tuple[int, int] | None,
    groups: int,
) -> str | None:
    """Why this call is torch's to answer (nearly always with an exception), or None."""
    if stride is None or padding is None or dilation is None or type(groups) is not int:
        return "arguments are not integers in ones or pairs"
    if weight.dim() != 4 or input.dim() != 4:
        return "input is not 3-D or 4-D, or weight not 4-D"
    dtype = input.dtype
    if not dtype.is_floating_point:
        return f"no kernel for {dtype}"
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return "dtypes differ"
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        return "devices differ"
    if input.layout != torch.strided or weight.layout != torch.strided:
        return "a tensor is not strided"
    if min(stride) <= 0 or min(padding) < 0 or min(dilation) <= 0 or groups <= 0:
        return "a setting is not positive"
    _, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    if channels != group_channels * groups or out_channels % groups != 0:
        return "channels do not fit the groups"
    if channels == 0 or out_channels == 0 or size[0] == 0 or size[1] == 0 or kernel[0] == 0 or kernel[1] == 0:
        return "a dimension is zero"
    for i in (0, 1):
        if size[i] + 2 * padding[i] < dilation[i] * (kernel[i] - 1) + 1:
            return "the kernel is larger than the padded input"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_channels):
        return "bias has not one element an output channel"
    return None


def _autocast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors as torch's autocast casts them: floating point but float64 to `dtype`."""
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    ]


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch.nn.functional.conv2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, bfloat16 or float64 (float16 on GPUs); any strides.
        weight: [K, C / groups, R, S].
        bias: [K] or None.
        stride, dilation: an int, or one for each of height and width.
        padding: zeros added on both sides: likewise, or "valid" (none) or "same" (the output has the input's size,
            stride 1; where the total is odd the right and bottom get the one more).
        groups: blocked connections: K / groups filters see C / groups channels each.

    Returns:
        [N, K, P, Q] with P = (H + 2·padding - dilation·(R - 1) - 1) // stride + 1, in channels_last where the input
        or the weight is:  y[n,k,p,q] = bias[k] + sum over c,r,s of
        weight[k,c,r,s] · x[n,c, p·stride - padding + r·dilation, q·stride - padding + s·dilation].

    Raises:
        RuntimeError, TypeError: torch's own, for wrong arguments.
    """
    try:
        column = _plain.column("conv2d", input, ("grouped",) if groups > 1 else ())
        if column is not None and input.dim() == 4:
            step, pad, spread = _plain.pair(stride), _plain.pair(padding), _plain.pair(dilation)
            if step is not None and pad is not None and spread is not None and type(groups) is int:
                return ops.conv.run(column, input, weight, bias, step, pad, spread, groups)
    except _plain.REFUSALS:
        pass  # the long way says what is wrong
    if not (isinstance(input, torch.Tensor) and isinstance(weight, torch.Tensor)):
        return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    x, w, b = input, weight, bias
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, w, b = _autocast(torch.get_autocast_dtype(device), x, w, b)  # type: ignore[assignment]
    stride2, dilation2 = _pair(stride), _pair(dilation)
    before: list[int] | None = None  # zeros in front of a symmetric padding's: left, right, top, bottom
    if isinstance(padding, str):
        padding2: tuple[int, int] | None = (0, 0) if padding == "valid" else None
        if padding == "same" and stride2 == (1, 1) and dilation2 is not None and w.dim() == 4:
            total = [dilation2[i] * (w.shape[2 + i] - 1) for i in (0, 1)]
            padding2 = total[0] // 2, total[1] // 2
            if total[0] % 2 or total[1] % 2:
                before = [0, total[1] % 2, 0, total[0] % 2]
    else:
        padding2 = _pair(padding)
    unbatched = x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
    if before is not None and x.dim() == 4 and min(dilation2 or (0,)) > 0:
        x = torch.nn.functional.pad(x, before)
    reason = _refuses(x, w, b, stride2, padding2, dilation2, groups)
    if reason is not None:
        if tracing.active:
            tracing.record("conv2d", "torch", reason, input, weight, bias)
        return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    assert stride2 is not None and padding2 is not None and dilation2 is not None
    output = ops.conv.conv2d(x, w, b, stride2, padding2, dilation2, groups)
    return output.squeeze(0) if unbatched else output
