"""Batch norm, with an activation and a residual sum in the same pass: schemas, fake kernels, autograd, dispatch.

output = activation(batch_norm(input) + residual). The ops change nothing in place: new running statistics are
results, and nn.functional copies them into the buffers. The backward needs input, mean and invstd (1 / standard
deviation), and output where there is an activation. mean and invstd are in the dtype sums are carried in when training;
in evaluation they are float64 copies of what the buffers say, because there torch's own gradient is exact but for
one rounding.
"""

from __future__ import annotations

from typing import Any

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._layout import memory_format, suggests_channels_last
from dlkern.ops._registry import define, raw
from dlkern.reference import batch_norm as reference

__all__ = ["batch_norm", "run"]


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(input: torch.Tensor) -> torch.Tensor:
    return torch.empty(
        input.shape, dtype=input.dtype, device=input.device,
        memory_format=memory_format(suggests_channels_last(input), input.dim()),
    )


def _train_forward_fake(input, residual, weight, bias, running_mean, running_var, momentum, eps, activation):
    statistics = [input.new_empty([input.shape[1]], dtype=_accumulate(input.dtype)) for _ in range(2)]
    running = [
        input.new_empty([0], dtype=_accumulate(input.dtype)) if r is None else r.new_empty([input.shape[1]])
        for r in (running_mean, running_var)
    ]
    return (_like(input), *statistics, *running)


def _eval_forward_fake(input, residual, weight, bias, running_mean, running_var, eps, activation):
    return (_like(input), *(input.new_empty([input.shape[1]], dtype=torch.float64) for _ in range(2)))


def _backward_fake(grad_output, input, output, weight, mean, invstd, train, activation, residual):
    parameter = _accumulate(input.dtype) if weight is None else weight.dtype
    sums = [input.new_empty([input.shape[1]], dtype=parameter) for _ in range(2)]
    return (_like(input), *sums, _like(input) if residual else input.new_empty([0]))


define(
    "batch_norm_train_forward",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var,"
    " float momentum, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _train_forward_fake,
    triton="dlkern.kernels.batch_norm:batch_norm_train_forward",
)
define(
    "batch_norm_eval_forward",
    "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var,"
    " float eps, int activation) -> (Tensor, Tensor, Tensor)",
    _eval_forward_fake,
    triton="dlkern.kernels.batch_norm:batch_norm_eval_forward",
)
define(
    "batch_norm_backward",
    "(Tensor grad_output, Tensor input, Tensor? output, Tensor? weight, Tensor mean, Tensor invstd, bool train,"
    " int activation, bool residual) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    triton="dlkern.kernels.batch_norm:batch_norm_backward",
)
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}.items():
    columns.declare("batch_norm", _column, _dtypes)


_train_forward, _eval_forward, _backward_ops = (
    raw[op] for op in ("batch_norm_train_forward", "batch_norm_eval_forward", "batch_norm_backward")
)


