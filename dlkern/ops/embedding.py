"""embedding: schemas, fake kernels, autograd, dispatch.

Saved for backward: the indices. The gradient of the table is dense, and each of its rows is summed in the order of the
positions, whatever the column and the number of threads.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import embedding as reference

__all__ = ["embedding", "run"]


def _fake_forward(weight, indices):
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _fake_backward(grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq):
    return grad_output.new_empty((num_embeddings, grad_output.shape[-1]))


define(
    "embedding_forward", "(Tensor weight, Tensor indices) -> Tensor", _fake_forward,
    triton="dlkern.kernels.embedding:embedding_forward",
)
define(
    "embedding_backward",
    "(Tensor grad_output, Tensor indices, SymInt num_embeddings, int padding_idx, bool scale_grad_by_freq) -> Tensor",
    _fake_backward, triton="dlkern.kernels.embedding:embedding_backward",
)
columns.declare("embedding", "cpu", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
columns.declare("embedding", "triton", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
columns.declare("embedding", "cuda", (torch.float32, torch.bfloat16, torch.float16))

_forward, _backward = raw["embedding_forward"], raw["embedding_backward"]


class Embedding(_autograd.Function):
    """Rows of the table."""

    @staticmethod
    def forward(weight, indices, padding_idx, scale_grad_by_freq, column):
        return _forward[column](weight, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, indices, *settings, column = inputs
        ctx.constants = weight.shape[0], settings, column
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx, grad_output):
        (indices,) = ctx.saved_tensors
        rows, settings, column = ctx.constants
        if torch.is_grad_enabled():
            grad = _autograd.apply(EmbeddingBackward, grad_output, indices, rows, *settings, column)
        else:
            grad = _backward[column](grad_output, indices, rows, *settings)
        return grad, None, None, None, None


class EmbeddingBackward(_autograd.Function):
    """The gradient of the table, differentiable through the reference."""

    @staticmethod
    def forward(grad_output, indices, rows, padding_idx, scale_grad_by_freq, column):
        return _backward[column](grad_output, indices, rows, padding_idx, scale_grad_by_freq)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, indices, *settings, _ = inputs
        ctx.settings = settings
        ctx.save_for_backward(grad_output, indices)

    @staticmethod
    def backward(ctx, cotangent):
        grad_output, indices = ctx.saved_tensors
        (grad,) = _autograd.vjp(
            lambda g: reference.embedding_backward(g, indices, *ctx.settings), (grad_output,), cotangent
        )
        return grad, None, None, None, None, None


def embedding(
    weight: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False
) -> torch.Tensor:
    """Rows `indices` (int64 or int32, of any shape) of weight [V, D]; the gradient of row padding_idx is zero."""
    if _autograd.use_reference():
        return reference.embedding(weight, indices, padding_idx, scale_grad_by_freq)
    choice = columns.choose(
        "embedding", weight.device.type, weight.dtype, columns.state.forced, columns.state.emulated
    )
    if tracing.active:
        tracing.record("embedding", choice.column, choice.reason, weight, indices)
    if choice.column == "reference":
        return reference.embedding(weight, indices, padding_idx, scale_grad_by_freq)
    if _autograd.needs_grad(weight):
        return _autograd.apply(Embedding, weight, indices, padding_idx, scale_grad_by_freq, choice.column)
    return _forward[choice.column](weight, indices)


def run(column, weight, indices, padding_idx, scale_grad_by_freq):
    """embedding on a given column, for a plain call (see _plain.py)."""
    if weight.requires_grad and _autograd.recording():
        return _autograd.apply(Embedding, weight, indices, padding_idx, scale_grad_by_freq, column)
    return _forward[column](weight, indices)
