"""Attention with every score: schemas, fake kernels, autograd, dispatch.

One pair of raw ops serves all public functions: they differ in the score (dot, Gaussian, additive) and in what is added
to it. Saved for backward are the operands, the output and two numbers a query; dropout's mask is made again from its
seed. The gradients' own derivatives are the reference's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd
from dlkern.ops._registry import define, raw
from dlkern.reference import attention as reference
from dlkern.reference.attention import ADDITIVE, COSINE, DOT, GAUSSIAN

__all__ = ["ADDITIVE", "COSINE", "DOT", "GAUSSIAN", "Settings", "attention", "run"]


class Settings(NamedTuple):
    """What is constant in a call.

    Attributes:
        p: probability of dropout.
        scale: factor of the scores.
        softcap: c of scores c · tanh(score / c); 0 for none.
        left, right: query i sees keys i - left to i + right; -1 for no bound.
        score: DOT, GAUSSIAN, ADDITIVE or COSINE.
    """

    p: float = 0.0
    scale: float = 1.0
    softcap: float = 0.0
    left: int = -1
    right: int = -1
    score: int = DOT


def empty_results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, in query's order of heads and queries, and statistics, for fake kernels."""
    batch, heads, queries = query.shape[:3]
    depth = value.shape[3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if query.stride(1) < query.stride(2):
        output = query.new_empty((batch, queries, heads, depth)).transpose(1, 2)
    else:
        output = query.new_empty((batch, heads, queries, depth))
    return output, query.new_empty((2, batch, heads, queries), dtype=wide)


def empty_gradients(query, key, value, mask, of_mask):
    """Gradients of query, key, value and mask, for fake kernels."""
    return (
        query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape),
        mask.new_empty(mask.shape) if of_mask else query.new_empty((0,)),
    )


def _fake_forward(query, key, value, mask, lengths, slopes, weight, seed, p, scale, softcap, left, right, score):
    return empty_results(query, value)


def _fake_backward(grad_output, query, key, value, mask, lengths, slopes, weight, seed, output, statistics, p, scale, softcap,
                   left, right, score, of_mask, from_scores=False):  # fmt: skip
    of_weight = query.new_empty((0,)) if weight is None else weight.new_empty(weight.shape)
    return *empty_gradients(query, key, value, mask, of_mask), of_weight


