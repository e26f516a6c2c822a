"""Rotary positions: schema, fake kernel, autograd, dispatch. The gradient is the turn the other way, to any order."""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import positions as reference

__all__ = ["rotary"]


def _fake(x, cos, sin, interleaved, inverse):
    a, b, length, depth = x.shape
    if x.stride(1) < x.stride(2):  # in x's order of heads and positions
        return x.new_empty((a, length, b, depth)).transpose(1, 2)
    return x.new_empty((a, b, length, depth))


define(
    "rotary", "(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor", _fake,
    triton="dlkern.kernels.positions:rotary",
)
for _column in ("cpu", "triton"):
    columns.declare("rotary", _column, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
columns.declare("rotary", "cuda", (torch.float32, torch.bfloat16, torch.float16))

_rotary = raw["rotary"]


class Rotary(_autograd.Function):
    @staticmethod
    def forward(x, cos, sin, interleaved, inverse, column):
        return _rotary[column](x, cos, sin, interleaved, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin, interleaved, inverse, column = inputs
        ctx.save_for_backward(cos, sin)
        ctx.constants = interleaved, not inverse, column

    @staticmethod
    def backward(ctx, grad_output):
        cos, sin = ctx.saved_tensors
        interleaved, inverse, column = ctx.constants
        if torch.is_grad_enabled():
            gradient = _autograd.apply(Rotary, grad_output, cos, sin, interleaved, inverse, column)
        else:
            gradient = _rotary[column](grad_output, cos, sin, interleaved, inverse)
        return gradient, None, None, None, None, None


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """rotary of x [A, B, L, D] by cos and sin [A or 1, B or 1, L, half]. Arguments are valid."""
    if _autograd.use_reference():
        return reference.rotary(x, cos, sin, interleaved)
    choice = columns.choose("rotary", x.device.type, x.dtype, columns.state.forced, columns.state.emulated)
    column, reason = choice.column, choice.reason
    if (cos.requires_grad or sin.requires_grad) and _autograd.recording():
        column, reason = "reference", "the angles require a gradient"
    if tracing.active:
        tracing.record("rotary", column, reason, x, cos, sin)
    if column == "reference":
        return reference.rotary(x, cos, sin, interleaved)
    if _autograd.needs_grad(x):
        return _autograd.apply(Rotary, x, cos, sin, interleaved, False, column)
    return _rotary[column](x, cos, sin, interleaved, False)
