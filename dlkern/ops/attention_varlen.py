"""Scaled dot-product attention of sequences that lie one after another, [tokens, heads, depth]: schemas, autograd, dispatch.

The kernels are attention's: on the CPU a call for each sequence where it lies, on GPUs a launch for all. The reference does the
same in torch expressions, for the gradients' own derivatives.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import attention as reference

__all__ = ["attention_varlen"]


def _fake_forward(query, key, value, starts_of_queries, starts_of_keys, seed, p, scale, softcap, left, right):
    tokens, heads = query.shape[:2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((tokens, heads, value.shape[2])), query.new_empty((2, heads * tokens), dtype=wide)


def _fake_backward(grad_output, query, key, value, starts_of_queries, starts_of_keys, seed, output, statistics, p, scale,
                   softcap, left, right):  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor starts_of_queries, Tensor starts_of_keys, Tensor? seed"
_SETTINGS = "float p, float scale, float softcap, int left, int right"
define(
    "attention_varlen_forward", f"({_OPERANDS}, {_SETTINGS}) -> (Tensor, Tensor)", _fake_forward,
    triton="dlkern.kernels.attention_varlen:attention_varlen_forward",
)
define(
    "attention_varlen_backward",
    f"(Tensor grad_output, {_OPERANDS}, Tensor output, Tensor statistics, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward, triton="dlkern.kernels.attention_varlen:attention_varlen_backward",
)
for _column in ("cpu", "triton"):
    columns.declare("varlen_attn", _column, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
columns.declare("varlen_attn", "cuda", (torch.float32, torch.bfloat16, torch.float16))

_forward, _backward = raw["attention_varlen_forward"], raw["attention_varlen_backward"]


class AttentionVarlen(_autograd.Function):
    """(output, statistics); the latter is for the backward alone."""

    @staticmethod
    def forward(query, key, value, starts_of_queries, starts_of_keys, seed, settings, column):
        return _forward[column](query, key, value, starts_of_queries, starts_of_keys, seed, *settings)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, settings, column = inputs
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *outputs)
        ctx.constants = settings, column

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 8
        settings, column = ctx.constants
        if torch.is_grad_enabled():
            found = _autograd.apply(AttentionVarlenBackward, grad_output, *ctx.saved_tensors, settings, column)
        else:
            found = _backward[column](grad_output, *ctx.saved_tensors, *settings)
        wanted = (x if need else None for x, need in zip(found, ctx.needs_input_grad))
        return *wanted, None, None, None, None, None


class AttentionVarlenBackward(_autograd.Function):
    """The gradients; differentiable as the reference's vector-Jacobian product."""

    @staticmethod
    def forward(grad_output, query, key, value, starts_of_queries, starts_of_keys, seed, output, statistics, settings,
                column):  # fmt: skip
        return _backward[column](
            grad_output, query, key, value, starts_of_queries, starts_of_keys, seed, output, statistics, *settings
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, _, _, settings, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.settings = settings

    @staticmethod
    def backward(ctx, *cotangents):
        grad_output, query, key, value, *rest = ctx.saved_tensors

        def gradients(grad, *operands):
            def forward(*operands):
                return reference.attention_varlen(*operands, *rest, *ctx.settings)

            return torch.func.vjp(forward, *operands)[1](grad)

        found = _autograd.vjp(gradients, (grad_output, query, key, value), cotangents)
        return *found, *(None,) * 7


def attention_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts_of_queries: torch.Tensor,
    starts_of_keys: torch.Tensor, seed: torch.Tensor | None, p: float, scale: float, softcap: float, left: int, right: int,
) -> torch.Tensor:
    """Attention within each sequence of [tokens, H, D], [tokens, Hk, D], [tokens, Hk, Dv]; arguments are valid.

    Args:
        starts_of_queries, starts_of_keys: int64 [sequences + 1] on the CPU, where sequences begin, and the end.
        seed: of dropout, one int64, or None: sequence b drops what a call of its own with seed + b would.
        p, scale, softcap: as in attention.Settings.
        left, right: a window, aligned at the last query and the last key; -1 for no bound.
    """
    tensors = query, key, value, starts_of_queries, starts_of_keys, seed
    settings = p, scale, softcap, left, right
    column = "reference"
    if not _autograd.use_reference():
        choice = columns.choose(
            "varlen_attn", query.device.type, query.dtype, columns.state.forced, columns.state.emulated
        )
        column = choice.column
        if tracing.active:
            tracing.record("varlen_attn", column, choice.reason, query, key, value)
    if column == "reference":
        return reference.attention_varlen(*tensors, *settings)
    if _autograd.needs_grad(query, key, value):
        return _autograd.apply(AttentionVarlen, *tensors, settings, column)[0]
    return _forward[column](*tensors, *settings)[0]