_SETTINGS = "float p, float scale, float softcap, int left, int right, int score"
_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? lengths, Tensor? slopes, Tensor? weight, Tensor? seed"
)
define(
    "attention_forward", f"({_OPERANDS}, {_SETTINGS}) -> (Tensor, Tensor)", _fake_forward,
    triton="dlkern.kernels.attention:attention_forward",
)
define(
    "attention_backward",
    f"(Tensor grad_output, {_OPERANDS}, Tensor output, Tensor statistics, {_SETTINGS}, bool of_mask, "
    "bool from_scores=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_backward,
    triton="dlkern.kernels.attention:attention_backward",
)
PUBLIC = (
    "scaled_dot_product_attention", "dot_attention", "cosine_attention", "gaussian_attention", "additive_attention",
)
for _op in PUBLIC:
    columns.declare(_op, "cpu", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    columns.declare(_op, "triton", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    columns.declare(_op, "cuda", (torch.float32, torch.bfloat16, torch.float16))

_forward, _backward = raw["attention_forward"], raw["attention_backward"]


class Attention(_autograd.Function):
    """(output, statistics); the latter is for the backward alone."""

    @staticmethod
    def forward(query, key, value, mask, lengths, slopes, weight, seed, settings, from_scores, column):
        return _forward[column](query, key, value, mask, lengths, slopes, weight, seed, *settings)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, settings, from_scores, column = inputs
        output, statistics = outputs
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output, statistics)
        ctx.constants = settings, from_scores, ctx.needs_input_grad, column

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 11
        *tensors, output, statistics = ctx.saved_tensors
        settings, from_scores, need, column = ctx.constants
        if torch.is_grad_enabled():
            found = _autograd.apply(
                AttentionBackward, grad_output, *tensors, output, statistics, settings, need[3], from_scores, column
            )
        else:
            found = _backward[column](grad_output, *tensors, output, statistics, *settings, need[3], from_scores)
        of_query, of_key, of_value, of_mask, of_weight = found
        return (
            of_query if need[0] else None, of_key if need[1] else None, of_value if need[2] else None,
            of_mask if need[3] else None, None, None, of_weight if need[6] else None, *(None,) * 4,
        )


class AttentionBackward(_autograd.Function):
    """The gradients; differentiable as the reference's vector-Jacobian product, which starts from the operands."""

    @staticmethod
    def forward(grad_output, query, key, value, mask, lengths, slopes, weight, seed, output, statistics, settings, of_mask,
                from_scores, column):  # fmt: skip
        return _backward[column](
            grad_output, query, key, value, mask, lengths, slopes, weight, seed, output, statistics, *settings, of_mask,
            from_scores,
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        grad_output, query, key, value, mask, lengths, slopes, weight, seed, _, _, settings, of_mask, _, _ = inputs
        ctx.save_for_backward(grad_output, query, key, value, mask, lengths, slopes, weight, seed)
        ctx.constants = settings, of_mask

    @staticmethod
    def backward(ctx, *cotangents):
        grad_output, query, key, value, mask, lengths, slopes, weight, seed = ctx.saved_tensors
        settings, of_mask = ctx.constants
        primals, places = [query, key, value], [0, 1, 2]
        for place, tensor in ((3, mask if of_mask else None), (4, weight)):
            if tensor is not None:
                primals.append(tensor)
                places.append(place)

        def forward(*tensors):
            full = dict(zip(places, tensors))
            return reference.attention(
                full[0], full[1], full[2], full.get(3, mask), lengths, slopes, full.get(4), seed, *settings
            )

        def gradients(grad, *tensors):
            return torch.func.vjp(forward, *tensors)[1](grad)

        found = _autograd.vjp(gradients, (grad_output, *primals), tuple(cotangents[place] for place in places))
        by_place = dict(zip(places, found[1:]))
        return (
            found[0], by_place[0], by_place[1], by_place[2], by_place.get(3), None, None, by_place.get(4), *(None,) * 7,
        )


def attention(
    op: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    lengths: torch.Tensor | None, slopes: torch.Tensor | None, weight: torch.Tensor | None, seed: torch.Tensor | None,
    settings: Settings, from_scores: bool = False, reason: str = "",
) -> torch.Tensor:
    """Attention of [B, H, L, D], [B, Hk, S, D] and [B, Hk, S, Dv]; arguments are valid.

    Args:
        op: the public op that trace() is told of.
        mask: bool (True: seen) or floating point (added), 4-D, each size the attention's or 1; or None.
        lengths: int64 [B, 1] or [B, L], of keys seen; or None.
        slopes: [H], of -slope · |i - j|; or None.
        weight: [D], of the additive score; or None.
        seed: of dropout, one int64; or None.
        from_scores: whether torch has the matrix of scores of such a call in memory, so that its gradients start from the
            scores; ours then do too, without the matrix, in another pass over the keys. Else they start from the output,
            as torch's tiles do, which in 16 bits is rounded.
        reason: what trace() is told where the column itself has none.
    """
    tensors = (query, key, value, mask, lengths, slopes, weight, seed)
    column = "reference"
    if not _autograd.use_reference():
        choice = columns.choose(op, query.device.type, query.dtype, columns.state.forced, columns.state.emulated)
        column, why = choice.column, choice.reason or reason
        if _autograd.asks_gradient(slopes):
            column, why = "reference", "the slopes require a gradient"
        if tracing.active:
            tracing.record(op, column, why, query, key, value, mask)
    if column == "reference":
        return reference.attention(*tensors, *settings)
    if _autograd.needs_grad(query, key, value, mask, weight):
        return _autograd.apply(Attention, *tensors, settings, from_scores, column)[0]
    return _forward[column](*tensors, *settings)[0]


def run(column, query, key, value, mask, settings, lengths=None, weight=None, from_scores=False):
    """attention without slopes and dropout on a given column, for a plain call (see _plain.py)."""
    tensors = (query, key, value, mask, lengths, None, weight, None)
    wanted = (
        query.requires_grad or key.requires_grad or value.requires_grad or (mask is not None and mask.requires_grad)
        or (weight is not None and weight.requires_grad)
    )
    if wanted and _autograd.recording():
        return Attention.fast_apply(*tensors, settings, from_scores, column)[0]
    return _forward[column](*tensors, *settings)[0]
