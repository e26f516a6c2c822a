"""torch.nn.functional.multi_head_attention_forward on dlkern's linear and attention."""

from __future__ import annotations

from typing import Any

import torch

from dlkern import trace as tracing
from dlkern.nn.functional._autocast import lowered
from dlkern.nn.functional.attention import _attend
from dlkern.nn.functional.dropout import _seed
from dlkern.nn.functional.linear import linear
from dlkern.ops.attention import Settings

__all__ = ["multi_head_attention_forward"]

_OP = "scaled_dot_product_attention"


def _seen(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of multi-head attention (bool: True is left out) as one of scaled_dot_product_attention."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _merged(mask: torch.Tensor | None, padding: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Both masks in one: only where there are two does a new one come to be."""
    if mask is None or padding is None:
        return padding if mask is None else mask
    if mask.dtype == padding.dtype == torch.bool:
        return mask & padding
    added = [
        torch.zeros_like(m, dtype=dtype).masked_fill(~m, -torch.inf) if m.dtype == torch.bool else m for m in (mask, padding)
    ]
    return added[0] + added[1]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...], bias_k: torch.Tensor | None, bias_v: torch.Tensor | None, zero: bool,
    dropout_p: float, out_weight: torch.Tensor, out_bias: torch.Tensor | None, padding: torch.Tensor | None,
    mask: torch.Tensor | None, need_weights: bool, average: bool, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-head attention of [B, L, E], [B, S, Ek] and [B, S, Ev]; arguments are valid.

    weights, biases: of the projections of query, key and value, or one of all three stacked.
    padding: [B, S], mask: 4-D; True takes part, numbers are added.
    """
    if len(weights) == 1 and query is key and key is value:
        q, k, v = linear(query, weights[0], biases[0]).chunk(3, -1)
    else:
        parts = weights if len(weights) == 3 else weights[0].chunk(3)
        some = biases if len(biases) == 3 else (None,) * 3 if biases[0] is None else biases[0].chunk(3)
        q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), parts, some))
    batch, embed = q.shape[0], q.shape[2]
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([x, b.expand(batch, 1, -1)], 1) for x, b in ((k, bias_k), (v, bias_v)))
    if zero:
        k, v = (torch.cat([x, x.new_zeros(batch, 1, embed)], 1) for x in (k, v))
    more = k.shape[1] - key.shape[1]
    if more:  # the added keys are seen by all
        mask, padding = (
            None if m is None else torch.nn.functional.pad(m, (0, more), value=1.0 if m.dtype == torch.bool else 0.0)
            for m in (mask, padding)
        )
    if padding is not None:
        padding = padding[:, None, None, :]
    both = _merged(mask, padding, q.dtype)
    if both is not None and both.is_floating_point():
        _, both = lowered(q, both)
    q, k, v = (x.unflatten(-1, (heads, embed // heads)).transpose(1, 2) for x in (q, k, v))
    settings = Settings(scale=(embed // heads) ** -0.5, right=0 if causal else -1)
    seed = _seed(q) if dropout_p > 0 else None
    output = _attend(_OP, q, k, v, both, dropout_p, False, settings, seed=seed)
    found = None
    if need_weights:  # the weighted sums of unit vectors, under the same dropout
        unit = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
        found = _attend(_OP, q, k, unit, both, dropout_p, False, settings, seed=seed)
        if average:
            found = found.mean(1)
    return linear(output.transpose(1, 2).flatten(2), out_weight, out_bias), found


def _unusual(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, embed: int, heads: int, width: int, separate: bool,
    padding: torch.Tensor | None, mask: torch.Tensor | None, causal: bool,
) -> str | None:
    """What of a batched call [L, B, E] torch is to answer, or None."""
    length, batch, size = query.shape
    keys = key.shape[0]
    if size != embed or heads <= 0 or width % heads or key.shape[:2] != value.shape[:2] or key.shape[1] != batch:
        return "sizes do not fit"
    if not separate and (key.shape != value.shape or key.shape[2] != embed):
        return "sizes do not fit"
    if padding is not None and padding.shape != (batch, keys):
        return "key_padding_mask is not [batch, keys]"
    if mask is not None and mask.shape not in ((length, keys), (batch * heads, length, keys)):
        return "attn_mask is not [L, S] or [batch * heads, L, S]"
    if causal and mask is None:
        return "is_causal without attn_mask"
    for m in (padding, mask):
        if m is not None and m.dtype not in (torch.bool, torch.float32, query.dtype):
            return "a mask is neither bool nor floating point"
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype or query.is_nested:
        return "operands differ in dtype, or are not floating point"
    return None


def multi_head_attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: torch.Tensor | None, in_proj_bias: torch.Tensor | None, bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None, add_zero_attn: bool, dropout_p: float, out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None, training: bool = True, key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True, attn_mask: torch.Tensor | None = None, use_separate_proj_weight: bool = False,
    q_proj_weight: torch.Tensor | None = None, k_proj_weight: torch.Tensor | None = None,
    v_proj_weight: torch.Tensor | None = None, static_k: torch.Tensor | None = None, static_v: torch.Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False, *, width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """torch.nn.functional.multi_head_attention_forward: its arguments, results [L, B, E] and attention weights, and errors.

    width: of all heads together, where that is not embed_dim_to_check because some were pruned (torch has none of this).
    A query that sees no key gets zeros, also where weights are asked for (torch gives NaN there).
    Vaswani et al. 2017, "Attention is all you need", section 3.2.2.
    """
    everything: dict[str, Any] = dict(locals())
    del everything["width"]
    reason: str | None = "static keys or values"
    unbatched = False
    try:
        unbatched = query.dim() == 2
        q, k, v, padding, mask = query, key, value, key_padding_mask, attn_mask
        if unbatched and key.dim() == value.dim() == 2:
            q, k, v = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            if query is key and key is value:
                k = v = q
            padding = None if padding is None else padding.unsqueeze(0)
        if static_k is None and static_v is None:
            reason = "operands are not all batched or all not"
            if q.dim() == k.dim() == v.dim() == 3:
                reason = _unusual(
                    q, k, v, embed_dim_to_check, num_heads, width or embed_dim_to_check, use_separate_proj_weight, padding,
                    mask, is_causal,
                )  # fmt: skip
    except AttributeError:
        reason = "not tensors"
    if reason is not None:
        if tracing.active and isinstance(query, torch.Tensor):
            tracing.record("multi_head_attention_forward", "torch", reason, query)
        if width not in (None, embed_dim_to_check):
            raise RuntimeError(f"multi_head_attention_forward with pruned heads: {reason}")
        return torch.nn.functional.multi_head_attention_forward(**everything)
    batch, keys = q.shape[1], k.shape[0]
    only_causal = is_causal and padding is None and not need_weights
    if only_causal:
        mask = None
    elif mask is not None:
        mask = _seen(mask)[None, None] if mask.dim() == 2 else _seen(mask).view(batch, num_heads, -1, keys)  # type: ignore[index, union-attr]
    same = q is k and k is v
    q = q.transpose(0, 1)
    k, v = (q, q) if same else (k.transpose(0, 1), v.transpose(0, 1))
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else (in_proj_weight,)
    biases: tuple[Any, ...] = (in_proj_bias,)
    if use_separate_proj_weight:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    output, found = attend(
        q, k, v, num_heads, weights, biases, bias_k, bias_v, add_zero_attn,  # type: ignore[arg-type]
        dropout_p if training else 0.0, out_proj_weight, out_proj_bias, _seen(padding), mask, need_weights,
        average_attn_weights, only_causal,
    )
    output = output.transpose(0, 1)
    if unbatched:
        return output.squeeze(1), None if found is None else found.squeeze(0)
    return output.contiguous(), found
