"""Pooling with torch.nn.functional's signatures.

A call that torch would refuse is handed to torch's own function, which raises its own exception before any kernel
starts; so is one on integers. trace() records those as "torch".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function

from dlkern import ops
from dlkern import trace as tracing
from dlkern.ops import _plain

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", "avg_pool1d", "avg_pool2d", "lp_pool1d", "lp_pool2d",
    "max_pool1d", "max_pool1d_with_indices", "max_pool2d", "max_pool2d_with_indices",
]  # fmt: skip

_Single = int | Sequence[int]
_Pair = int | Sequence[int]
_Two = tuple[Any, Any]  # int or SymInt
_Window = tuple[_Two, _Two, _Two, _Two]


def _hand_on(op: str, reason: str, function: Callable[..., Any], input: Any, *args: Any) -> Any:
    if tracing.active and isinstance(input, torch.Tensor):
        tracing.record(op, "torch", reason, input)
    return function(input, *args)


def _pair(value: Any, dims: int = 2, height: int = 1) -> _Two | None:
    """(height, width) of an int or a sequence of one or `dims`, None for anything else. In one dimension there is the
    width alone, and `height` stands before it."""
    if isinstance(value, int | torch.SymInt):
        value = (value,)
    if not isinstance(value, tuple | list) or len(value) not in (1, dims):
        return None
    if not all(isinstance(v, int | torch.SymInt) for v in value):
        return None
    return (value[0] if dims == 2 else height), value[-1]


def _plain_window(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...] | None:
    """The four in one list where each is an int or a tuple of two; the raw op checks their values."""
    kernel = _plain.pair(kernel_size)
    step = kernel if stride is None else _plain.pair(stride)
    pad, spread = _plain.pair(padding), _plain.pair(dilation)
    if kernel is None or step is None or pad is None or spread is None:
        return None
    return *kernel, *step, *pad, *spread


def _plain_row(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...] | None:
    """The same for a window over an image of one row, where each is an int or a tuple of one."""
    kernel = _plain.number(kernel_size)
    step = kernel if stride is None else _plain.number(stride)
    pad, spread = _plain.number(padding), _plain.number(dilation)
    if kernel is None or step is None or pad is None or spread is None:
        return None
    return 1, kernel, 1, step, 0, pad, 1, spread


def _window(kernel_size: Any, stride: Any, padding: Any, dilation: Any, dims: int = 2) -> _Window | None:
    """kernel_size, stride, padding and dilation as pairs; None where torch would refuse them."""
    kernel = _pair(kernel_size, dims)
    step = kernel if stride is None or (isinstance(stride, tuple | list) and not stride) else _pair(stride, dims)
    pad, spread = _pair(padding, dims, 0), _pair(dilation, dims)
    if kernel is None or step is None or pad is None or spread is None:
        return None
    if min(kernel) <= 0 or min(step) <= 0 or min(spread) <= 0 or min(pad) < 0:
        return None
    if 2 * pad[0] > kernel[0] or 2 * pad[1] > kernel[1]:
        return None
    return kernel, step, pad, spread


def _floating(input: Any, dims: int) -> bool:
    """Whether input is a floating-point batch or single image of `dims` dimensions, none empty but the batch's."""
    if not isinstance(input, torch.Tensor) or not input.is_floating_point():
        return False
    return input.dim() in (dims + 1, dims + 2) and all(size != 0 for size in input.shape[-dims - 1 :])


def _fits(input: Any, window: _Window, ceil_mode: Any, dims: int = 2) -> bool:
    """Whether input is such a tensor with at least one window; with ceil_mode one may end beyond the padding."""
    if not _floating(input, dims):
        return False
    kernel, step, pad, spread = window
    return all(
        input.shape[i - 2] + 2 * pad[i] + (step[i] - 1 if ceil_mode else 0) > spread[i] * (kernel[i] - 1)
        for i in range(2 - dims, 2)
    )


def _images(input: torch.Tensor, dims: int = 2) -> torch.Tensor:
    """input as [N, C, H, W]: a sequence is an image of one row."""
    image = input if dims == 2 else input.unsqueeze(-2)
    return image if input.dim() == dims + 2 else image.unsqueeze(0)


def _as_given(output: torch.Tensor, input: torch.Tensor, dims: int = 2) -> torch.Tensor:
    """output [N, C, H, W] with as many dimensions as input."""
    if input.dim() == dims + 1:
        output = output.squeeze(0)
    return output if dims == 2 else output.squeeze(-2)


