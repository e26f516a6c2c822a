"""Convolution with torch.nn.functional's signature."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function

from dlkern import ops
from dlkern import trace as tracing
from dlkern.nn.functional._autocast import autocasts, lowered
from dlkern.ops import _plain
from dlkern.ops._activation import Activation
from dlkern.reference.linear import activate

__all__ = ["conv1d", "conv2d", "conv2d_act", "conv_transpose1d", "conv_transpose2d"]


_Numbers = tuple[int, ...]


def _numbers(value: Any, dims: int) -> _Numbers | None:
    """An int, or one or `dims` of them, as `dims` ints; None for what torch has to judge."""
    try:
        if isinstance(value, tuple | list):
            if len(value) == dims:
                return tuple(operator.index(v) for v in value)
            if len(value) != 1:
                return None
            value = value[0]
        return None if isinstance(value, bool) else (operator.index(value),) * dims
    except TypeError:
        return None


def _unfit(
    dims: int, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_channels: int,
    positive: tuple[_Numbers | None, ...], natural: tuple[_Numbers | None, ...], groups: int,
) -> str | None:
    """Why a call is torch's to answer whatever the geometry: input and weight batched, settings in two kinds."""
    if None in positive or None in natural or type(groups) is not int:
        return "arguments are not integers, one or one a dimension"
    if weight.dim() != dims + 2 or input.dim() != dims + 2:
        return f"input is not {dims + 1}-D or {dims + 2}-D, or weight not {dims + 2}-D"
    dtype = input.dtype
    if not dtype.is_floating_point:
        return f"no kernel for {dtype}"
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return "dtypes differ"
    if weight.device != input.device or (bias is not None and bias.device != input.device):
        return "devices differ"
    if input.layout != torch.strided or weight.layout != torch.strided:
        return "a tensor is not strided"
    if groups <= 0 or min(v for p in positive if p for v in p) <= 0 or min(v for n in natural if n for v in n) < 0:
        return "a setting is not positive"
    if any(size == 0 for size in (*input.shape[1:], *weight.shape)):
        return "a dimension is zero"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_channels):
        return "bias has not one element an output channel"
    return None


def _hand_on(name: str, function: Callable[..., torch.Tensor], reason: str, *args: Any) -> torch.Tensor:
    if tracing.active and isinstance(args[0], torch.Tensor) and isinstance(args[1], torch.Tensor):
        tracing.record(name, "torch", reason, *args[:3])
    return function(*args)


def _row(x: torch.Tensor) -> torch.Tensor:
    """A sequence [N, C, L] as a one-row image. As in torch, its layout does not matter to the result's, the weight's does."""
    return x.contiguous().unsqueeze(2)


