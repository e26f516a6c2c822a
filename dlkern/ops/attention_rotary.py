"""Scaled dot-product attention of operands with rotary positions: schemas, autograd, dispatch.

The kernels of attention, which turn queries and keys as they load them and turn the gradients back as they store them. The
gradients' own derivatives are the reference's. Where the angles want a gradient, the operands are turned first.
"""

from __future__ import annotations

import torch

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops import _autograd, positions
from dlkern.ops._registry import define, raw
from dlkern.ops.attention import Settings, attention, empty_gradients, empty_results
from dlkern.reference import attention as reference

__all__ = ["FACTS", "attention_rotary"]

FACTS = ("rotary",)  # of a call, for columns.choose


def _fake_forward(query, key, value, mask, lengths, slopes, seed, cos, sin, p, scale, softcap, left, right, interleaved):
    return empty_results(query, value)


def _fake_backward(grad_output, query, key, value, mask, lengths, slopes, seed, cos, sin, output, statistics, p, scale, softcap,
                   left, right, interleaved, of_mask):  # fmt: skip
    return empty_gradients(query, key, value, mask, of_mask)


_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? lengths, Tensor? slopes, Tensor? seed, Tensor cos, "
    "Tensor sin"
)
_SETTINGS = "float p, float scale, float softcap, int left, int right, bool interleaved"
define(
    "attention_rotary_forward", f"({_OPERANDS}, {_SETTINGS}) -> (Tensor, Tensor)", _fake_forward,
    triton="dlkern.kernels.attention:attention_rotary_forward",
)
define(
    "attention_rotary_backward",
    f"(Tensor grad_output, {_OPERANDS}, Tensor output, Tensor statistics, {_SETTINGS}, bool of_mask) -> "
    "(Tensor, Tensor, Tensor, Tensor)", _fake_backward, triton="dlkern.kernels.attention:attention_rotary_backward",
)

_forward, _backward = raw["attention_rotary_forward"], raw["attention_rotary_backward"]


class AttentionRotary(_autograd.Function):
    """(output, statistics); the latter is for the backward alone."""

    @staticmethod
    def forward(query, key, value, mask, lengths, slopes, seed, cos, sin, settings, column):
        return _forward[column](query, key, value, mask, lengths, slopes, seed, cos, sin, *settings)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, settings, column = inputs
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*tensors, *outputs)
        ctx.constants = settings, ctx.needs_input_grad[:4], column

    @staticmethod
    def backward(ctx, grad_output, _):
        settings, need, column = ctx.constants
        if torch.is_grad_enabled():
            found = _autograd.apply(AttentionRotaryBackward, grad_output, *ctx.saved_tensors, settings, need[3], column)
        else:
            found = _backward[column](grad_output, *ctx.saved_tensors, *settings, need[3])
        return *(x if wanted else None for x, wanted in zip(found, need)), *(None,) * 7


class AttentionRotaryBackward(_autograd.Function):
    """The gradients; differentiable as the reference's vector-Jacobian product, which starts from the operands."""

    @staticmethod
    def forward(grad_output, query, key, value, mask, lengths, slopes, seed, cos, sin, output, statistics, settings, of_mask,
                column):  # fmt: skip
        return _backward[column](
            grad_output, query, key, value, mask, lengths, slopes, seed, cos, sin, output, statistics, *settings, of_mask
        )

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, _, _, settings, of_mask, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.constants = settings, of_mask

    @staticmethod
    def backward(ctx, *cotangents):
        grad_output, query, key, value, mask, *rest = ctx.saved_tensors
        settings, of_mask = ctx.constants
        primals = (query, key, value, mask) if of_mask else (query, key, value)

        def forward(query, key, value, mask=mask):
            return reference.attention_rotary(query, key, value, mask, *rest, *settings)

        def gradients(grad, *tensors):
            return torch.func.vjp(forward, *tensors)[1](grad)

        found = _autograd.vjp(gradients, (grad_output, *primals), cotangents[: len(primals)])
        return *found, *(None,) * (15 - len(found))


def attention_rotary(
    op: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    lengths: torch.Tensor | None, slopes: torch.Tensor | None, seed: torch.Tensor | None, settings: Settings,
    cos: torch.Tensor, sin: torch.Tensor, interleaved: bool,
) -> torch.Tensor:
    """attention() of query and key after rotary positions; arguments are valid.

    Args:
        op, query, key, value, mask, lengths, slopes, seed, settings: as of attention().
        cos, sin: [B or 1, 1, P, half], of positions 0 to P - 1; P is the number of queries or of keys, the larger one.
        interleaved: which elements are pairs.
    """
    tensors = (query, key, value, mask, lengths, slopes, seed, cos, sin)
    constants = (*settings[:-1], interleaved)
    if _autograd.use_reference():
        return reference.attention_rotary(*tensors, *constants)
    arguments = op, query.device.type, query.dtype, columns.state.forced, columns.state.emulated
    choice = columns.choose(*arguments, FACTS)
    column, reason = choice.column, choice.reason
    if _autograd.asks_gradient(cos, sin):
        column, reason = "reference", "the angles require a gradient"
    elif _autograd.asks_gradient(slopes):
        column, reason = "reference", "the slopes require a gradient"
    if column == "reference" and columns.choose(*arguments).column != "reference":
        turned = (
            positions.rotary(x, cos[:, :, : x.shape[2]], sin[:, :, : x.shape[2]], interleaved) for x in (query, key)
        )
        return attention(op, next(turned), next(turned), value, mask, lengths, slopes, None, seed, settings, reason=reason)
    if tracing.active:
        tracing.record(op, column, reason, query, key, value, mask, cos, sin)
    if column == "reference":
        return reference.attention_rotary(*tensors, *constants)
    if _autograd.needs_grad(query, key, value, mask):
        return _autograd.apply(AttentionRotary, *tensors, constants, column)[0]
    return _forward[column](*tensors, *constants)[0]
