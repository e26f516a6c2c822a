"""Pooling with torch.nn.functional's signatures.

A call that torch would refuse is handed to torch's own function, which raises its own exception before any kernel
starts; so is one on integers. trace() records those as "torch".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlkern import ops
from dlkern import trace as tracing
from dlkern.ops import _plain

__all__ = ["adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "max_pool2d_with_indices"]

_Pair = int | Sequence[int]
_Two = tuple[Any, Any]  # int or SymInt
_Window = tuple[_Two, _Two, _Two, _Two]


def _hand_on(op: str, reason: str, function: Callable[..., Any], input: Any, *args: Any) -> Any:
    if tracing.active and isinstance(input, torch.Tensor):
        tracing.record(op, "torch", reason, input)
    return function(input, *args)


def _pair(value: Any) -> _Two | None:
    """(height, width) of an int or a sequence of one or two, None for anything else."""
    if isinstance(value, int | torch.SymInt):
        return value, value
    if isinstance(value, tuple | list) and len(value) in (1, 2) and all(isinstance(v, int | torch.SymInt) for v in value):
        return value[0], value[-1]
    return None


def _plain_window(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...] | None:
    """The four in one list where each is an int or a tuple of two; the raw op checks their values."""
    kernel = _plain.pair(kernel_size)
    step = kernel if stride is None else _plain.pair(stride)
    pad, spread = _plain.pair(padding), _plain.pair(dilation)
    if kernel is None or step is None or pad is None or spread is None:
        return None
    return *kernel, *step, *pad, *spread


def _window(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> _Window | None:
    """kernel_size, stride, padding and dilation as pairs; None where torch would refuse them."""
    kernel = _pair(kernel_size)
    step = kernel if stride is None or (isinstance(stride, tuple | list) and not stride) else _pair(stride)
    pad, spread = _pair(padding), _pair(dilation)
    if kernel is None or step is None or pad is None or spread is None:
        return None
    if min(kernel) <= 0 or min(step) <= 0 or min(spread) <= 0 or min(pad) < 0:
        return None
    if 2 * pad[0] > kernel[0] or 2 * pad[1] > kernel[1]:
        return None
    return kernel, step, pad, spread


def _fits(input: Any, window: _Window) -> bool:
    """Whether input is a floating-point [N, C, H, W] or [C, H, W] with at least one window."""
    if not isinstance(input, torch.Tensor) or not input.is_floating_point():
        return False
    if input.dim() not in (3, 4) or any(size == 0 for size in input.shape[-3:]):
        return False
    kernel, _, pad, spread = window
    return all(input.shape[i - 2] + 2 * pad[i] > spread[i] * (kernel[i] - 1) for i in (0, 1))


_REFUSED = "an integer input, or arguments that torch refuses"


def max_pool2d(
    input: torch.Tensor, kernel_size: _Pair, stride: _Pair | None = None, padding: _Pair = 0, dilation: _Pair = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Any:
    """torch.nn.functional.max_pool2d.

    Args:
        input: floating-point [N, C, H, W] or [C, H, W].
        kernel_size: extent of a window, an int or (height, width).
        stride: step between windows, kernel_size where None.
        padding: rows and columns of minus infinity around the input, at most half of kernel_size.
        dilation: step between the elements of a window.
        ceil_mode: round the number of windows up; those that would start beyond the input are dropped.
        return_indices: return (output, indices) instead of output.

    Returns:
        The largest element of each window, NaN where it holds one, [N, C, H_out, W_out] in input's dtype and memory
        format; indices are int64 positions y * W + x, the first of equal elements, the last of several NaNs.

    Raises:
        RuntimeError, TypeError: as torch does.
    """
    try:
        column = _plain.column("max_pool2d", input)
        if column is not None and input.dim() == 4:
            flat = _plain_window(kernel_size, stride, padding, dilation)
            if flat is not None:
                results = ops.pooling.run_max(column, input, flat, ceil_mode, return_indices)
                return results if return_indices else results[0]
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    window = _window(kernel_size, stride, padding, dilation)
    if window is None or not _fits(input, window):
        return _hand_on(
            "max_pool2d", _REFUSED, torch.nn.functional.max_pool2d,
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices,
        )
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output, indices = ops.pooling.max_pool2d(batched, *window, bool(ceil_mode), bool(return_indices))
    if input.dim() == 3:
        output, indices = output.squeeze(0), indices.squeeze(0) if return_indices else indices
    return (output, indices) if return_indices else output


def max_pool2d_with_indices(
    input: torch.Tensor, kernel_size: _Pair, stride: _Pair | None = None, padding: _Pair = 0, dilation: _Pair = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.nn.functional.max_pool2d_with_indices: max_pool2d that always returns (output, indices)."""
    return max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)


