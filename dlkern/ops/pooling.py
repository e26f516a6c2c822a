"""Pooling: schemas, fake kernels, autograd, dispatch.

Max pooling keeps one byte a window for its backward, the offset of the winner inside its window; torch's int64
indices are made only where they are asked for, or where a window has more than 256 elements, and by adaptive max
pooling always. The backwards of maxima and averages are linear in grad_output, so each is differentiated by its
adjoint: a gather for the maximum, the forward op itself for the average. Power averages are not linear in their input:
their second derivatives are the reference's. The 1-D functions are these ops on images of one row; `op` names the function
for trace().
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._layout import memory_format, suggests_channels_last
from dlkern.ops._registry import define, raw
from dlkern.reference import pooling as reference

__all__ = [
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "lp_pool2d", "max_pool2d", "output_size",
    "run_adaptive_avg", "run_adaptive_max", "run_avg", "run_lp", "run_max",
]  # fmt: skip

# What max_pool2d_forward's `indices` asks for.
NO_INDICES, WINDOW_OFFSETS, FLAT_INDICES = 0, 1, 2
_INDEX_DTYPE = {WINDOW_OFFSETS: torch.uint8, FLAT_INDICES: torch.int64}


# The raw ops take kernel size, stride, (not lp_pool2d) padding and (max_pool2d) dilation as one list, `window`: a list of
# ints costs about as much on its way from Python as pooling a small image does.


def output_size(size, kernel_size, stride, padding, dilation, ceil_mode):
    """Windows along one dimension; arithmetic only, so that symbolic sizes pass through."""
    last = size + 2 * padding - dilation * (kernel_size - 1) - 1  # where the last window may start, from -padding
    if not ceil_mode:
        return last // stride + 1
    # Rounded up, but a window must start inside the input or the left padding.
    return torch.sym_min((last + stride - 1) // stride, (size + padding - 1) // stride) + 1


def _empty(size, like, channels_last, dtype=None):
    return torch.empty(
        size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last)
    )


def _pooled(input, window, ceil_mode):
    extents = []
    for i in (0, 1):
        kernel_size, stride, padding, dilation = window[i::2]
        extents.append(output_size(input.shape[2 + i], kernel_size, stride, padding, dilation, ceil_mode))
    return [input.shape[0], input.shape[1], *extents]


def _max_forward_fake(input, window, ceil_mode, indices):
    size = _pooled(input, window, ceil_mode)
    channels_last = suggests_channels_last(input)
    output = _empty(size, input, channels_last)
    if indices == NO_INDICES:
        return output, torch.empty([0], dtype=torch.uint8, device=input.device)
    return output, _empty(size, input, channels_last, _INDEX_DTYPE[indices])


def _max_backward_fake(grad_output, indices, input_size, window, channels_last):
    return _empty(input_size, grad_output, channels_last)


def _avg_forward_fake(input, window, ceil_mode, count_include_pad, divisor_override):
    size = _pooled(input, [*window, 1, 1], ceil_mode)
    return _empty(size, input, suggests_channels_last(input))


def _avg_backward_fake(
    grad_output, input_size, window, ceil_mode, count_include_pad, divisor_override, channels_last
):
    return _empty(input_size, grad_output, channels_last)


def _adaptive_forward_fake(input, output_size):
    return _empty([input.shape[0], input.shape[1], *output_size], input, suggests_channels_last(input))


def _adaptive_backward_fake(grad_output, input_size, channels_last):
    return _empty(input_size, grad_output, channels_last)


def _adaptive_max_forward_fake(input, output_size):
    size = [input.shape[0], input.shape[1], *output_size]
    channels_last = suggests_channels_last(input)
    return _empty(size, input, channels_last), _empty(size, input, channels_last, torch.int64)


def _adaptive_max_backward_fake(grad_output, indices, input_size, channels_last):
    return _empty(input_size, grad_output, channels_last)


def _lp_forward_fake(input, norm, window, ceil_mode):
    return _empty(_pooled(input, [*window, 0, 0, 1, 1], ceil_mode), input, suggests_channels_last(input))


def _lp_backward_fake(grad_output, input, norm, window, ceil_mode):
    return _empty(input.shape, input, suggests_channels_last(input))


for _op, _schema, _fake in (
    (
        "max_pool2d_forward",
        "(Tensor input, int[] window, bool ceil_mode, int indices) -> (Tensor, Tensor)",
        _max_forward_fake,
    ),
    (
        "max_pool2d_backward",
        "(Tensor grad_output, Tensor indices, SymInt[] input_size, int[] window, bool channels_last) -> Tensor",
        _max_backward_fake,
    ),
    (
        "avg_pool2d_forward",
        "(Tensor input, int[] window, bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor",
        _avg_forward_fake,
    ),
    (
        "avg_pool2d_backward",
        "(Tensor grad_output, SymInt[] input_size, int[] window, bool ceil_mode, bool count_include_pad,"
        " int? divisor_override, bool channels_last) -> Tensor",
        _avg_backward_fake,
    ),
    ("adaptive_avg_pool2d_forward", "(Tensor input, SymInt[] output_size) -> Tensor", _adaptive_forward_fake),
    (
        "adaptive_avg_pool2d_backward",
        "(Tensor grad_output, SymInt[] input_size, bool channels_last) -> Tensor",
        _adaptive_backward_fake,
    ),
    ("adaptive_max_pool2d_forward", "(Tensor input, SymInt[] output_size) -> (Tensor, Tensor)", _adaptive_max_forward_fake),
    (
        "adaptive_max_pool2d_backward",
        "(Tensor grad_output, Tensor indices, SymInt[] input_size, bool channels_last) -> Tensor",
        _adaptive_max_backward_fake,
    ),
    ("lp_pool2d_forward", "(Tensor input, float norm, int[] window, bool ceil_mode) -> Tensor", _lp_forward_fake),
    (
        "lp_pool2d_backward",
        "(Tensor grad_output, Tensor input, float norm, int[] window, bool ceil_mode) -> Tensor",
        _lp_backward_fake,
    ),
):
    define(_op, _schema, _fake, triton=f"dlkern.kernels.{'_lp_pooling' if _op.startswith('lp_') else 'pooling'}:{_op}")
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}.items():
    for _op in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool"):
        columns.declare(f"{_op}1d", _column, _dtypes)
        columns.declare(f"{_op}2d", _column, _dtypes)


_max_forward, _max_backward = raw["max_pool2d_forward"], raw["max_pool2d_backward"]
_avg_forward, _avg_backward = raw["avg_pool2d_forward"], raw["avg_pool2d_backward"]
_adaptive_forward, _adaptive_backward = raw["adaptive_avg_pool2d_forward"], raw["adaptive_avg_pool2d_backward"]
_adaptive_max_forward, _adaptive_max_backward = raw["adaptive_max_pool2d_forward"], raw["adaptive_max_pool2d_backward"]
_lp_forward, _lp_backward = raw["lp_pool2d_forward"], raw["lp_pool2d_backward"]


def _pairs(window):
    """[a, b, c, d, ...] as (a, b), (c, d), ..."""
    return [tuple(window[i : i + 2]) for i in range(0, len(window), 2)]


class MaxPool2dBackward(_autograd.Function):
    """grad_input of grad_output; its adjoint picks the winners' elements."""

    @staticmethod
    def forward(grad_output, indices, input_size, window, channels_last, column):
        return _max_backward[column](grad_output, indices, input_size, window, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, indices, ctx.input_size, ctx.window, _, _ = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        flat = reference.flat_indices(indices, ctx.input_size[-1], *_pairs(ctx.window))
        picked = grad.flatten(2).gather(2, flat.flatten(2)).reshape(flat.shape)
        return picked, None, None, None, None, None


class MaxPool2d(_autograd.Function):
    @staticmethod
    def forward(input, window, ceil_mode, indices, column):
        return _max_forward[column](input, window, ceil_mode, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, window, _, _, column = inputs
        indices = output[1]
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.constants = input.shape, window, suggests_channels_last(input), column

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None, None, None
        (indices,) = ctx.saved_tensors
        size, window, channels_last, column = ctx.constants
        if torch.is_grad_enabled():
            grad_input = _autograd.apply(
                MaxPool2dBackward, grad_output, indices, size, window, channels_last, column
            )
        else:
            grad_input = _max_backward[column](grad_output, indices, size, window, channels_last)
        return grad_input, None, None, None, None


class _Linear(_autograd.Function):
    """An op whose backward is its adjoint and the other way round; `op` and `adjoint` are named by subclasses."""

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            gradient = _autograd.apply(ctx.adjoint, grad_output, *ctx.args)
        else:
            gradient = ctx.adjoint.forward(grad_output, *ctx.args)
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)


class AvgPool2d(_Linear):
    @staticmethod
    def forward(input, settings, column):
        return _avg_forward[column](input, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, settings, column = inputs
        ctx.adjoint = AvgPool2dBackward
        ctx.args = input.shape, settings, suggests_channels_last(input), column


class AvgPool2dBackward(_Linear):
    @staticmethod
    def forward(grad_output, input_size, settings, channels_last, column):
        return _avg_backward[column](grad_output, input_size, *settings, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, settings, _, column = inputs
        ctx.adjoint = AvgPool2d
        ctx.args = settings, column


class AdaptiveAvgPool2d(_Linear):
    @staticmethod
    def forward(input, output_size, column):
        return _adaptive_forward[column](input, output_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, column = inputs
        ctx.adjoint = AdaptiveAvgPool2dBackward
        ctx.args = input.shape, suggests_channels_last(input), column


class AdaptiveAvgPool2dBackward(_Linear):
    @staticmethod
    def forward(grad_output, input_size, channels_last, column):
        return _adaptive_backward[column](grad_output, input_size, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, _, _, column = inputs
        ctx.adjoint = AdaptiveAvgPool2d
        ctx.args = grad_output.shape[2:], column


class AdaptiveMaxPool2dBackward(_autograd.Function):
    """grad_input of grad_output; its adjoint picks the winners' elements."""

    @staticmethod
    def forward(grad_output, indices, input_size, channels_last, column):
        return _adaptive_max_backward[column](grad_output, indices, input_size, channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        picked = grad.flatten(2).gather(2, indices.flatten(2)).reshape(indices.shape)
        return picked, None, None, None, None


class AdaptiveMaxPool2d(_autograd.Function):
    @staticmethod
    def forward(input, output_size, column):
        return _adaptive_max_forward[column](input, output_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, column = inputs
        indices = output[1]
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.constants = input.shape, suggests_channels_last(input), column

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None, None
        (indices,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _autograd.apply(AdaptiveMaxPool2dBackward, grad_output, indices, *ctx.constants), None, None
        size, channels_last, column = ctx.constants
        return _adaptive_max_backward[column](grad_output, indices, size, channels_last), None, None


class LpPool2dBackward(_autograd.Function):
    """grad_input; its own derivatives are the reference's."""

    @staticmethod
    def forward(grad_output, input, settings, column):
        return _lp_backward[column](grad_output, input, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.settings, _ = inputs
        ctx.save_for_backward(grad_output, input)

    @staticmethod
    def backward(ctx, grad):
        norm, window, ceil_mode = ctx.settings

        def gradient(grad_output, input):
            return reference.lp_pool2d_backward(grad_output, input, norm, window[:2], window[2:], ceil_mode)

        return *_autograd.vjp(gradient, ctx.saved_tensors, grad), None, None


class LpPool2d(_autograd.Function):
    @staticmethod
    def forward(input, settings, column):
        return _lp_forward[column](input, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.settings, ctx.column = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _autograd.apply(LpPool2dBackward, grad_output, input, ctx.settings, ctx.column), None, None
        return _lp_backward[ctx.column](grad_output, input, *ctx.settings), None, None


def _choose(op: str, input: torch.Tensor) -> str:
    """The column for a call, recorded where a trace is open."""
    choice = columns.choose(op, input.device.type, input.dtype, columns.state.forced, columns.state.emulated)
    if tracing.active:
        tracing.record(op, choice.column, choice.reason, input)
    return choice.column


def max_pool2d(
    input: torch.Tensor, kernel_size: reference.Ints, stride: reference.Ints, padding: reference.Ints,
    dilation: reference.Ints, ceil_mode: bool, return_indices: bool, op: str = "max_pool2d",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum of each window of a 4-D input, and int64 indices (of no use unless return_indices)."""
    column = "reference" if _autograd.use_reference() else _choose(op, input)
    if column == "reference":
        return reference.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    window = (*kernel_size, *stride, *padding, *dilation)
    if _autograd.needs_grad(input):
        return _autograd.apply(MaxPool2d, input, window, ceil_mode, _kept_indices(window, return_indices), column)
    return _max_forward[column](input, window, ceil_mode, FLAT_INDICES if return_indices else NO_INDICES)


def _kept_indices(window, return_indices):
    """The kind of indices that a call with a backward to come makes."""
    return WINDOW_OFFSETS if window[0] * window[1] <= 256 and not return_indices else FLAT_INDICES


def run_max(column, input, window, ceil_mode, return_indices):
    """max_pool2d on a given column, for a plain call (see _plain.py)."""
    if input.requires_grad and _autograd.recording():
        return MaxPool2d.fast_apply(input, window, ceil_mode, _kept_indices(window, return_indices), column)
    return _max_forward[column](input, window, ceil_mode, FLAT_INDICES if return_indices else NO_INDICES)


def avg_pool2d(
    input: torch.Tensor, kernel_size: reference.Ints, stride: reference.Ints, padding: reference.Ints, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None, op: str = "avg_pool2d",
) -> torch.Tensor:
    """Average of each window of a 4-D input."""
    column = "reference" if _autograd.use_reference() else _choose(op, input)
    if column == "reference":
        return reference.avg_pool2d(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    settings = ((*kernel_size, *stride, *padding), ceil_mode, count_include_pad, divisor_override)
    if _autograd.needs_grad(input):
        return _autograd.apply(AvgPool2d, input, settings, column)
    return _avg_forward[column](input, *settings)


def run_avg(column, input, settings):
    """avg_pool2d on a given column, for a plain call (see _plain.py)."""
    if input.requires_grad and _autograd.recording():
        return AvgPool2d.fast_apply(input, settings, column)
    return _avg_forward[column](input, *settings)


def adaptive_avg_pool2d(
    input: torch.Tensor, output_size: reference.Ints, op: str = "adaptive_avg_pool2d"
) -> torch.Tensor:
    """Averages of output_size windows that cover a 4-D input."""
    if _autograd.use_reference():
        return reference.adaptive_avg_pool2d(input, output_size)
    column = _choose(op, input)
    if column == "reference":
        return reference.adaptive_avg_pool2d(input, output_size)
    if _autograd.needs_grad(input):
        return _autograd.apply(AdaptiveAvgPool2d, input, output_size, column)
    return _adaptive_forward[column](input, output_size)


def run_adaptive_avg(column, input, output_size):
    """adaptive_avg_pool2d on a given column, for a plain call (see _plain.py)."""
    if input.requires_grad and _autograd.recording():
        return AdaptiveAvgPool2d.fast_apply(input, output_size, column)
    return _adaptive_forward[column](input, output_size)


def adaptive_max_pool2d(
    input: torch.Tensor, output_size: reference.Ints, op: str = "adaptive_max_pool2d"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima of output_size windows that cover a 4-D input, and their int64 indices."""
    column = "reference" if _autograd.use_reference() else _choose(op, input)
    if column == "reference":
        return reference.adaptive_max_pool2d(input, output_size)
    if _autograd.needs_grad(input):
        return _autograd.apply(AdaptiveMaxPool2d, input, output_size, column)
    return _adaptive_max_forward[column](input, output_size)


def run_adaptive_max(column, input, output_size):
    """adaptive_max_pool2d on a given column, for a plain call (see _plain.py)."""
    if input.requires_grad and _autograd.recording():
        return AdaptiveMaxPool2d.fast_apply(input, output_size, column)
    return _adaptive_max_forward[column](input, output_size)


def lp_pool2d(
    input: torch.Tensor, norm: float, kernel_size: reference.Ints, stride: reference.Ints, ceil_mode: bool,
    op: str = "lp_pool2d",
) -> torch.Tensor:
    """Power average of each window of a 4-D input; the norm is finite and not 0."""
    column = "reference" if _autograd.use_reference() else _choose(op, input)
    if column == "reference":
        return reference.lp_pool2d(input, norm, kernel_size, stride, ceil_mode)
    settings = (norm, (*kernel_size, *stride), ceil_mode)
    if _autograd.needs_grad(input):
        return _autograd.apply(LpPool2d, input, settings, column)
    return _lp_forward[column](input, *settings)


def run_lp(column, input, settings):
    """lp_pool2d on a given column, for a plain call (see _plain.py)."""
    if input.requires_grad and _autograd.recording():
        return LpPool2d.fast_apply(input, settings, column)
    return _lp_forward[column](input, *settings)