_REFUSED = "an integer input, or arguments that torch refuses"


def _max_pool(
    dims: int, function: Callable[..., Any], input: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any,
    ceil_mode: bool, return_indices: bool,
) -> Any:
    """max_pool1d or max_pool2d the long way: any argument, any state of torch."""
    op, window = f"max_pool{dims}d", _window(kernel_size, stride, padding, dilation, dims)
    if window is None or not _fits(input, window, ceil_mode, dims):
        return _hand_on(
            op, _REFUSED, function, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    results = ops.pooling.max_pool2d(_images(input, dims), *window, bool(ceil_mode), bool(return_indices), op)
    output = _as_given(results[0], input, dims)
    return (output, _as_given(results[1], input, dims)) if return_indices else output


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
    if _plain.overridden(input):
        settings = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return handle_torch_function(max_pool2d, (input,), input, *settings)
    function = torch.nn.functional.max_pool2d
    return _max_pool(2, function, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


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
    if _plain.overridden(input):
        given = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return handle_torch_function(avg_pool2d, (input,), input, *given)
    divisible = divisor_override is None or (isinstance(divisor_override, int) and divisor_override)
    window = _window(kernel_size, stride, padding, 1) if divisible else None
    if window is None or not _fits(input, window, ceil_mode):
        return _hand_on(
            "avg_pool2d", _REFUSED, torch.nn.functional.avg_pool2d,
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
        )
    output = ops.pooling.avg_pool2d(
        _images(input), *window[:3], bool(ceil_mode), bool(count_include_pad), divisor_override
    )
    return _as_given(output, input)


def _adaptive_size(input: Any, output_size: Any, dims: int) -> _Two | None:
    """output_size as (height, width), None where torch would refuse it or the input."""
    if not _floating(input, dims):
        return None
    size = _pair(output_size, dims) if isinstance(output_size, int | torch.SymInt) or dims == 1 else None
    if size is None and dims == 2 and isinstance(output_size, tuple | list) and len(output_size) == 2:
        size = tuple(d if o is None else o for o, d in zip(output_size, input.shape[-2:]))  # type: ignore[assignment]
    if size is None or not all(isinstance(o, int | torch.SymInt) and o >= 0 for o in size):
        return None
    return size


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
    if _plain.overridden(input):
        return handle_torch_function(adaptive_avg_pool2d, (input,), input, output_size)
    size = _adaptive_size(input, output_size, 2)
    if size is None:
        return _hand_on(
            "adaptive_avg_pool2d", _REFUSED, torch.nn.functional.adaptive_avg_pool2d, input, output_size
        )
    return _as_given(ops.pooling.adaptive_avg_pool2d(_images(input), size), input)


def _adaptive_max_pool(dims: int, function: Callable[..., Any], input: Any, output_size: Any, return_indices: bool) -> Any:
    """adaptive_max_pool1d or adaptive_max_pool2d the long way."""
    op, size = f"adaptive_max_pool{dims}d", _adaptive_size(input, output_size, dims)
    if size is None:
        return _hand_on(op, _REFUSED, function, input, output_size, return_indices)
    results = ops.pooling.adaptive_max_pool2d(_images(input, dims), size, op)
    output = _as_given(results[0], input, dims)
    return (output, _as_given(results[1], input, dims)) if return_indices else output


def adaptive_max_pool2d(
    input: torch.Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> Any:
    """torch.nn.functional.adaptive_max_pool2d.

    Args:
        input: floating-point [N, C, H, W] or [C, H, W].
        output_size: an int or (height, width), None for input's own.
        return_indices: return (output, indices) instead of output.

    Returns:
        [N, C, *output_size] in input's dtype and memory format: output i is the largest of the elements from
        floor(i * H / H_out) up to ceil((i + 1) * H / H_out), NaN where there is one; indices as in max_pool2d.

    Raises:
        RuntimeError, TypeError: as torch does.
    """
    try:
        column = _plain.column("adaptive_max_pool2d", input)
        if column is not None and input.dim() == 4:
            extents = _plain.pair(output_size)
            if extents is not None:
                results = ops.pooling.run_adaptive_max(column, input, extents)
                return results if return_indices else results[0]
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    return _adaptive_max_pool(2, torch.nn.functional.adaptive_max_pool2d, input, output_size, return_indices)


def adaptive_max_pool2d_with_indices(
    input: torch.Tensor, output_size: int | Sequence[int | None], return_indices: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.nn.functional.adaptive_max_pool2d_with_indices: adaptive_max_pool2d that always returns (output, indices)."""
    return adaptive_max_pool2d(input, output_size, True)


def _lp_pool(
    dims: int, function: Callable[..., torch.Tensor], input: Any, norm_type: Any, kernel_size: Any, stride: Any,
    ceil_mode: bool,
) -> torch.Tensor:
    """lp_pool1d or lp_pool2d the long way."""
    op = f"lp_pool{dims}d"
    # torch multiplies by the window's size: one int for a sequence, an int or exactly two for an image.
    whole = isinstance(kernel_size, int | torch.SymInt) or (
        dims == 2 and isinstance(kernel_size, tuple | list) and len(kernel_size) == 2
    )
    window = _window(kernel_size, stride, 0, 1, dims) if whole else None
    known = isinstance(norm_type, int | float) and norm_type != 0 and norm_type == norm_type
    if window is None or not known or not _fits(input, window, ceil_mode, dims):
        return _hand_on(op, _REFUSED, function, input, norm_type, kernel_size, stride, ceil_mode)
    if abs(norm_type) == math.inf:  # the largest magnitude, or the smallest
        larger = torch.nn.functional.max_pool1d if dims == 1 else torch.nn.functional.max_pool2d
        sign = 1 if norm_type > 0 else -1
        pooled = _max_pool(dims, larger, sign * input.abs(), kernel_size, stride, 0, 1, ceil_mode, False)
        return sign * pooled
    if input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype != torch.float64:
        input = input.float()  # as torch's pow does there
    kernel, step, _, _ = window
    output = ops.pooling.lp_pool2d(_images(input, dims), float(norm_type), kernel, step, bool(ceil_mode), op)
    return _as_given(output, input, dims)


def lp_pool2d(
    input: torch.Tensor, norm_type: int | float, kernel_size: _Pair, stride: _Pair | None = None, ceil_mode: bool = False
) -> torch.Tensor:
    """torch.nn.functional.lp_pool2d.

    Args:
        input: floating-point [N, C, H, W] or [C, H, W].
        norm_type: the power p, not 0; infinity takes the largest magnitude, minus infinity the smallest.
        kernel_size, stride, ceil_mode: as in max_pool2d, without padding.

    Returns:
        (sum over the window of x^p)^(1/p), [N, C, H_out, W_out] in input's dtype and memory format; NaN where a power
        of a negative number is. A window that ceil_mode lets reach beyond the input counts its mean as often as a whole
        one has elements. Where the sum is zero, so is the gradient.

    Raises:
        RuntimeError, TypeError, ValueError, ZeroDivisionError: as torch does.
    """
    try:
        column = _plain.column("lp_pool2d", input)
        if column is not None and input.dim() == 4 and type(norm_type) in (int, float) and math.isfinite(norm_type):
            kernel = _plain.pair(kernel_size)
            step = kernel if stride is None else _plain.pair(stride)
            if kernel is not None and step is not None:
                return ops.pooling.run_lp(column, input, (float(norm_type), (*kernel, *step), ceil_mode))
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    return _lp_pool(2, torch.nn.functional.lp_pool2d, input, norm_type, kernel_size, stride, ceil_mode)


# --- one dimension: images of one row ---------------------------------------------------------------------------------


def max_pool1d(
    input: torch.Tensor, kernel_size: _Single, stride: _Single | None = None, padding: _Single = 0,
    dilation: _Single = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Any:
    """torch.nn.functional.max_pool1d: max_pool2d of [N, C, L] or [C, L]; arguments are ints or one int each.

    Returns:
        [N, C, L_out]; indices are int64 positions in L. As in torch, an output alone, of which no gradient is asked, is
        contiguous.

    Raises:
        RuntimeError, TypeError: as torch does.
    """
    try:
        column = _plain.column("max_pool1d", input)
        if column is not None and input.dim() == 3:
            row = _plain_row(kernel_size, stride, padding, dilation)
            if row is not None:
                output, indices = ops.pooling.run_max(column, input.unsqueeze(2), row, ceil_mode, return_indices)
                if return_indices:
                    return output.squeeze(2), indices.squeeze(2)
                return output.squeeze(2) if output.requires_grad else output.squeeze(2).contiguous()
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    function = torch.nn.functional.max_pool1d
    results = _max_pool(1, function, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return results if return_indices or results.requires_grad else results.contiguous()


def max_pool1d_with_indices(
    input: torch.Tensor, kernel_size: _Single, stride: _Single | None = None, padding: _Single = 0,
    dilation: _Single = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.nn.functional.max_pool1d_with_indices: max_pool1d that always returns (output, indices)."""
    return max_pool1d(input, kernel_size, stride, padding, dilation, ceil_mode, True)


def avg_pool1d(
    input: torch.Tensor, kernel_size: _Single, stride: _Single | None = None, padding: _Single = 0,
    ceil_mode: bool = False, count_include_pad: bool = True,
) -> torch.Tensor:
    """torch.nn.functional.avg_pool1d: avg_pool2d of [N, C, L] or [C, L], as [N, C, L_out].

    Raises:
        RuntimeError, TypeError: as torch does.
    """
    try:
        column = _plain.column("avg_pool1d", input)
        if column is not None and input.dim() == 3:
            row = _plain_row(kernel_size, stride, padding, 1)
            if row is not None:
                settings = (row[:6], ceil_mode, count_include_pad, None)
                return ops.pooling.run_avg(column, input.unsqueeze(2), settings).squeeze(2)
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    window = _window(kernel_size, stride, padding, 1, 1)
    if window is None or not _fits(input, window, ceil_mode, 1):
        return _hand_on(
            "avg_pool1d", _REFUSED, torch.nn.functional.avg_pool1d,
            input, kernel_size, stride, padding, ceil_mode, count_include_pad,
        )
    output = ops.pooling.avg_pool2d(
        _images(input, 1), *window[:3], bool(ceil_mode), bool(count_include_pad), None, "avg_pool1d"
    )
    return _as_given(output, input, 1)


def adaptive_avg_pool1d(input: torch.Tensor, output_size: _Single) -> torch.Tensor:
    """torch.nn.functional.adaptive_avg_pool1d: adaptive_avg_pool2d of [N, C, L] or [C, L], as [N, C, output_size].

    Raises:
        RuntimeError, TypeError: as torch does.
    """
    try:
        column = _plain.column("adaptive_avg_pool1d", input)
        if column is not None and input.dim() == 3:
            extent = _plain.number(output_size)
            if extent is not None:
                return ops.pooling.run_adaptive_avg(column, input.unsqueeze(2), (1, extent)).squeeze(2)
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    size = _adaptive_size(input, output_size, 1)
    if size is None:
        return _hand_on(
            "adaptive_avg_pool1d", _REFUSED, torch.nn.functional.adaptive_avg_pool1d, input, output_size
        )
    return _as_given(ops.pooling.adaptive_avg_pool2d(_images(input, 1), size, "adaptive_avg_pool1d"), input, 1)


def adaptive_max_pool1d(input: torch.Tensor, output_size: _Single, return_indices: bool = False) -> Any:
    """torch.nn.functional.adaptive_max_pool1d: adaptive_max_pool2d of [N, C, L] or [C, L], as [N, C, output_size].

    Raises:
        RuntimeError, TypeError: as torch does.
    """
    try:
        column = _plain.column("adaptive_max_pool1d", input)
        if column is not None and input.dim() == 3:
            extent = _plain.number(output_size)
            if extent is not None:
                output, indices = ops.pooling.run_adaptive_max(column, input.unsqueeze(2), (1, extent))
                return (output.squeeze(2), indices.squeeze(2)) if return_indices else output.squeeze(2)
    except _plain.REFUSALS:
        pass  # the long way hands on to torch
    return _adaptive_max_pool(1, torch.nn.functional.adaptive_max_pool1d, input, output_size, return_indices)


def adaptive_max_pool1d_with_indices(
    input: torch.Tensor, output_size: _Single, return_indices: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.nn.functional.adaptive_max_pool1d_with_indices: adaptive_max_pool1d that always returns both."""
    return adaptive_max_pool1d(input, output_size, True)


def lp_pool1d(
    input: torch.Tensor, norm_type: int | float, kernel_size: int, stride: _Single | None = None, ceil_mode: bool = False
) -> torch.Tensor:
    """torch.nn.functional.lp_pool1d: lp_pool2d of [N, C, L] or [C, L], as [N, C, L_out].

    Raises:
        RuntimeError, TypeError, ZeroDivisionError: as torch does.
    """
    return _lp_pool(1, torch.nn.functional.lp_pool1d, input, norm_type, kernel_size, stride, ceil_mode)