def avg_pool2d(
    input: torch.Tensor, kernel_size: _Pair, stride: _Pair | None = None, padding: _Pair = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> torch.Tensor:
    """torch.nn.functional.avg_pool2d.

    Args:
        input: floating-point [N, C, H, W] or [C, H, W].
        kernel_size, stride, padding, ceil_mode: as in max_pool2d; padding is with zeros.
        count_include_pad: divide by the window's extent with padding, clipped to H + padding where ceil_mode lets
            it reach further, instead of by the number of elements inside the input.
        divisor_override: divide by this instead.

    Returns:
        The mean of each window, [N, C, H_out, W_out] in input's dtype and memory format.

    Raises:
        RuntimeError, TypeError: as torch does.
    """
    try:
        column = _plain.column("avg_pool2d", input)
        if column is not None and input.dim() == 4:
            flat = _plain_window(kernel_size, stride, padding, 1)
            if flat is not None:
                settings = (flat[:6], ceil_mode, count_include_pad, divisor_override)
                return ops.pooling.run_avg(column, input, settings)
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    window = _window(kernel_size, stride, padding, 1)
    divisible = divisor_override is None or (isinstance(divisor_override, int) and divisor_override)
    if window is None or not _fits(input, window) or not divisible:
        return _hand_on(
            "avg_pool2d", _REFUSED, torch.nn.functional.avg_pool2d,
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
        )
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output = ops.pooling.avg_pool2d(batched, *window[:3], bool(ceil_mode), bool(count_include_pad), divisor_override)
    return output if input.dim() == 4 else output.squeeze(0)


def adaptive_avg_pool2d(input: torch.Tensor, output_size: int | Sequence[int | None]) -> torch.Tensor:
    """torch.nn.functional.adaptive_avg_pool2d.

    Args:
        input: floating-point [N, C, H, W] or [C, H, W].
        output_size: an int or (height, width), None for input's own.

    Returns:
        [N, C, *output_size] in input's dtype and memory format: output i is the mean of the elements from
        floor(i * H / H_out) up to ceil((i + 1) * H / H_out).

    Raises:
        RuntimeError, TypeError: as torch does.
    """
    try:
        column = _plain.column("adaptive_avg_pool2d", input)
        if column is not None and input.dim() == 4:
            extents = _plain.pair(output_size)
            if extents is not None:
                return ops.pooling.run_adaptive_avg(column, input, extents)
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    size: tuple[Any, ...] | None = None
    if isinstance(input, torch.Tensor) and input.is_floating_point() and input.dim() in (3, 4):
        if isinstance(output_size, int | torch.SymInt):
            size = (output_size, output_size)
        elif isinstance(output_size, tuple | list) and len(output_size) == 2:
            size = tuple(d if o is None else o for o, d in zip(output_size, input.shape[-2:]))
        if size is not None and (
            not all(isinstance(o, int | torch.SymInt) and o >= 0 for o in size) or any(d == 0 for d in input.shape[-3:])
        ):
            size = None
    if size is None:
        return _hand_on(
            "adaptive_avg_pool2d", _REFUSED, torch.nn.functional.adaptive_avg_pool2d, input, output_size
        )
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output = ops.pooling.adaptive_avg_pool2d(batched, size)
    return output if input.dim() == 4 else output.squeeze(0)
