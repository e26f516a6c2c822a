"""conv2d and conv_transpose2d: schemas, fake kernels, autograd, dispatch.

The gradients with respect to the input and to the weight are ops of their own: each runs only where it is wanted,
and each is bilinear, so that its own derivative is the reference's. conv_transpose2d is the input gradient of a
convolution, with a bias; its own gradients are that convolution and its weight gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._layout import memory_format, suggests_channels_last
from dlkern.ops._registry import define, raw
from dlkern.ops.linear import ActivationBackward
from dlkern.reference import conv as reference

__all__ = ["conv2d", "conv2d_act", "conv_transpose2d", "forward_packed", "pack", "run", "run_transpose"]


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


def _transpose_forward_fake(input, weight, bias, stride, padding, output_padding, groups, dilation):
    size = [input.shape[0], weight.shape[1] * groups]
    for i in (0, 1):
        reach = dilation[i] * (weight.shape[2 + i] - 1) + output_padding[i] + 1
        size.append((input.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach)
    channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(channels_last))


def _act_forward_fake(input, weight, bias, residual, stride, padding, dilation, groups, activation):
    return _forward_fake(input, weight, bias, stride, padding, dilation, groups)


def _pack_fake(weight, groups):
    # How far channels are padded depends on the instruction set.
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(size, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)


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
define(
    "conv2d_backward_bias", "(Tensor grad_output) -> Tensor", lambda grad_output: grad_output.new_empty(grad_output.shape[1]),
    triton="dlkern.kernels.conv:conv2d_backward_bias",
)
define(
    "conv_transpose2d_forward",
    "(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] output_padding, int groups, "
    "int[] dilation) -> Tensor",
    _transpose_forward_fake,
    triton="dlkern.kernels.conv:conv_transpose2d_forward",
)
# For weights that stay (dlkern.freeze): what the dense kernel reads, made once. The CPU column alone has these.
define("conv2d_pack", "(Tensor weight, int groups) -> Tensor", _pack_fake)
define(
    "conv2d_forward_packed",
    "(Tensor input, Tensor weight, Tensor packed, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int groups, int activation) -> Tensor",
    lambda input, weight, packed, *rest: _act_forward_fake(input, weight, *rest),
)
define(
    "conv2d_act_forward",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
    "int groups, int activation) -> Tensor",
    _act_forward_fake,
    triton="dlkern.kernels.conv:conv2d_act_forward",
)
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}.items():
    for _op in ("conv2d", "conv_transpose2d"):
        columns.declare(_op, _column, _dtypes)


_forward, _backward_input, _backward_weight, _backward_bias, _act_forward, _transpose_forward = (
    raw[op]
    for op in (
        "conv2d_forward", "conv2d_backward_input", "conv2d_backward_weight", "conv2d_backward_bias", "conv2d_act_forward",
        "conv_transpose2d_forward",
    )
)  # fmt: skip
_activation_backward = raw["activation_backward"]
pack, forward_packed = raw["conv2d_pack"]["cpu"], raw["conv2d_forward_packed"]["cpu"]


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


def _gradients(grad_output, input, weight, need, input_size, weight_size, settings, channels_last, column):
    """grad_input, grad_weight and grad_bias, each where it is needed; differentiable where the grad mode asks for it."""
    again = torch.is_grad_enabled()
    grad_input = grad_weight = grad_bias = None
    if need[0]:
        args = (grad_output, weight, input_size, *settings, channels_last)
        grad_input = _autograd.apply(Conv2dBackwardInput, *args, column) if again else _backward_input[column](*args)
    if need[1] or need[2]:
        args = (grad_output, input, weight_size, *settings, need[2], channels_last)
        both = _autograd.apply(Conv2dBackwardWeight, *args, column) if again else _backward_weight[column](*args)
        grad_weight, grad_bias = both
    return grad_input, grad_weight if need[1] else None, grad_bias if need[2] else None


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
        return *_gradients(grad_output, input, weight, *ctx.constants), None, None, None, None, None


class Conv2dAct(_autograd.Function):
    """activation(conv2d(input) + residual). The activation's derivative comes from the output, which is kept."""

    @staticmethod
    def forward(input, weight, bias, residual, stride, padding, dilation, groups, activation, column):
        return _act_forward[column](input, weight, bias, residual, stride, padding, dilation, groups, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _bias, _residual, *settings, activation, column = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(
            input if need[1] or need[2] else None, weight if need[0] else None, output if activation else None
        )
        channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
        ctx.constants = need, input.shape, weight.shape, settings, channels_last, column
        ctx.activation = activation

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, output = ctx.saved_tensors
        constants, activation = ctx.constants, ctx.activation
        need, column = constants[0], constants[-1]
        if activation and torch.is_grad_enabled():
            grad_output = _autograd.apply(ActivationBackward, grad_output, output, activation, column)
        elif activation:
            grad_output = _activation_backward[column](grad_output, output, activation)
        gradients = _gradients(grad_output, input, weight, *constants)
        return *gradients, grad_output if need[3] else None, None, None, None, None, None, None


class ConvTranspose2d(_autograd.Function):
    @staticmethod
    def forward(input, weight, bias, stride, padding, output_padding, groups, dilation, column):
        return _transpose_forward[column](input, weight, bias, stride, padding, output_padding, groups, dilation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _bias, stride, padding, _output_padding, groups, dilation, column = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(input if need[1] else None, weight if need[0] else None)
        channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
        ctx.constants = need, weight.shape, (stride, padding, dilation, groups), channels_last, column

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        need, weight_size, settings, channels_last, column = ctx.constants
        again = torch.is_grad_enabled()
        grad_input = grad_weight = grad_bias = None
        if need[0]:
            if again:
                grad_input = _autograd.apply(Conv2d, grad_output, weight, None, *settings, column)
            else:
                grad_input = _forward[column](grad_output, weight, None, *settings)
        if need[1]:
            if again:
                grad_weight, _ = _autograd.apply(
                    Conv2dBackwardWeight, input, grad_output, weight_size, *settings, False, channels_last, column
                )
            else:
                grad_weight, _ = _backward_weight[column](
                    input, grad_output, weight_size, *settings, False, channels_last
                )
        if need[2]:
            grad_bias = grad_output.sum((0, 2, 3)) if again else _backward_bias[column](grad_output)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    op: str = "conv2d",
) -> torch.Tensor:
    """Convolution of input [N, C, H, W] with weight [K, C/groups, R, S]; arguments are valid and in pairs. `op` is the
    public op that trace() is told of."""
    if _autograd.use_reference():
        return reference.conv2d(input, weight, bias, stride, padding, dilation, groups)
    choice = columns.choose(
        "conv2d", input.device.type, input.dtype, columns.state.forced, columns.state.emulated,
        ("grouped",) if groups > 1 else (),
    )
    if tracing.active:
        tracing.record(op, choice.column, choice.reason, input, weight, bias)
    if choice.column == "reference":
        return reference.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if _autograd.needs_grad(input, weight, bias):
        return _autograd.apply(Conv2d, input, weight, bias, stride, padding, dilation, groups, choice.column)
    return _forward[choice.column](input, weight, bias, stride, padding, dilation, groups)


def run(column, input, weight, bias, stride, padding, dilation, groups):
    """conv2d on a given column, for a plain call (see _plain.py)."""
    if (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)) and _autograd.recording():
        return Conv2d.fast_apply(input, weight, bias, stride, padding, dilation, groups, column)
    return _forward[column](input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
    op: str = "conv_transpose2d",
) -> torch.Tensor:
    """Transposed convolution of input [N, C, H, W] with weight [C, K/groups, R, S]; arguments are valid and in pairs,
    output_padding is below stride."""
    settings = (stride, padding, output_padding, groups, dilation)
    if _autograd.use_reference():
        return reference.conv_transpose2d(input, weight, bias, *settings)
    choice = columns.choose(
        "conv_transpose2d", input.device.type, input.dtype, columns.state.forced, columns.state.emulated,
        ("grouped",) if groups > 1 else (),
    )
    if tracing.active:
        tracing.record(op, choice.column, choice.reason, input, weight, bias)
    if choice.column == "reference":
        return reference.conv_transpose2d(input, weight, bias, *settings)
    if _autograd.needs_grad(input, weight, bias):
        return _autograd.apply(ConvTranspose2d, input, weight, bias, *settings, choice.column)
    return _transpose_forward[choice.column](input, weight, bias, *settings)


