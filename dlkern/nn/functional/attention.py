"""Attention: torch.nn.functional.scaled_dot_product_attention, and the other scores of the literature."""

from __future__ import annotations

import math

import torch
from torch.overrides import handle_torch_function

from dlkern import ops
from dlkern import trace as tracing
from dlkern.nn.functional._autocast import lowered
from dlkern.nn.functional.dropout import _seed
from dlkern.nn.functional.varlen import jagged_attention
from dlkern.ops import _plain
from dlkern.ops.attention import ADDITIVE, COSINE, DOT, GAUSSIAN, Settings

__all__ = [
    "additive_attention", "cosine_attention", "dot_attention", "gaussian_attention", "scaled_dot_product_attention",
]  # fmt: skip

_SIZES = "sizes of operands do not fit"


def _unusual(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, gqa: bool) -> str | None:
    """What of a call is outside our kernels (torch takes it, or raises its own error), or None."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return "fewer than 2 dimensions"
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        return "operands differ in dtype, or are not floating point"
    if not query.device == key.device == value.device:
        return "operands are on different devices"
    if query.is_nested or key.is_nested or value.is_nested or query.is_sparse or key.is_sparse or value.is_sparse:
        return "nested or sparse"
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return _SIZES
    if mask is not None and (mask.device != query.device or mask.dtype not in (torch.bool, torch.float32, query.dtype)):
        return "mask is elsewhere, or neither bool nor float32 nor of query's dtype"
    if mask is not None and (mask.is_nested or mask.is_sparse or mask.dim() == 0):
        return "mask is nested, sparse or a number"
    if gqa:
        if min(query.dim(), key.dim(), value.dim()) < 4:
            return "enable_gqa wants 4 dimensions"
        heads, groups = query.shape[-3], key.shape[-3]
        if groups != value.shape[-3] or groups == 0 or heads % groups:
            return "heads of keys do not divide those of queries"
    return None


def _four(x: torch.Tensor, lead: torch.Size, dims: int) -> torch.Tensor:
    """x [*, M, N] with its leading dimensions broadcast to `lead`, as 4-D."""
    if x.shape[:-2] != lead:
        x = x.expand(*lead, *x.shape[-2:])
    if dims == 4:
        return x
    if dims < 4:
        return x[(None,) * (4 - dims)]
    return x.reshape(-1, *x.shape[-3:])


def _four_mask(mask: torch.Tensor, lead: torch.Size, dims: int) -> torch.Tensor:
    """A mask that broadcasts to [*lead, L, S] as 4-D, without making it larger where it broadcasts."""
    if dims <= 4:
        return mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
    if mask.dim() <= 3:
        return mask[(None,) * (4 - mask.dim())]
    mask = mask[(None,) * (dims - mask.dim())]
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead[:-1], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


def _lead(query: torch.Size, key: torch.Size, value: torch.Size) -> torch.Size:
    """What leading dimensions broadcast to. (torch.broadcast_shapes takes 40 µs.)"""
    return query if query == key == value else torch.broadcast_shapes(query, key, value)  # type: ignore[return-value]


def _attend(
    op: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout_p: float,
    gqa: bool, settings: Settings, lengths: torch.Tensor | None = None, slopes: torch.Tensor | None = None,
    weight: torch.Tensor | None = None, seed: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor, bool] | None = None, from_scores: bool = False,
) -> torch.Tensor:
    """Operands [*, L, D], [*, S, D], [*, S, Dv] with leading dimensions that broadcast; rotary: cos, sin, interleaved."""
    if gqa:
        batch = _lead(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        lead, of_keys = torch.Size((*batch, query.shape[-3])), torch.Size((*batch, key.shape[-3]))
    else:
        lead = of_keys = _lead(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    dims = len(lead) + 2
    if mask is not None:
        full = (*lead, query.shape[-2], key.shape[-2])
        if mask.dim() > dims or any(m not in (1, f) for m, f in zip(mask.shape[::-1], full[::-1])):
            raise RuntimeError(f"{op}: attn_mask of shape {tuple(mask.shape)} does not broadcast to {tuple(full)}")
        mask = _four_mask(mask, lead, dims)
    q, k, v = _four(query, lead, dims), _four(key, of_keys, dims), _four(value, of_keys, dims)
    if lengths is not None:
        lengths = _lengths(op, lengths, q.shape, dims)
    if dropout_p > 0:
        settings, seed = settings._replace(p=dropout_p), _seed(query) if seed is None else seed
    if rotary is not None:
        cos, sin = _angles(op, *rotary[:2], q, k)
        output = ops.attention_rotary.attention_rotary(
            op, q, k, v, mask, lengths, slopes, seed, settings, cos, sin, rotary[2]
        )
    else:
        # torch's tiles take four dimensions, and leading ones that are alike.
        as_tiles = dims == 4 and q is query and k is key and v is value
        output = ops.attention.attention(
            op, q, k, v, mask, lengths, slopes, weight, seed, settings, from_scores or not as_tiles
        )
    if dims == 4:
        return output
    return output.reshape(*lead, query.shape[-2], value.shape[-1])


def _lengths(op: str, lengths: torch.Tensor, shape: torch.Size, dims: int) -> torch.Tensor:
    """Lengths as [B, 1] or [B, L]."""
    batch, _, queries, _ = shape
    if lengths.dtype not in (torch.int64, torch.int32) or lengths.shape not in ((batch,), (batch, queries)):
        raise RuntimeError(f"{op}: lengths must be int64 [{batch}] or [{batch}, {queries}], got {tuple(lengths.shape)}")
    return (lengths[:, None] if lengths.dim() == 1 else lengths).to(torch.int64)


def _angles(
    op: str, cos: torch.Tensor, sin: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of rotary positions as [B or 1, 1, P, half], in query's dtype or that of its sums."""
    positions, half = max(query.shape[2], key.shape[2]), query.shape[3] // 2
    fits = cos.shape == sin.shape and cos.dim() in (2, 4) and cos.shape[-2] == positions and 0 < cos.shape[-1] <= half
    if not fits or (cos.dim() == 4 and (cos.shape[0] not in (1, query.shape[0]) or cos.shape[1] != 1)):
        raise RuntimeError(
            f"{op}: rotary wants cos and sin [{positions}, {half} or fewer], or such tables [{query.shape[0]}, 1, ...], got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not cos.is_floating_point() or cos.dtype != sin.dtype or not query.device == cos.device == sin.device:
        raise RuntimeError(f"{op}: rotary's cos and sin must be floating point, alike, and where query is")
    if cos.dtype != query.dtype:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        cos, sin = cos.to(wide), sin.to(wide)
    return (cos[None, None], sin[None, None]) if cos.dim() == 2 else (cos, sin)


def _check_dropout(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    lengths: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention, without a matrix of scores, forward and backward.

    Args:
        query: [*, H, L, D]; key: [*, Hk, S, D]; value: [*, Hk, S, Dv], or without heads, with leading dimensions that
            broadcast. Read where they lie, whatever their strides. Nested tensors [B, H, ragged, D] of the jagged layout,
            all three, with dropout, is_causal, window and softcap, without masks.
        attn_mask: bool (True: takes part) or floating point (added to the scores; may require grad), of any shape that
            broadcasts to [*, H, L, S]. Never expanded in memory.
        dropout_p: probability of dropping a probability, whatever the mode of a module. No mask is stored.
        is_causal: query i sees keys 0 to i (aligned top-left); together with attn_mask, both hold.
        scale: of the scores; 1 / sqrt(D) by default.
        enable_gqa: Hk may be a divisor of H; H / Hk consecutive heads of queries share one of keys.
        window: (left, right): query i sees keys i - left to i + right; -1 for no bound. Beltagy et al. 2020,
            "Longformer". torch has none of this and the following.
        alibi_slopes: [H]: adds -slope · |i - j|. Press et al. 2022, "Train short, test long".
        softcap: c > 0: scores become c · tanh(score / c), before masks. Gemma 2, 2024.
        lengths: int64 [B] or [B, L]: of each row of the batch (and query) only so many keys are seen.
        rotary: (cos, sin), each [P, R / 2] or [B, 1, P, R / 2] with P = max(L, S), as rotary_angles gives them: query i
            and key j are first turned by rows i and j, as by rotary(), which the kernels do as they load them.
        rotary_interleaved: pairs are neighbours, as in rotary().

    Returns:
        softmax(scale · query keyᵀ + mask) value, [*, H, L, Dv] in query's dtype and order of heads and queries; zeros
        where a query sees no key. Vaswani et al. 2017, "Attention is all you need", equation 1.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, dropout_p not in [0, 1].
    """
    torchs = window is None and alibi_slopes is None and not softcap and lengths is None and rotary is None
    plain = torchs and not dropout_p
    if plain and (attn_mask is None or attn_mask.dim() == 4):
        try:
            column = _plain.column("scaled_dot_product_attention", query)
            if column is not None and (enable_gqa or query.shape[1] == key.shape[1]):
                factor = query.shape[3] ** -0.5 if scale is None else scale
                settings = Settings(0.0, factor, 0.0, -1, 0 if is_causal else -1, DOT)
                return ops.attention.run(column, query, key, value, attn_mask, settings)
        except (*_plain.REFUSALS, ZeroDivisionError):
            pass  # the long way says what is wrong
    operands = (query, key, value, attn_mask)
    if _plain.overridden(*operands):
        return handle_torch_function(
            scaled_dot_product_attention, operands, *operands, dropout_p, is_causal, scale, enable_gqa, window=window,
            alibi_slopes=alibi_slopes, softcap=softcap, lengths=lengths, rotary=rotary,
            rotary_interleaved=rotary_interleaved,
        )  # fmt: skip
    try:
        if query.is_nested and attn_mask is None and alibi_slopes is None and lengths is None and rotary is None:
            _check_dropout(dropout_p)
            nested = jagged_attention(query, key, value, dropout_p, is_causal, scale, enable_gqa, window, softcap)
            if nested is not None:
                return nested
        query, key, value = lowered(query, key, value)  # type: ignore[assignment]
        if attn_mask is not None and attn_mask.is_floating_point():
            _, attn_mask = lowered(query, attn_mask)
        reason = _unusual(query, key, value, attn_mask, enable_gqa)
    except AttributeError:  # not tensors: torch says which
        reason = "not tensors"
    if reason is None:
        _check_dropout(dropout_p)
        depth = query.shape[-1]
        left, right = (-1, -1) if window is None else window
        settings = Settings(
            0.0, (1 / math.sqrt(depth) if depth else 0.0) if scale is None else scale, softcap, left,
            0 if is_causal else right,
        )  # fmt: skip
        return _attend(
            "scaled_dot_product_attention", query, key, value, attn_mask, dropout_p, enable_gqa, settings, lengths,
            alibi_slopes, rotary=None if rotary is None else (*rotary, rotary_interleaved),
        )
    if reason == _SIZES and key.shape[-2] != value.shape[-2]:  # which torch does not see
        raise RuntimeError(f"scaled_dot_product_attention: {key.shape[-2]} keys, {value.shape[-2]} values")
    if not torchs:
        raise RuntimeError(f"scaled_dot_product_attention: {reason}, which torch's arguments alone allow")
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if tracing.active:
        tracing.record("scaled_dot_product_attention", "torch", reason, query, key, value, attn_mask)
    return output


def _other(
    op: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    lengths: torch.Tensor | None, dropout_p: float, settings: Settings, weight: torch.Tensor | None = None,
) -> torch.Tensor:
    if mask is None and not dropout_p and (lengths is None or lengths.dim() == 1):
        try:
            column = _plain.column(op, query)
            alike = weight is None or weight.dtype == query.dtype
            if column is not None and alike and query.dim() == key.dim() == value.dim() == 3:
                of_rows = None if lengths is None else lengths.unsqueeze(1)
                operands = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
                return ops.attention.run(column, *operands, None, settings, of_rows, weight, from_scores=True).squeeze(1)
        except _plain.REFUSALS:
            pass  # the long way says what is wrong
    query, key, value = lowered(query, key, value)  # type: ignore[assignment]
    if mask is not None and mask.is_floating_point():
        _, mask = lowered(query, mask)
    if weight is not None:
        _, weight = lowered(query, weight)
        if weight.dtype != query.dtype or weight.device != query.device:  # type: ignore[union-attr]
            raise RuntimeError(f"{op}: weight and query differ in dtype or device")
    reason = _unusual(query, key, value, mask, False)
    if reason is not None:
        raise RuntimeError(f"{op}: {reason}")
    _check_dropout(dropout_p)
    lead = _lead(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    if len(lead) == 1:  # [B, L, D] is a batch of one head, so that lengths and masks [B, 1, S] mean what they say
        mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
        query, key, value = query.unsqueeze(-3), key.unsqueeze(-3), value.unsqueeze(-3)
        return _attend(
            op, query, key, value, mask, dropout_p, False, settings, lengths, weight=weight, from_scores=True
        ).squeeze(1)
    return _attend(op, query, key, value, mask, dropout_p, False, settings, lengths, weight=weight, from_scores=True)


def dot_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None, dropout_p: float = 0.0, *, scale: float = 1.0,
) -> torch.Tensor:
    """Attention with unscaled dot products: softmax(query keyᵀ) value. Luong et al. 2015, equation 8 ("dot").

    Args:
        query: [B, L, D] (or [B, H, L, D]); key: [B, S, D]; value: [B, S, Dv].
        attn_mask: bool (True: takes part) or floating point (added), broadcasting to [B, L, S]; or None.
        lengths: int64 [B] or [B, L], how many keys take part; or None.
        dropout_p: probability of dropping a probability.
        scale: factor of the dot products.

    Returns:
        [B, L, Dv]; zeros where a query sees no key.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit together.
    """
    return _other("dot_attention", query, key, value, attn_mask, lengths, dropout_p, Settings(scale=scale))


def gaussian_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None, dropout_p: float = 0.0, *, width: float = 1.0,
) -> torch.Tensor:
    """Nadaraya-Watson kernel regression: softmax(-|query - key|² / (2 width²)) value. Nadaraya 1964, Watson 1964.

    Arguments as in dot_attention; width: the kernel's standard deviation.
    """
    if not width > 0:
        raise ValueError(f"gaussian_attention: width must be positive, got {width}")
    settings = Settings(scale=1 / (width * width), score=GAUSSIAN)
    return _other("gaussian_attention", query, key, value, attn_mask, lengths, dropout_p, settings)


def additive_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, attn_mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None, dropout_p: float = 0.0,
) -> torch.Tensor:
    """Additive attention of projected queries and keys: softmax(tanh(query_i + key_j) · weight) value, without a tensor
    of the size [B, L, S, D]. Bahdanau et al. 2015, appendix A.1.2.

    Arguments as in dot_attention; weight: [D].
    """
    if weight.dim() != 1 or weight.shape[0] != query.shape[-1]:
        raise RuntimeError(f"additive_attention: weight must be [{query.shape[-1]}], got {tuple(weight.shape)}")
    return _other(
        "additive_attention", query, key, value, attn_mask, lengths, dropout_p, Settings(score=ADDITIVE), weight
    )


def cosine_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None, dropout_p: float = 0.0, *, scale: float = 1.0,
) -> torch.Tensor:
    """Attention by cosine similarity: softmax(scale · query·key / (|query| |key|)) value. Graves et al. 2014, "Neural
    Turing machines", equations 5 and 6, where scale is the key strength β.

    Arguments as in dot_attention; lengths of vectors count as 1e-8 at least.
    """
    return _other(
        "cosine_attention", query, key, value, attn_mask, lengths, dropout_p, Settings(scale=scale, score=COSINE)
    )