def _convolution(
    dims: int, function: Callable[..., torch.Tensor], input: Any, weight: Any, bias: Any, stride: Any, padding: Any,
    dilation: Any, groups: Any, activation: int = 0, residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """conv1d or conv2d (or conv2d_act) the long way: any argument, any state of torch."""
    name, original = f"conv{dims}d", (input, weight, bias, stride, padding, dilation, groups)
    if not (isinstance(input, torch.Tensor) and isinstance(weight, torch.Tensor)):
        return function(*original)
    input, weight, bias = lowered(input, weight, bias)
    step, spread = _numbers(stride, dims), _numbers(dilation, dims)
    before: list[int] = []  # zeros in front of a symmetric padding's: of the last dimension first, left and right
    if isinstance(padding, str):
        pad: _Numbers | None = (0,) * dims if padding == "valid" else None
        if padding == "same" and step == (1,) * dims and spread is not None and weight.dim() == dims + 2:
            total = [spread[i] * (weight.shape[2 + i] - 1) for i in range(dims)]
            pad = tuple(t // 2 for t in total)
            if any(t % 2 for t in total):
                before = [side for t in reversed(total) for side in (0, t % 2)]
    else:
        pad = _numbers(padding, dims)
    unbatched = input.dim() == dims + 1
    x = input.unsqueeze(0) if unbatched else input
    out_channels = weight.shape[0] if weight.dim() else 0
    reason = _unfit(dims, x, weight, bias, out_channels, (step, spread), (pad,), groups)
    if reason is None:
        assert step is not None and pad is not None and spread is not None
        extra = before[1::2][::-1] or [0] * dims
        if x.shape[1] != weight.shape[1] * groups or out_channels % groups != 0:
            reason = "channels do not fit the groups"
        for i in range(dims):
            if x.shape[2 + i] + 2 * pad[i] + extra[i] < spread[i] * (weight.shape[2 + i] - 1) + 1:
                reason = "the kernel is larger than the padded input"
    if reason is not None:
        output = _hand_on(name, function, reason, *original)
        return activate(output if residual is None else output + residual, activation)
    assert step is not None and pad is not None and spread is not None
    if before:
        x = torch.nn.functional.pad(x, before)
    if dims == 1:
        settings = ((1, *step), (0, *pad), (1, *spread), groups, name)
        output = ops.conv.conv2d(_row(x), weight.unsqueeze(2), bias, *settings).squeeze(2)
    elif activation == 0 and residual is None:
        output = ops.conv.conv2d(x, weight, bias, step, pad, spread, groups, name)
    elif residual is not None and residual.dtype != x.dtype:  # under autocast: then the sum has the wider dtype
        output = ops.conv.conv2d(x, weight, bias, step, pad, spread, groups, name)
        return activate((output.squeeze(0) if unbatched else output) + residual, activation)
    else:
        extra_batch = residual is not None and unbatched
        output = ops.conv.conv2d_act(
            x, weight, bias, residual.unsqueeze(0) if extra_batch else residual,  # type: ignore[union-attr]
            step, pad, spread, groups, activation,
        )  # fmt: skip
    return output.squeeze(0) if unbatched else output


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """torch.nn.functional.conv1d, on conv2d's kernels: a sequence is an image of one row.

    Args:
        input: [N, C, L] or [C, L]; float32, bfloat16, float16 or float64; any strides.
        weight: [K, C / groups, S].
        bias: [K] or None.
        stride, padding, dilation, groups: as in conv2d, for one dimension.

    Returns:
        [N, K, Q] with Q = (L + 2·padding - dilation·(S - 1) - 1) // stride + 1.

    Raises:
        RuntimeError, TypeError: torch's own, for wrong arguments.
    """
    try:
        column = _plain.column("conv2d", input, ("grouped",) if groups > 1 else ())
        if column is not None and input.dim() == 3 and weight.dim() == 3:
            step, pad, spread = _plain.number(stride), _plain.number(padding), _plain.number(dilation)
            if step is not None and pad is not None and spread is not None and type(groups) is int:
                settings = ((1, step), (0, pad), (1, spread), groups)
                return ops.conv.run(column, _row(input), weight.unsqueeze(2), bias, *settings).squeeze(2)
    except _plain.REFUSALS:
        pass  # the long way says what is wrong
    if _plain.overridden(input, weight, bias):
        given = (stride, padding, dilation, groups)
        return handle_torch_function(conv1d, (input, weight, bias), input, weight, bias, *given)
    return _convolution(1, torch.nn.functional.conv1d, input, weight, bias, stride, padding, dilation, groups)


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
        input: [N, C, H, W] or [C, H, W]; float32, bfloat16, float16 or float64; any strides.
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
    if _plain.overridden(input, weight, bias):
        given = (stride, padding, dilation, groups)
        return handle_torch_function(conv2d, (input, weight, bias), input, weight, bias, *given)
    return _convolution(2, torch.nn.functional.conv2d, input, weight, bias, stride, padding, dilation, groups)


def conv2d_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    activation: Activation | str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(conv2d(input) + residual), the last steps taken while the result is in the cache; torch has no such
    function.

    Args:
        input, ..., groups: as in conv2d.
        activation: dlkern.Activation (or its name) to apply at the end, or None.
        residual: tensor of the result's shape and dtype that is added before the activation, or None.

    Returns:
        As conv2d.

    Raises:
        ValueError: an unknown activation, a residual of another shape or dtype.
        RuntimeError, TypeError: what conv2d raises.
    """
    code = 0 if activation is None else int(Activation.of(activation))
    if residual is not None and isinstance(input, torch.Tensor):
        fits = isinstance(residual, torch.Tensor) and residual.dim() == input.dim() and residual.device == input.device
        if not fits or (residual.dtype != input.dtype and not autocasts(input)):
            got = f"{residual.dim()}-D {residual.dtype}" if isinstance(residual, torch.Tensor) else type(residual).__name__
            raise ValueError(f"residual: expected a {input.dim()}-D {input.dtype} tensor like the result, got {got}")
        size = result_size(input, weight, stride, padding, dilation)
        if size is not None and residual.shape != size:
            raise ValueError(f"residual: expected the result's size {size}, got {tuple(residual.shape)}")
    function = torch.nn.functional.conv2d
    return _convolution(2, function, input, weight, bias, stride, padding, dilation, groups, code, residual)


def result_size(input: Any, weight: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...] | None:
    """Size of a conv2d's result; None where torch has to judge the arguments."""
    step, spread = _numbers(stride, 2), _numbers(dilation, 2)
    tensors = isinstance(weight, torch.Tensor) and weight.dim() == 4 and input.dim() in (3, 4)
    if not tensors or step is None or spread is None or min(step) <= 0:
        return None
    if padding == "same":
        return (*input.shape[:-3], weight.shape[0], *input.shape[-2:])
    pad = (0, 0) if padding == "valid" else _numbers(padding, 2)
    if pad is None:
        return None
    sizes = (
        (input.shape[i - 2] + 2 * pad[i] - spread[i] * (weight.shape[2 + i] - 1) - 1) // step[i] + 1 for i in (0, 1)
    )
    return (*input.shape[:-3], weight.shape[0], *sizes)


def _transposed(
    dims: int, function: Callable[..., torch.Tensor], input: Any, weight: Any, bias: Any, stride: Any, padding: Any,
    output_padding: Any, groups: Any, dilation: Any,
) -> torch.Tensor:
    """conv_transpose1d or conv_transpose2d the long way."""
    name, original = f"conv_transpose{dims}d", (input, weight, bias, stride, padding, output_padding, groups, dilation)
    if not (isinstance(input, torch.Tensor) and isinstance(weight, torch.Tensor)):
        return function(*original)
    input, weight, bias = lowered(input, weight, bias)
    step, spread = _numbers(stride, dims), _numbers(dilation, dims)
    pad, more = _numbers(padding, dims), _numbers(output_padding, dims)
    unbatched = input.dim() == dims + 1
    x = input.unsqueeze(0) if unbatched else input
    out_channels = weight.shape[1] * groups if weight.dim() > 1 and type(groups) is int else 0
    reason = _unfit(dims, x, weight, bias, out_channels, (step, spread), (pad, more), groups)
    if reason is None:
        assert step is not None and pad is not None and spread is not None and more is not None
        if x.shape[1] != weight.shape[0] or weight.shape[0] % groups != 0:
            reason = "channels do not fit the groups"
        for i in range(dims):
            reach = spread[i] * (weight.shape[2 + i] - 1) + more[i] + 1
            if more[i] >= max(step[i], spread[i]):
                reason = "output_padding is not below stride or dilation"
            elif (x.shape[2 + i] - 1) * step[i] - 2 * pad[i] + reach <= 0:
                reason = "the output would have no elements"
    if reason is not None:
        return _hand_on(name, function, reason, *original)
    assert step is not None and pad is not None and spread is not None and more is not None
    if any(m >= s for m, s in zip(more, step)):
        # Whole strides of output_padding are what further elements of the input, all zero, would reach.
        x = torch.nn.functional.pad(x, [side for m, s in reversed([*zip(more, step)]) for side in (0, m // s)])
        more = tuple(m % s for m, s in zip(more, step))
    if dims == 1:
        settings = ((1, *step), (0, *pad), (0, *more), groups, (1, *spread), name)
        output = ops.conv.conv_transpose2d(_row(x), weight.unsqueeze(2), bias, *settings).squeeze(2)
    else:
        output = ops.conv.conv_transpose2d(x, weight, bias, step, pad, more, groups, spread, name)
    return output.squeeze(0) if unbatched else output


def conv_transpose1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> torch.Tensor:
    """torch.nn.functional.conv_transpose1d, on conv_transpose2d's kernels: a sequence is an image of one row.

    Args:
        input: [N, C, L] or [C, L]; float32, bfloat16, float16 or float64; any strides.
        weight: [C, K / groups, S].
        bias: [K] or None.
        stride, padding, output_padding, groups, dilation: as in conv_transpose2d, for one dimension.

    Returns:
        [N, K, M] with M = (L - 1)·stride - 2·padding + dilation·(S - 1) + output_padding + 1.

    Raises:
        RuntimeError, TypeError: torch's own, for wrong arguments.
    """
    function = torch.nn.functional.conv_transpose1d
    return _transposed(1, function, input, weight, bias, stride, padding, output_padding, groups, dilation)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
) -> torch.Tensor:
    """torch.nn.functional.conv_transpose2d: the gradient of a conv2d by its input, as a layer that enlarges images.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, bfloat16, float16 or float64; any strides.
        weight: [C, K / groups, R, S].
        bias: [K] or None.
        stride: step in the output between neighbouring inputs, an int, or one for each of height and width.
        padding: rows and columns cut off each side of the output.
        output_padding: rows and columns added at the bottom and the right; below stride or dilation.
        groups: blocked connections: C / groups channels feed K / groups outputs each.
        dilation: step between the elements of the kernel.

    Returns:
        [N, K, P, Q] with P = (H - 1)·stride - 2·padding + dilation·(R - 1) + output_padding + 1, in channels_last where
        the input or the weight is:  y[n,k,p,q] = bias[k] + sum over c and all i, j, r, s with
        p = i·stride - padding + r·dilation, q = j·stride - padding + s·dilation of weight[c,k,r,s] · x[n,c,i,j].
        Dumoulin & Visin 2016, "A guide to convolution arithmetic for deep learning", chapter 4.

    Raises:
        RuntimeError, TypeError: torch's own, for wrong arguments.
    """
    try:
        column = _plain.column("conv_transpose2d", input, ("grouped",) if groups > 1 else ())
        if column is not None and input.dim() == 4:
            step, pad, spread = _plain.pair(stride), _plain.pair(padding), _plain.pair(dilation)
            more = _plain.pair(output_padding)
            known = step is not None and pad is not None and spread is not None and more is not None
            if known and more[0] < step[0] and more[1] < step[1] and type(groups) is int:  # type: ignore[index]
                return ops.conv.run_transpose(column, input, weight, bias, step, pad, more, groups, spread)
    except _plain.REFUSALS:
        pass  # the long way says what is wrong
    function = torch.nn.functional.conv_transpose2d
    return _transposed(2, function, input, weight, bias, stride, padding, output_padding, groups, dilation)
