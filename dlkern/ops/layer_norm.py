"""layer_norm: schemas, fake kernels, autograd, dispatch.

Saved for backward: input, weight, and mean and reciprocal deviation of each row, in the type sums are carried in.
Normalized are the last `dims` dimensions.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import layer_norm as reference

__all__ = ["layer_norm", "run"]


def _fake_forward(input, dims, weight, bias, eps):
    rows = 1
    for size in input.shape[: input.dim() - dims]:
        rows = rows * size
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty(input.shape), input.new_empty((rows,), dtype=wide), input.new_empty((rows,), dtype=wide)


def _fake_backward(grad_output, input, dims, weight, mean, rstd, of_input, of_weight, of_bias):
    shape, dtype = input.shape[input.dim() - dims :], input.dtype if weight is None else weight.dtype
    return (
        input.new_empty(input.shape if of_input else (0,)),
        input.new_empty(shape if of_weight else (0,), dtype=dtype),
        input.new_empty(shape if of_bias else (0,), dtype=dtype),
    )


define(
    "layer_norm_forward",
    "(Tensor input, int dims, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)", _fake_forward,
    triton="dlkern.kernels.layer_norm:layer_norm_forward",
)
define(
    "layer_norm_backward",
    "(Tensor grad_output, Tensor input, int dims, Tensor? weight, Tensor mean, Tensor rstd, bool of_input, "
    "bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)", _fake_backward,
    triton="dlkern.kernels.layer_norm:layer_norm_backward",
)
columns.declare("layer_norm", "cpu", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
columns.declare("layer_norm", "cuda", (torch.float32, torch.bfloat16, torch.float16))
columns.declare("layer_norm", "triton", (torch.float32, torch.bfloat16, torch.float16, torch.float64))

_forward, _backward = raw["layer_norm_forward"], raw["layer_norm_backward"]


class LayerNorm(_autograd.Function):
    """(output, mean, rstd); the last two are for the backward alone."""

    @staticmethod
    def forward(input, dims, weight, bias, eps, column):
        return _forward[column](input, dims, weight, bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        input, dims, weight, bias, eps, column = inputs
        _, mean, rstd = outputs
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, rstd)
        need = ctx.needs_input_grad
        # Without a weight, the bias tells in which dtype its gradient is wanted.
        ctx.constants = dims, eps, need[0], need[2], need[3], None if bias is None else bias.dtype, column

    @staticmethod
    def backward(ctx, grad_output, _, __):
        if grad_output is None:
            return (None,) * 6
        input, weight, mean, rstd = ctx.saved_tensors
        dims, eps, *wanted, bias_dtype, column = ctx.constants
        if torch.is_grad_enabled():
            found = _autograd.apply(LayerNormBackward, grad_output, input, weight, mean, rstd, dims, eps, *wanted, column)
        else:
            found = _backward[column](grad_output, input, dims, weight, mean, rstd, *wanted)
        of_input, of_weight, of_bias = (gradient if need else None for gradient, need in zip(found, wanted))
        if of_bias is not None and of_bias.dtype != bias_dtype:
            of_bias = of_bias.to(bias_dtype)
        return of_input, None, of_weight, of_bias, None, None


class LayerNormBackward(_autograd.Function):
    """The gradients; differentiable through the reference, which makes mean and rstd again."""

    @staticmethod
    def forward(grad_output, input, weight, mean, rstd, dims, eps, of_input, of_weight, of_bias, column):
        return _backward[column](grad_output, input, dims, weight, mean, rstd, of_input, of_weight, of_bias)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_output, input, weight, _, _, *settings, _ = inputs
        ctx.settings = settings
        ctx.save_for_backward(grad_output, input, weight)

    @staticmethod
    def backward(ctx, *cotangents):
        grad_output, input, weight = ctx.saved_tensors
        dims, eps, *wanted = ctx.settings

        def gradients(g, x, *w):
            found = reference.layer_norm_backward(g, x, w[0] if w else None, dims, eps)
            return tuple(gradient for gradient, need in zip(found, wanted) if need)

        primals = (grad_output, input) if weight is None else (grad_output, input, weight)
        found = _autograd.vjp(gradients, primals, tuple(c for c, need in zip(cotangents, wanted) if need))
        return found[0], found[1], found[2] if weight is not None else None, *(None,) * 8


def layer_norm(
    input: torch.Tensor, dims: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """layer_norm over the last `dims` dimensions; weight and bias have the normalized shape. Arguments are valid."""
    if _autograd.use_reference():
        return reference.layer_norm(input, dims, weight, bias, eps)
    choice = columns.choose(
        "layer_norm", input.device.type, input.dtype, columns.state.forced, columns.state.emulated
    )
    if tracing.active:
        tracing.record("layer_norm", choice.column, choice.reason, input, weight, bias)
    if choice.column == "reference":
        return reference.layer_norm(input, dims, weight, bias, eps)
    if _autograd.needs_grad(input, weight, bias):
        return _autograd.apply(LayerNorm, input, dims, weight, bias, eps, choice.column)[0]
    return _forward[choice.column](input, dims, weight, bias, eps)[0]


def run(column, input, dims, weight, bias, eps):
    """layer_norm on a given column, for a plain call (see _plain.py)."""
    wanted = input.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    if wanted and _autograd.recording():
        return LayerNorm.fast_apply(input, dims, weight, bias, eps, column)[0]
    return _forward[column](input, dims, weight, bias, eps)[0]
