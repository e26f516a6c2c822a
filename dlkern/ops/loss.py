"""Softmax cross-entropy: schemas, fake kernels, autograd, dispatch.

The forward keeps two numbers a position instead of the probabilities: the largest logit and the logarithm of
sum(exp(x - largest)). Kept apart, x - largest - log_sum is as exact as torch's log_softmax however large the logits
are; their sum would not be. The backward makes the gradient from them in one pass.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import loss as reference

__all__ = ["cross_entropy", "run"]


def _fake_forward(input, target, weight, sample_weight, reduction, ignore_index, label_smoothing):
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    loss = input.new_empty(target.shape if reduction == 0 else ())
    return loss, input.new_empty((2, *target.shape), dtype=accumulate), input.new_empty((), dtype=accumulate)


def _fake_backward(
    grad_loss, input, target, weight, sample_weight, lse, total_weight, reduction, ignore_index, label_smoothing
):
    layout = torch.contiguous_format
    if input.dim() == 4:
        layout = torch._prims_common.suggest_memory_format(input)
    return torch.empty_like(input, memory_format=layout)


define(
    "cross_entropy_forward",
    # lse is [2, *target.shape] in float32 (float64 for float64): the largest logit, log(sum(exp(x - largest))).
    # total_weight is a scalar in the same dtype: the weights of the targets that are not ignored, summed.
    "(Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, int reduction, int ignore_index,"
    " float label_smoothing) -> (Tensor loss, Tensor lse, Tensor total_weight)",
    _fake_forward, triton="dlkern.kernels.loss:cross_entropy_forward",
)
define(
    "cross_entropy_backward",
    "(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor lse,"
    " Tensor total_weight, int reduction, int ignore_index, float label_smoothing) -> Tensor",
    _fake_backward, triton="dlkern.kernels.loss:cross_entropy_backward",
)
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}.items():
    columns.declare("cross_entropy", _column, _dtypes)

_forward = raw["cross_entropy_forward"]
_backward = raw["cross_entropy_backward"]


class CrossEntropy(_autograd.Function):
    """(loss, lse, total_weight); only the loss is differentiable."""

    @staticmethod
    def forward(input, target, weight, sample_weight, reduction, ignore_index, label_smoothing, column):
        return _forward[column](input, target, weight, sample_weight, reduction, ignore_index, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, weight, sample_weight, *settings, column = inputs
        ctx.constants = settings, column
        _, lse, total_weight = output
        ctx.mark_non_differentiable(lse, total_weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, sample_weight, lse, total_weight)

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, grad_total_weight):
        if grad_loss is None:
            return (None,) * 8
        settings, column = ctx.constants
        if torch.is_grad_enabled():
            grad = _autograd.apply(CrossEntropyBackward, grad_loss, *ctx.saved_tensors, *settings, column)
        else:
            grad = _backward[column](grad_loss, *ctx.saved_tensors, *settings)
        return grad, *(None,) * 7


class CrossEntropyBackward(_autograd.Function):
    """The gradient for the logits, differentiable through the reference (which makes lse again)."""

    @staticmethod
    def forward(
        grad_loss, input, target, weight, sample_weight, lse, total_weight, reduction, ignore_index, label_smoothing,
        column,
    ):  # fmt: skip
        return _backward[column](
            grad_loss, input, target, weight, sample_weight, lse, total_weight, reduction, ignore_index, label_smoothing
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_loss, input, target, weight, sample_weight, _, _, *settings, _ = inputs
        ctx.settings = settings
        ctx.save_for_backward(grad_loss, input, target, weight, sample_weight)

    @staticmethod
    def backward(ctx, cotangent):
        grad_loss, input, target, weight, sample_weight = ctx.saved_tensors
        for_grad_loss, for_input = _autograd.vjp(
            lambda g, x: reference.cross_entropy_backward(g, x, target, weight, sample_weight, *ctx.settings),
            (grad_loss, input), cotangent,
        )
        return for_grad_loss, for_input, *(None,) * 9


def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, reduction: int = 1,
    ignore_index: int = -100, label_smoothing: float = 0.0, sample_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax cross-entropy of logits [N, C, ...] and int64 targets [N, ...]; reduction 0 none, 1 mean, 2 sum. The weights
    have no gradient."""
    settings = weight, sample_weight, reduction, ignore_index, label_smoothing
    if _autograd.use_reference():
        return reference.cross_entropy(input, target, *settings)
    choice = columns.choose(
        "cross_entropy", input.device.type, input.dtype, columns.state.forced, columns.state.emulated
    )
    if tracing.active:
        tracing.record("cross_entropy", choice.column, choice.reason, input, target, weight)
    if choice.column == "reference":
        return reference.cross_entropy(input, target, *settings)
    if _autograd.needs_grad(input):
        return _autograd.apply(CrossEntropy, input, target, *settings, choice.column)[0]
    return _forward[choice.column](input, target, *settings)[0]


def run(column, input, target, weight, sample_weight, reduction, ignore_index, label_smoothing):
    """cross_entropy on a given column, for a plain call (see _plain.py)."""
    settings = weight, sample_weight, reduction, ignore_index, label_smoothing
    if input.requires_grad and _autograd.recording():
        return CrossEntropy.fast_apply(input, target, *settings, column)[0]
    return _forward[column](input, target, *settings)[0]
