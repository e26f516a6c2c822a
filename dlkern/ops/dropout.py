"""dropout, of elements and of channels: schemas, fake kernels, autograd, dispatch.

The seed is a device tensor drawn in Python, so torch.manual_seed, checkpointing and CUDA graphs hold. Dropout is
linear in its input and the seed decides the mask: the same op on the gradient is the backward, to any order.
Channels [n, c] of a batch are dropped as the elements of a tensor [n, c] would be with that seed.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern._layout import is_channels_last, to_layout
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import dropout as reference

__all__ = ["dropout", "feature_dropout", "run", "run_feature"]


def _fake(input: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(input)


def _feature_fake(input: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    memory_format = torch.contiguous_format
    if not input.is_contiguous() and input.dim() in (4, 5):
        channels_last = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
        if input.is_contiguous(memory_format=channels_last):
            memory_format = channels_last
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


_SCHEMA = "(Tensor input, float p, Tensor seed) -> Tensor"
define("dropout", _SCHEMA, _fake, triton="dlkern.kernels.dropout:dropout")
define("feature_dropout", _SCHEMA, _feature_fake, triton="dlkern.kernels.dropout:feature_dropout")
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}.items():
    for _op in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
        columns.declare(_op, _column, _dtypes)


_dropout, _feature_dropout = raw["dropout"], raw["feature_dropout"]


class Dropout(_autograd.Function):
    @staticmethod
    def forward(input, p, seed, column):
        return _dropout[column](input, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, p, seed, column = inputs
        # The mask counts elements in memory order: gradients are brought to the input's order first.
        ctx.constants = p, is_channels_last(input), column
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad_output):
        (seed,) = ctx.saved_tensors
        p, channels_last, column = ctx.constants
        grad_output = to_layout(grad_output, channels_last)
        if torch.is_grad_enabled():
            return _autograd.apply(Dropout, grad_output, p, seed, column), None, None, None
        return _dropout[column](grad_output, p, seed), None, None, None


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
    return _dropout[choice.column](input, p, seed)


def run(column, input, p, seed):
    """dropout on a given column, for a plain call (see _plain.py)."""
    if input.requires_grad and _autograd.recording():
        return Dropout.fast_apply(input, p, seed, column)
    return _dropout[column](input, p, seed)


class FeatureDropout(_autograd.Function):
    @staticmethod
    def forward(input, p, seed, column):
        return _feature_dropout[column](input, p, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, p, seed, column = inputs
        ctx.constants = p, column
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx, grad_output):
        (seed,) = ctx.saved_tensors
        p, column = ctx.constants
        if torch.is_grad_enabled():
            return _autograd.apply(FeatureDropout, grad_output, p, seed, column), None, None, None
        return _feature_dropout[column](grad_output, p, seed), None, None, None


def feature_dropout(input: torch.Tensor, p: float, seed: torch.Tensor, op: str = "dropout2d") -> torch.Tensor:
    """Dropout of the channels of `input` [N, C, ...] with the mask that `seed` (one int64 on the same device) decides.
    `op` is the public op that trace() is told of."""
    if _autograd.use_reference():
        return reference.feature_dropout(input, p, seed)
    choice = columns.choose(op, input.device.type, input.dtype, columns.state.forced, columns.state.emulated)
    if tracing.active:
        tracing.record(op, choice.column, choice.reason, input)
    if choice.column == "reference":
        return reference.feature_dropout(input, p, seed)
    if _autograd.needs_grad(input):
        return _autograd.apply(FeatureDropout, input, p, seed, choice.column)
    return _feature_dropout[choice.column](input, p, seed)


def run_feature(column, input, p, seed):
    """feature_dropout on a given column, for a plain call (see _plain.py)."""
    if input.requires_grad and _autograd.recording():
        return FeatureDropout.fast_apply(input, p, seed, column)
    return _feature_dropout[column](input, p, seed)
