"""dropout: schema, fake kernel, autograd, dispatch.

The seed is a device tensor drawn in Python, so torch.manual_seed, checkpointing and CUDA graphs hold. Dropout is
linear in its input and the seed decides the mask: the same op on the gradient is the backward, to any order.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern._layout import is_channels_last, to_layout
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import dropout as reference

__all__ = ["dropout"]


def _fake(input: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input)


define("dropout", "(Tensor input, float p, Tensor seed) -> Tensor", _fake, triton="dlkern.kernels.dropout:dropout")
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}.items():
    columns.declare("dropout", _column, _dtypes)


class Dropout(_autograd.Function):
    @staticmethod
    def forward(input, p, seed, column):
        return raw["dropout"][column](input, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.p, seed, ctx.column = inputs
        # The mask counts elements in memory order: gradients are brought to the input's order first.
        ctx.channels_last = is_channels_last(input)
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad_output):
        (seed,) = ctx.saved_tensors
        grad_output = to_layout(grad_output, ctx.channels_last)
        if torch.is_grad_enabled():
            return _autograd.apply(Dropout, grad_output, ctx.p, seed, ctx.column), None, None, None
        return raw["dropout"][ctx.column](grad_output, ctx.p, seed), None, None, None


def dropout(input: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Dropout of `input` with the mask that `seed` (one int64 on the same device) decides."""
    if _autograd.use_reference():
        return reference.dropout(input, p, seed)
    choice = columns.choose(
        "dropout", input.device.type, input.dtype, columns.state.forced, columns.state.emulated
    )
    if tracing.active:
        tracing.record("dropout", choice.column, choice.reason, input)
    if choice.column == "reference":
        return reference.dropout(input, p, seed)
    if _autograd.needs_grad(input):
        return _autograd.apply(Dropout, input, p, seed, choice.column)
    return raw["dropout"][choice.column](input, p, seed)