class BatchNormBackward(_autograd.Function):
    """The four gradients; their own derivatives are the reference's."""

    @staticmethod
    def forward(grad_output, input, output, weight, mean, invstd, train, activation, residual, eps, column):
        return _backward_ops[column](
            grad_output, input, output, weight, mean, invstd, train, activation, residual
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.train, ctx.activation, ctx.residual, ctx.eps, _ = inputs[6:]

    @staticmethod
    def backward(ctx, *cotangents):
        *primals, mean, invstd = ctx.saved_tensors

        def gradients(grad_output, input, output, weight):
            results = reference.batch_norm_backward(
                grad_output, input, output, weight, mean, invstd, ctx.train, ctx.activation, ctx.eps
            )
            return results if ctx.residual else results[:3]

        pulled = _autograd.vjp(gradients, tuple(primals), cotangents if ctx.residual else cotangents[:3])
        return (*pulled, *(None,) * 7)


def _backward(ctx, grad_output, input, output, weight, mean, invstd, train):
    """Gradients of input, residual, weight and bias, for the Forward functions below."""
    need_input, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    args = (grad_output, input, output, weight, mean, invstd, train, ctx.activation, need_residual)
    if torch.is_grad_enabled():
        grads = _autograd.apply(BatchNormBackward, *args, ctx.eps, ctx.column)
    else:
        grads = _backward_ops[ctx.column](*args)
    grad_input, grad_weight, grad_bias, grad_residual = grads
    return (
        grad_input if need_input else None,
        grad_residual if need_residual else None,
        grad_weight if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
    )


class BatchNormTrain(_autograd.Function):
    @staticmethod
    def forward(input, residual, weight, bias, running_mean, running_var, momentum, eps, activation, column):
        return _train_forward[column](
            input, residual, weight, bias, running_mean, running_var, momentum, eps, activation
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, weight, bias, _, _, _, ctx.eps, ctx.activation, ctx.column = inputs
        y, mean, invstd, new_mean, new_var = output
        ctx.mark_non_differentiable(mean, invstd, new_mean, new_var)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, y if ctx.activation else None, weight, mean, invstd)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 10
        input, output, weight, mean, invstd = ctx.saved_tensors
        return (*_backward(ctx, grad_output, input, output, weight, mean, invstd, True), *(None,) * 6)


class BatchNormEval(_autograd.Function):
    """Frozen statistics: the backward is linear in grad_output and needs input for grad_weight only."""

    @staticmethod
    def forward(input, residual, weight, bias, running_mean, running_var, eps, activation, column):
        return _eval_forward[column](
            input, residual, weight, bias, running_mean, running_var, eps, activation
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, weight, bias, _, _, ctx.eps, ctx.activation, ctx.column = inputs
        y, mean, invstd = output
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            input if ctx.needs_input_grad[2] else None, y if ctx.activation else None, weight, mean, invstd
        )
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 9
        input, output, weight, mean, invstd = ctx.saved_tensors
        if input is None:  # grad_weight is not wanted, and nothing else looks at input's values
            input = grad_output.detach()
        return (*_backward(ctx, grad_output, input, output, weight, mean, invstd, False), *(None,) * 5)


def batch_norm(
    input: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor | None, running_var: torch.Tensor | None, training: bool, momentum: float, eps: float,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """activation(batch_norm(input) + residual), and when training the new running statistics."""
    args: tuple[Any, Any, Any, Any, Any, Any] = (input, residual, weight, bias, running_mean, running_var)
    column = "reference"
    if not _autograd.use_reference():
        choice = columns.choose(
            "batch_norm", input.device.type, input.dtype, columns.state.forced, columns.state.emulated
        )
        column = choice.column
        if tracing.active:
            tracing.record("batch_norm", column, choice.reason, *args)
    grad = _autograd.needs_grad(input, residual, weight, bias)
    if not training:
        if column == "reference":
            return reference.batch_norm_eval(*args, eps, activation), None, None
        if grad:
            return _autograd.apply(BatchNormEval, *args, eps, activation, column)[0], None, None
        return _eval_forward[column](*args, eps, activation)[0], None, None
    if column == "reference":
        return reference.batch_norm_train(*args, momentum, eps, activation)
    if grad:
        results = _autograd.apply(BatchNormTrain, *args, momentum, eps, activation, column)
    else:
        results = _train_forward[column](*args, momentum, eps, activation)
    return results[0], results[3], results[4]


def run(column, input, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation):
    """batch_norm on a given column, for a plain call (see _plain.py)."""
    args = (input, residual, weight, bias, running_mean, running_var)
    grad = _autograd.recording() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if training:
        if grad:
            results = BatchNormTrain.fast_apply(*args, momentum, eps, activation, column)
        else:
            results = _train_forward[column](*args, momentum, eps, activation)
        return results[0], results[3], results[4]
    if grad:
        return BatchNormEval.fast_apply(*args, eps, activation, column)[0], None, None
    return _eval_forward[column](*args, eps, activation)[0], None, None
