"""Softmax cross-entropy: schemas, fake kernels, autograd, dispatch.

The forward keeps two numbers a position instead of the probabilities: the largest logit and the logarithm of
sum(exp(x - largest)). Kept apart, x - largest - log_sum is as exact as torch's log_softmax however large the logits
are; their sum would not be. The backward makes the gradient from them in one pass. Targets that are a probability for
each class have ops of their own, which keep the largest logit, the sum of exponentials and the sum of the position's
weighted targets, and may give the targets' gradient.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._layout import memory_format, suggests_channels_last
from dlkern.ops._registry import define, raw
from dlkern.reference import loss as reference

__all__ = ["cross_entropy", "probabilities", "run", "run_probabilities"]


def _fake_forward(input, target, weight, sample_weight, reduction, ignore_index, label_smoothing):
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    loss = input.new_empty(target.shape if reduction == 0 else ())
    return loss, input.new_empty((2, *target.shape), dtype=accumulate), input.new_empty((), dtype=accumulate)


def _fake_backward(
    grad_loss, input, target, weight, sample_weight, lse, total_weight, reduction, ignore_index, label_smoothing
):
    return torch.empty_like(input, memory_format=memory_format(suggests_channels_last(input), input.dim()))


def _fake_probabilities_forward(input, target, weight, reduction, label_smoothing):
    places = (input.shape[0], *input.shape[2:])
    return input.new_empty(places if reduction == 0 else ()), input.new_empty((3, *places), dtype=torch.float64)


def _fake_probabilities_backward(grad_loss, input, target, weight, kept, reduction, label_smoothing, of_input, of_target):
    layout = memory_format(suggests_channels_last(input), input.dim())
    wanted = of_input, of_target
    return tuple(torch.empty_like(input, memory_format=layout) if w else input.new_empty(0) for w in wanted)


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
define(
    "cross_entropy_probabilities_forward",
    # kept is float64 [3, N, ...]: the largest logit, sum(exp(x - largest)) and sum(v), v[c] = ((1 - e) t[c] + e / C) w[c].
    "(Tensor input, Tensor target, Tensor? weight, int reduction, float label_smoothing) -> (Tensor loss, Tensor kept)",
    _fake_probabilities_forward, triton="dlkern.kernels.loss:probabilities_forward",
)
define(
    "cross_entropy_probabilities_backward",
    "(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor kept, int reduction, float label_smoothing,"
    " bool of_input, bool of_target) -> (Tensor, Tensor)",
    _fake_probabilities_backward, triton="dlkern.kernels.loss:probabilities_backward",
)
for _column, _dtypes in {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}.items():
    columns.declare("cross_entropy", _column, _dtypes)

_forward = raw["cross_entropy_forward"]
_backward = raw["cross_entropy_backward"]
_probabilities_forward = raw["cross_entropy_probabilities_forward"]
_probabilities_backward = raw["cross_entropy_probabilities_backward"]


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


class Probabilities(_autograd.Function):
    """(loss, kept) of targets that are a probability for each class; the latter is for the backward alone."""

    @staticmethod
    def forward(input, target, weight, reduction, label_smoothing, column):
        return _probabilities_forward[column](input, target, weight, reduction, label_smoothing)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, weight, reduction, label_smoothing, column = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, output[1])
        ctx.constants = (reduction, label_smoothing, *ctx.needs_input_grad[:2]), column

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 6
        settings, column = ctx.constants
        if torch.is_grad_enabled():
            found = _autograd.apply(ProbabilitiesBackward, grad_loss, *ctx.saved_tensors, *settings, column)
        else:
            found = _probabilities_backward[column](grad_loss, *ctx.saved_tensors, *settings)
        return *(gradient if need else None for gradient, need in zip(found, settings[2:])), *(None,) * 4


class ProbabilitiesBackward(_autograd.Function):
    """The gradients for logits and targets, differentiable through the reference (which starts from these)."""

    @staticmethod
    def forward(grad_loss, input, target, weight, kept, reduction, label_smoothing, of_input, of_target, column):
        return _probabilities_backward[column](
            grad_loss, input, target, weight, kept, reduction, label_smoothing, of_input, of_target
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_loss, input, target, weight, _, *ctx.settings, _ = inputs
        ctx.save_for_backward(grad_loss, input, target, weight)

    @staticmethod
    def backward(ctx, *cotangents):
        grad_loss, input, target, weight = ctx.saved_tensors
        reduction, label_smoothing, *wanted = ctx.settings

        def gradients(g, x, t):
            found = reference.probabilities_backward(g, x, t, weight, reduction, label_smoothing)
            return tuple(gradient for gradient, need in zip(found, wanted) if need)

        found = _autograd.vjp(
            gradients, (grad_loss, input, target), tuple(c for c, need in zip(cotangents, wanted) if need)
        )
        return *found, *(None,) * 7


def _choose(input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> str:
    """The column of a call, recorded for trace(); "reference" too where derivatives ask for it."""
    if _autograd.use_reference():
        return "reference"
    choice = columns.choose(
        "cross_entropy", input.device.type, input.dtype, columns.state.forced, columns.state.emulated
    )
    if tracing.active:
        tracing.record("cross_entropy", choice.column, choice.reason, input, target, weight)
    return choice.column


def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, reduction: int = 1,
    ignore_index: int = -100, label_smoothing: float = 0.0, sample_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax cross-entropy of logits [N, C, ...] and int64 targets [N, ...]; reduction 0 none, 1 mean, 2 sum. The weights
    have no gradient."""
    settings = weight, sample_weight, reduction, ignore_index, label_smoothing
    column = _choose(input, target, weight)
    if column == "reference":
        return reference.cross_entropy(input, target, *settings)
    if _autograd.needs_grad(input):
        return _autograd.apply(CrossEntropy, input, target, *settings, column)[0]
    return _forward[column](input, target, *settings)[0]


def run(column, input, target, weight, sample_weight, reduction, ignore_index, label_smoothing):
    """cross_entropy on a given column, for a plain call (see _plain.py)."""
    settings = weight, sample_weight, reduction, ignore_index, label_smoothing
    if input.requires_grad and _autograd.recording():
        return CrossEntropy.fast_apply(input, target, *settings, column)[0]
    return _forward[column](input, target, *settings)[0]


def probabilities(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, reduction: int = 1,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Softmax cross-entropy of logits [N, C, ...] and probabilities of their shape and dtype; reduction as above. The
    weights have no gradient."""
    settings = weight, reduction, label_smoothing
    column = _choose(input, target, weight)
    if column == "reference":
        return reference.probabilities(input, target, *settings)
    if _autograd.needs_grad(input, target):
        return _autograd.apply(Probabilities, input, target, *settings, column)[0]
    return _probabilities_forward[column](input, target, *settings)[0]


def run_probabilities(column, input, target, weight, reduction, label_smoothing):
    """cross_entropy of probabilities on a given column, for a plain call (see _plain.py)."""
    settings = weight, reduction, label_smoothing
    if (input.requires_grad or target.requires_grad) and _autograd.recording():
        return Probabilities.fast_apply(input, target, *settings, column)[0]
    return _probabilities_forward[column](input, target, *settings)[0]
