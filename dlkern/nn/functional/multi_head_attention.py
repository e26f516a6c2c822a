"""torch.nn.functional.multi_head_attention_forward on dlkern's linear and attention."""

from __future__ import annotations

import torch

from dlkern import trace as tracing
from dlkern.nn.functional._autocast import lowered
from dlkern.nn.functional.dropout import _seed
from dlkern.nn.functional.linear import linear
from dlkern.ops.attention import DOT, Settings, attention

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


def _projected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor, ...]:
    """q, k and v, [*, *, heads, depth] in the operands' order of batch and sequence; weights and biases as in `attend`.
    What has the same input is one product."""

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: int) -> tuple[torch.Tensor, ...]:
        y = linear(x, weight, bias)
        return y.view(*y.shape[:-1], parts, heads, y.shape[-1] // (parts * heads)).unbind(-3)

    if len(weights) == 3:
        return tuple(product(x, w, b, 1)[0] for x, w, b in zip((query, key, value), weights, biases))
    (weight,), (bias,) = weights, biases
    if query is key and key is value:
        return product(query, weight, bias, 3)
    third = weight.shape[0] // 3
    shares = [third, 2 * third] if key is value else [third] * 3
    parts = weight.split(shares)
    some = [None] * len(shares) if bias is None else bias.split(shares)
    if key is value:
        return *product(query, parts[0], some[0], 1), *product(key, parts[1], some[1], 2)
    return tuple(product(x, w, b, 1)[0] for x, w, b in zip((query, key, value), parts, some))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: bool, heads: int, weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...], bias_k: torch.Tensor | None, bias_v: torch.Tensor | None, zero: bool,
    dropout_p: float, out_weight: torch.Tensor, out_bias: torch.Tensor | None, padding: torch.Tensor | None,
    mask: torch.Tensor | None, need_weights: bool, average: bool, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multi-head attention of [B, L, E], [B, S, Ek] and [B, S, Ev], or with first=False of [L, B, E] and so on, like its
    result; arguments are valid.

    weights, biases: of the projections of query, key and value, or one of all three stacked.
    padding: [B, S], mask: 4-D; True takes part, numbers are added.
    """
    q, k, v = _projected(query, key, value, heads, weights, biases)
    sequence = 1 if first else 0
    batch, depth = q.shape[1 - sequence], q.shape[-1]
    more = [] if bias_k is None or bias_v is None else [(bias_k, bias_v)]
    if zero:
        more.append((k.new_zeros(heads * depth),) * 2)
    for added in more:
        one = (batch, 1) if first else (1, batch)
        k, v = (
            torch.cat([x, a.to(x.dtype).view(heads, depth).expand(*one, heads, depth)], sequence)
            for x, a in zip((k, v), added)
        )
    if more:  # the added keys are seen by all
        mask, padding = (
            None if m is None else torch.nn.functional.pad(m, (0, len(more)), value=1.0 if m.dtype == torch.bool else 0.0)
            for m in (mask, padding)
        )
    if padding is not None:
        padding = padding[:, None, None, :]
    both = _merged(mask, padding, q.dtype)
    if both is not None and both.is_floating_point():
        _, both = lowered(q, both)
    if first:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    else:
        q, k, v = q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
    settings = Settings(dropout_p, depth**-0.5, 0.0, -1, 0 if causal else -1, DOT)
    seed = _seed(q) if dropout_p > 0 else None
    output = attention(_OP, q, k, v, both, None, None, None, seed, settings)
    found = None
    if need_weights:  # the weighted sums of unit vectors, under the same dropout
        unit = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(batch, heads, -1, -1)
        found = attention(_OP, q, k, unit, both, None, None, None, seed, settings)
        if average:
            found = found.mean(1)
        found = found.contiguous()
    together = output.transpose(1, 2) if first else output.permute(2, 0, 1, 3).contiguous()
    return linear(together.flatten(2), out_weight, out_bias), found


def _unusual(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: bool, embed: int, heads: int, width: int,
    separate: bool, padding: torch.Tensor | None, mask: torch.Tensor | None, causal: bool,
) -> str | None:
    """What of a batched call torch is to answer, or None."""
    of_query, of_key = query.shape, query.shape if key is query else key.shape
    if of_query[2] != embed or heads <= 0 or width % heads:
        return "sizes do not fit"
    if value is not key:
        of_value = value.shape
        if of_key[:2] != of_value[:2] or (not separate and of_key != of_value):
            return "sizes do not fit"
    batch, length, keys = (of_query[0], of_query[1], of_key[1]) if first else (of_query[1], of_query[0], of_key[0])
    if of_key[0 if first else 1] != batch or (not separate and of_key[2] != embed):
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


def multi_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: bool, embed: int, heads: int, width: int,
    weights: tuple[torch.Tensor, ...], bias: torch.Tensor | None, bias_k: torch.Tensor | None, bias_v: torch.Tensor | None,
    zero: bool, dropout_p: float, out_weight: torch.Tensor, out_bias: torch.Tensor | None, padding: torch.Tensor | None,
    need_weights: bool, mask: torch.Tensor | None, average: bool, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor | None] | str:
    """multi_head_attention_forward, with `first` of operands [B, L, E] where they are batched; or why torch is to answer.

    weights: of the projections of query, key and value, or one of all three stacked; bias: of all three.
    """
    try:
        unbatched = query.dim() == 2
        if unbatched and key.dim() == value.dim() == 2:
            axis = 0 if first else 1
            same = query is key and key is value
            query = query.unsqueeze(axis)
            key, value = (query, query) if same else (key.unsqueeze(axis), value.unsqueeze(axis))
            padding = None if padding is None else padding.unsqueeze(0)
        if not query.dim() == key.dim() == value.dim() == 3:
            return "operands are not all batched or all not"
        reason = _unusual(query, key, value, first, embed, heads, width, len(weights) == 3, padding, mask, causal)
    except AttributeError:
        reason = "not tensors"
    if reason is not None:
        return reason
    only_causal = causal and padding is None and not need_weights
    if only_causal:
        mask = None
    elif mask is not None:
        seen: torch.Tensor = _seen(mask)  # type: ignore[assignment]
        mask = seen[None, None] if seen.dim() == 2 else seen.view(seen.shape[0] // heads, heads, *seen.shape[1:])
    biases = (bias,) if len(weights) == 1 else (None,) * 3 if bias is None else bias.chunk(3)
    output, found = attend(
        query, key, value, first, heads, weights, biases, bias_k, bias_v, zero, dropout_p, out_weight, out_bias,
        _seen(padding), mask, need_weights, average, only_causal,
    )
    if unbatched:
        return output.squeeze(0 if first else 1), None if found is None else found.squeeze(0)
    return output, found


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
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else (in_proj_weight,)
    found: tuple[torch.Tensor, torch.Tensor | None] | str = "static keys or values"
    if static_k is None and static_v is None:
        found = multi_head(
            query, key, value, False, embed_dim_to_check, num_heads, embed_dim_to_check if width is None else width,
            weights, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p if training else 0.0,  # type: ignore[arg-type]
            out_proj_weight, out_proj_bias, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
        )
    if not isinstance(found, str):
        return found
    if tracing.active and isinstance(query, torch.Tensor):
        tracing.record("multi_head_attention_forward", "torch", found, query)
    if width not in (None, embed_dim_to_check):
        raise RuntimeError(f"multi_head_attention_forward with pruned heads: {found}")
    return torch.nn.functional.multi_head_attention_forward(
        query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
        dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask, need_weights, attn_mask,
        use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight, static_k, static_v, average_attn_weights,
        is_causal,
    )  # fmt: skip
