"""conv2d: schemas, fake kernels, autograd, dispatch.

The gradients with respect to the input and to the weight are ops of their own: each runs only where it is wanted,
and each is bilinear, so that its own derivative is the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._layout import memory_format, suggests_channels_last
from dlkern.ops._registry import define, raw
from dlkern.reference import conv as reference

__all__ = ["conv2d", "run"]


def _forward_fake(input, weight, bias, stride, padding, dilation, groups):
    size = [input.shape[0], weight.shape[0]]
    for i in (0, 1):
        extent = dilation[i] * (weight.shape[2 + i] - 1) + 1
        size.append((input.shape[2 + i] + 2 * padding[i] - extent) // stride[i] + 1)
    channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(channels_last))


def _backward_input_fake(grad_output, weight, input_size, stride, padding, dilation, groups, channels_last):
    return torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format(channels_last)
    )


def _backward_weight_fake(
    grad_output, input, weight_size, stride, padding, dilation, groups, bias, channels_last
):
    grad_weight = torch.empty(
        weight_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format(channels_last)
    )
    return grad_weight, grad_output.new_empty(grad_output.shape[1] if bias else 0)


define(
    "conv2d_forward",
    "(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    _forward_fake,
    triton="dlkern.kernels.conv:conv2d_forward",
)
define(
    "conv2d_backward_input",
    "(Tensor grad_output, Tensor weight, SymInt[] input_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool channels_last) -> Tensor",
    _backward_input_fake,
    triton="dlkern.kernels.conv:conv2d_backward_input",
)
define(
    "conv2d_backward_weight",
    "(Tensor grad_output, Tensor input, SymInt[] weight_size, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool bias, bool channels_last) -> (Tensor, Tensor)",
    _backward_weight_fake,
    triton="dlkern.kernels.conv:conv2d_backward_weight",
)
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}.items():
    columns.declare("conv2d", _column, _dtypes)


_forward, _backward_input, _backward_weight = (
    raw[op] for op in ("conv2d_forward", "conv2d_backward_input", "conv2d_backward_weight")
)
_grad_enabled = torch.is_grad_enabled


class Conv2dBackwardInput(_autograd.Function):
    """grad_input of grad_output and weight; its own derivatives are the reference's."""

    @staticmethod
    def forward(grad_output, weight, input_size, stride, padding, dilation, groups, channels_last, column):
        return _backward_input[column](
            grad_output, weight, input_size, stride, padding, dilation, groups, channels_last
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.settings = inputs[2:7]

    @staticmethod
    def backward(ctx, grad):
        gradients = _autograd.vjp(reference.conv2d_backward_input, (*ctx.saved_tensors, *ctx.settings), grad)
        return (*gradients[:2], None, None, None, None, None, None, None)


class Conv2dBackwardWeight(_autograd.Function):
    """grad_weight and grad_bias of grad_output and input; their own derivatives are the reference's."""

    @staticmethod
    def forward(grad_output, input, weight_size, stride, padding, dilation, groups, bias, channels_last, column):
        return _backward_weight[column](
            grad_output, input, weight_size, stride, padding, dilation, groups, bias, channels_last
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.settings = inputs[2:8]

    @staticmethod
    def backward(ctx, grad_weight, grad_bias):
        gradients = _autograd.vjp(
            reference.conv2d_backward_weight, (*ctx.saved_tensors, *ctx.settings), (grad_weight, grad_bias)
        )
        return (*gradients[:2], None, None, None, None, None, None, None, None)


class Conv2d(_autograd.Function):
    @staticmethod
    def forward(input, weight, bias, stride, padding, dilation, groups, column):
        return _forward[column](input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _bias, *settings, column = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(input if need[1] or need[2] else None, weight if need[0] else None)
        channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
        ctx.constants = need, input.shape, weight.shape, settings, channels_last, column

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        need, input_size, weight_size, settings, channels_last, column = ctx.constants
        need_input, need_weight, need_bias = need[:3]
        again = torch.is_grad_enabled()
        grad_input = grad_weight = grad_bias = None
        if need_input:
            if again:
                grad_input = _autograd.apply(
                    Conv2dBackwardInput, grad_output, weight, input_size, *settings, channels_last, column
                )
            else:
                grad_input = _backward_input[column](grad_output, weight, input_size, *settings, channels_last)
        if need_weight or need_bias:
            if again:
                grad_weight, grad_bias = _autograd.apply(
                    Conv2dBackwardWeight, grad_output, input, weight_size, *settings, need_bias, channels_last, column
                )
            else:
                grad_weight, grad_bias = _backward_weight[column](
                    grad_output, input, weight_size, *settings, need_bias, channels_last
                )
        return (
            grad_input,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            None, None, None, None, None,
        )  # fmt: skip


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Convolution of input [N, C, H, W] with weight [K, C/groups, R, S]; arguments are valid and in pairs."""
    if _autograd.use_reference():
        return reference.conv2d(input, weight, bias, stride, padding, dilation, groups)
    choice = columns.choose(
        "conv2d", input.device.type, input.dtype, columns.state.forced, columns.state.emulated,
        ("grouped",) if groups > 1 else (),
    )
    if tracing.active:
        tracing.record("conv2d", choice.column, choice.reason, input, weight, bias)
    if choice.column == "reference":
        return reference.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if _autograd.needs_grad(input, weight, bias):
        return _autograd.apply(Conv2d, input, weight, bias, stride, padding, dilation, groups, choice.column)
    return _forward[choice.column](input, weight, bias, stride, padding, dilation, groups)


def run(column, input, weight, bias, stride, padding, dilation, groups):
    """conv2d on a given column, for a plain call (see _plain.py)."""
    if _grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return Conv2d.fast_apply(input, weight, bias, stride, padding, dilation, groups, column)
    return _forward[column](input, weight, bias, stride, padding, dilation, groups)