def run_transpose(column, input, weight, bias, stride, padding, output_padding, groups, dilation):
    """conv_transpose2d on a given column, for a plain call (see _plain.py)."""
    settings = (stride, padding, output_padding, groups, dilation, column)
    if (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)) and _autograd.recording():
        return ConvTranspose2d.fast_apply(input, weight, bias, *settings)
    return _transpose_forward[column](input, weight, bias, *settings[:5])


def conv2d_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> torch.Tensor:
    """activation(conv2d + residual); arguments are valid and in pairs, residual has the result's shape."""
    settings = (stride, padding, dilation, groups, activation)
    if _autograd.use_reference():
        return reference.conv2d_act(input, weight, bias, residual, *settings)
    choice = columns.choose(
        "conv2d", input.device.type, input.dtype, columns.state.forced, columns.state.emulated,
        ("grouped",) if groups > 1 else (),
    )
    if tracing.active:
        tracing.record("conv2d_act", choice.column, choice.reason, input, weight, bias, residual)
    if choice.column == "reference":
        return reference.conv2d_act(input, weight, bias, residual, *settings)
    if residual is not None:
        channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
        residual = residual.contiguous(memory_format=memory_format(channels_last))
    if _autograd.needs_grad(input, weight, bias, residual):
        return _autograd.apply(Conv2dAct, input, weight, bias, residual, *settings, choice.column)
    return _act_forward[choice.column](input, weight, bias, residual, *settings)
