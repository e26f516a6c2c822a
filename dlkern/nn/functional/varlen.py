"""Attention of sequences of different lengths without padding: torch.nn.attention.varlen.varlen_attn, nested tensors."""

from __future__ import annotations

from typing import Any

import torch

from dlkern import ops
from dlkern.nn.functional._autocast import lowered
from dlkern.nn.functional.dropout import _seed

__all__ = ["jagged_attention", "varlen_attn"]


def _starts(name: str, starts: Any, tokens: int) -> torch.Tensor:
    if not isinstance(starts, torch.Tensor) or starts.dim() != 1 or starts.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"varlen_attn: {name} must be an int32 or int64 tensor [sequences + 1]")
    return starts.to("cpu", torch.int64).contiguous()


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor | None = None,
    max_q: int | None = None, max_k: int | None = None, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention within each of several sequences that lie one after another, as
    torch.nn.attention.varlen.varlen_attn has it, which wants a GPU.

    Args:
        query: [Tq, H, D]; key: [Tk, Hk, D]; value: [Tk, Hk, Dv], the tokens of all sequences; any strides.
        cu_seq_q: int32 or int64 [sequences + 1], where each sequence's queries begin, and Tq; cu_seq_k: the same of keys,
            cu_seq_q where None. Sequences may be empty. On a GPU they are copied to the host, which waits for it.
        max_q, max_k: the longest sequences; not needed.
        scale: of the scores; 1 / sqrt(D) by default.
        window_size: (left, right): query i of L sees keys i + S - L - left to i + S - L + right, of S; -1 for no bound, so
            that (-1, 0) is causal attention, aligned at the last query and the last key.
        enable_gqa: Hk may be a divisor of H; H / Hk consecutive heads of queries share one of keys.

    Returns:
        softmax(scale · query keyᵀ) value of each sequence, [Tq, H, Dv]; zeros where a query sees no key.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit, or the starts do not rise from 0 to the number of tokens.
    """
    starts = _starts("cu_seq_q", cu_seq_q, query.shape[0])
    of_keys = starts if cu_seq_k is None else _starts("cu_seq_k", cu_seq_k, key.shape[0])
    return _attend(query, key, value, starts, of_keys, scale, window_size, enable_gqa)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, of_keys: torch.Tensor,
    scale: float | None, window: tuple[int, int], enable_gqa: bool, dropout_p: float = 0.0, softcap: float = 0.0,
) -> torch.Tensor:
    query, key, value = lowered(query, key, value)  # type: ignore[assignment]
    if not query.dim() == key.dim() == value.dim() == 3:
        raise RuntimeError("varlen_attn: operands must be [tokens, heads, depth]")
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise RuntimeError("varlen_attn: operands differ in dtype, or are not floating point")
    if not query.device == key.device == value.device:
        raise RuntimeError("varlen_attn: operands are on different devices")
    if key.shape[:2] != value.shape[:2] or query.shape[2] != key.shape[2]:
        raise RuntimeError(
            f"varlen_attn: sizes do not fit: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    heads, groups = query.shape[1], key.shape[1]
    if heads != groups and (not enable_gqa or groups == 0 or heads % groups):
        raise RuntimeError(f"varlen_attn: {heads} heads of queries, {groups} of keys, enable_gqa={enable_gqa}")
    left, right = window
    depth = query.shape[2]
    factor = (depth**-0.5 if depth else 0.0) if scale is None else scale
    seed = _seed(query) if dropout_p > 0 else None
    return ops.attention_varlen.attention_varlen(
        query, key, value, starts, of_keys, seed, dropout_p, factor, softcap, left, right
    )


def jagged_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool, window: tuple[int, int] | None, softcap: float,
) -> torch.Tensor | None:
    """scaled_dot_product_attention of nested tensors [B, H, ragged, D] of the jagged layout, or None for other forms."""
    tensors = query, key, value
    if any(not x.is_nested or x.layout != torch.jagged or x.dim() != 4 for x in tensors):
        return None
    rows = [x.transpose(1, 2) for x in tensors]
    if any(x._ragged_idx != 1 or x.lengths() is not None for x in rows):  # type: ignore[attr-defined]
        return None
    starts, of_keys, of_values = (x.offsets() for x in rows)  # type: ignore[attr-defined]
    alike = starts is of_keys or torch.equal(starts, of_keys)
    placed = is_causal or window is not None  # from the first query and key, which here is from the last
    if (placed and not alike) or not (of_keys is of_values or torch.equal(of_keys, of_values)):
        return None
    left, right = (-1, -1) if window is None else window
    q, k, v = (x.values() for x in rows)
    output = _attend(
        q, k, v, starts.to("cpu", torch.int64), of_keys.to("cpu", torch.int64), scale, (left, 0 if is_causal else right),
        enable_gqa, dropout_p, softcap,
    )  # fmt: skip
    return torch.nested.nested_tensor_from_jagged(output, starts).transpose(1, 2)
