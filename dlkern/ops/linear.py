"""linear (+ bias + activation): schemas, fake kernels, autograd, dispatch.

Linear's gradients are themselves linear maps of the same family, so the three Functions below differentiate into
each other and derivatives of every order run on our kernels; only the activation's second derivative is a plain
torch expression. Saved for backward: the weight where the input needs a gradient, the input where the weight does,
the output where there is an activation.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import linear as reference

__all__ = ["linear", "run"]


def _fake_forward(input, weight, bias, activation):
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_backward_input(grad_output, weight):
    return grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))


def _fake_backward_weight(grad_output, input, bias):
    outputs = grad_output.shape[-1]
    return input.new_empty((outputs, input.shape[-1])), input.new_empty((outputs if bias else 0,))


def _fake_activation_backward(grad_output, output, activation):
    return grad_output.new_empty(grad_output.shape)


_KERNELS = "dlkern.kernels.linear:"
define(
    "linear_forward", "(Tensor input, Tensor weight, Tensor? bias, int activation) -> Tensor", _fake_forward,
    triton=_KERNELS + "linear_forward",
)
define(
    "linear_backward_input", "(Tensor grad_output, Tensor weight) -> Tensor", _fake_backward_input,
    triton=_KERNELS + "linear_backward_input",
)
define(
    "linear_backward_weight", "(Tensor grad_output, Tensor input, bool bias) -> (Tensor, Tensor)",
    _fake_backward_weight, triton=_KERNELS + "linear_backward_weight",
)
define(
    "activation_backward", "(Tensor grad_output, Tensor output, int activation) -> Tensor", _fake_activation_backward,
    triton=_KERNELS + "activation_backward",
)
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}.items():
    columns.declare("linear", _column, _dtypes)

_forward = raw["linear_forward"]
_backward_input = raw["linear_backward_input"]
_backward_weight = raw["linear_backward_weight"]
_activation_backward = raw["activation_backward"]


class Linear(_autograd.Function):
    """activation(input @ weight.T + bias)."""

    @staticmethod
    def forward(input, weight, bias, activation, column):
        return _forward[column](input, weight, bias, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, activation, column = inputs
        need = ctx.needs_input_grad
        ctx.save_for_backward(
            input if need[1] else None, weight if need[0] else None, output if activation else None
        )
        # A weight whose columns lie in one piece is another's transpose (transformers' Conv1D), and so is its gradient.
        turned = weight.stride(0) == 1 and weight.stride(1) > 1
        ctx.constants = need, activation, column, turned

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, output = ctx.saved_tensors
        (need_input, need_weight, need_bias, *_), activation, column, turned = ctx.constants
        grad_input = grad_weight = grad_bias = None
        if torch.is_grad_enabled():
            if activation:
                grad_output = _autograd.apply(ActivationBackward, grad_output, output, activation, column)
            if need_input:
                grad_input = _autograd.apply(BackwardInput, grad_output, weight, column)
            if need_weight or need_bias:
                input = input if need_weight else grad_output[..., :0]  # then only the sums are made
                grad_weight, grad_bias = _autograd.apply(BackwardWeight, grad_output, input, need_bias, column)
        else:
            if activation:
                grad_output = _activation_backward[column](grad_output, output, activation)
            if need_input:
                grad_input = _backward_input[column](grad_output, weight)
            if need_bias or (need_weight and not turned):
                other = input if need_weight and not turned else grad_output[..., :0]
                grad_weight, grad_bias = _backward_weight[column](grad_output, other, need_bias)
            if need_weight and turned:
                grad_weight = _backward_weight[column](input, grad_output, False)[0].t()
        return grad_input, grad_weight if need_weight else None, grad_bias if need_bias else None, None, None


class BackwardInput(_autograd.Function):
    """grad_output @ weight."""

    @staticmethod
    def forward(grad_output, weight, column):
        return _backward_input[column](grad_output, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, ctx.column = inputs
        ctx.save_for_backward(grad_output, weight)

    @staticmethod
    def backward(ctx, cotangent):
        grad_output, weight = ctx.saved_tensors
        for_grad_output = for_weight = None
        if ctx.needs_input_grad[0]:
            for_grad_output = _autograd.apply(Linear, cotangent, weight, None, 0, ctx.column)
        if ctx.needs_input_grad[1]:
            for_weight, _ = _autograd.apply(BackwardWeight, grad_output, cotangent, False, ctx.column)
        return for_grad_output, for_weight, None


class BackwardWeight(_autograd.Function):
    """grad_output.T @ input, and the column sums of grad_output (size [0] without a bias)."""

    @staticmethod
    def forward(grad_output, input, bias, column):
        return _backward_weight[column](grad_output, input, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, ctx.bias, ctx.column = inputs
        ctx.save_for_backward(grad_output, input)

    @staticmethod
    def backward(ctx, weight_cotangent, bias_cotangent):
        grad_output, input = ctx.saved_tensors
        for_grad_output = for_input = None
        if ctx.needs_input_grad[0]:
            for_grad_output = _autograd.apply(
                Linear, input, weight_cotangent, bias_cotangent if ctx.bias else None, 0, ctx.column
            )
        if ctx.needs_input_grad[1]:
            for_input = _autograd.apply(BackwardInput, grad_output, weight_cotangent, ctx.column)
        return for_grad_output, for_input, None, None


class ActivationBackward(_autograd.Function):
    """grad_output times the activation's derivative, written in terms of the activation's output."""

    @staticmethod
    def forward(grad_output, output, activation, column):
        return _activation_backward[column](grad_output, output, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, activated, ctx.activation, ctx.column = inputs
        ctx.save_for_backward(grad_output, activated)

    @staticmethod
    def backward(ctx, cotangent):
        grad_output, activated = ctx.saved_tensors
        return *_autograd.vjp(
            lambda g, y: reference.activation_backward(g, y, ctx.activation), (grad_output, activated), cotangent
        ), None, None


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: int = 0
) -> torch.Tensor:
    """activation(input @ weight.T + bias): input [..., K], weight [N, K], bias [N]; one dtype, one device."""
    if _autograd.use_reference():
        return reference.linear(input, weight, bias, activation)
    choice = columns.choose(
        "linear", input.device.type, input.dtype, columns.state.forced, columns.state.emulated
    )
    if tracing.active:
        tracing.record("linear", choice.column, choice.reason, input, weight, bias)
    if choice.column == "reference":
        return reference.linear(input, weight, bias, activation)
    if _autograd.needs_grad(input, weight, bias):
        return _autograd.apply(Linear, input, weight, bias, activation, choice.column)
    return _forward[choice.column](input, weight, bias, activation)


def run(column, input, weight, bias, activation):
    """linear on a given column, for a plain call (see _plain.py)."""
    if (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)) and _autograd.recording():
        return Linear.fast_apply(input, weight, bias, activation, column)
    return _forward[column](input, weight, bias, activation)
