"""Attention in plain torch expressions, with the matrix of scores in memory."""

from __future__ import annotations

from typing import Any

import torch

from dlkern.reference.dropout import philox_words_of
from dlkern.reference.positions import rotary

__all__ = ["ADDITIVE", "COSINE", "DOT", "GAUSSIAN", "attention", "attention_rotary", "attention_varlen", "kept"]

DOT, GAUSSIAN, ADDITIVE, COSINE = 0, 1, 2, 3
_SHORTEST = 1e-8


def kept(shape: tuple[int, ...], p: float, seed: torch.Tensor) -> torch.Tensor:
    """Which probabilities [B, H, L, S] dropout keeps: key j of row r, in the order of (batch, head, query), has word
    j % 64 // 16 of the block of counter (r · ceil(S / 64) + j // 64) · 16 + j % 16."""
    *rows, keys = shape
    count = 1
    for size in rows:
        count = count * size
    r = torch.arange(count, device=seed.device)[:, None]
    j = torch.arange(keys, device=seed.device)
    words = philox_words_of((r * ((keys + 63) // 64) + j // 64) * 16 + j % 16, (j % 64 // 16).expand(count, keys), seed)
    return (words >= int(p * 2**32)).reshape(shape)


def _scores(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor | None, score: int) -> torch.Tensor:
    if score == DOT:
        return query @ key.transpose(-2, -1)
    if score == COSINE:
        unit = (x / x.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST) for x in (query, key))
        return next(unit) @ next(unit).transpose(-2, -1)
    if score == GAUSSIAN:
        return (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1) * -0.5
    assert weight is not None
    return torch.tanh(query[..., :, None, :] + key[..., None, :, :]) @ weight


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    lengths: torch.Tensor | None, slopes: torch.Tensor | None, weight: torch.Tensor | None, seed: torch.Tensor | None,
    p: float, scale: float, softcap: float, left: int, right: int, score: int,
) -> torch.Tensor:
    """softmax(cap(scale · score(query, key)) - slopes · |i - j| + mask) value, of [B, H, L, D], [B, Hk, S, D] and
    [B, Hk, S, Dv]; 0 where a query sees no key."""
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = _scores(query, key, weight, score) * scale  # [B, H, L, S]
    queries, keys = scores.shape[-2:]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    i = torch.arange(queries, device=query.device)[:, None]
    j = torch.arange(keys, device=query.device)
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[:, None, None] * (i - j).abs()
    hidden: Any = torch.zeros((), dtype=torch.bool, device=query.device)
    if left >= 0:
        hidden = hidden | (j < i - left)
    if right >= 0:
        hidden = hidden | (j > i + right)
    if lengths is not None:
        hidden = hidden | (j >= lengths[:, None, :, None])
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    scores = scores.masked_fill(hidden, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    if p > 0:
        assert seed is not None
        factor = 1.0 / (1.0 - p) if p < 1 else 0.0
        keep = kept(tuple(probabilities.shape), p, seed)
        probabilities = torch.where(keep, probabilities * factor, torch.zeros_like(probabilities))
    return probabilities @ value


def attention_rotary(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    lengths: torch.Tensor | None, slopes: torch.Tensor | None, seed: torch.Tensor | None, cos: torch.Tensor,
    sin: torch.Tensor, p: float, scale: float, softcap: float, left: int, right: int, interleaved: bool,
) -> torch.Tensor:
    """attention() of query and key turned by their positions."""
    query, key = (rotary(x, cos[:, :, : x.shape[2]], sin[:, :, : x.shape[2]], interleaved) for x in (query, key))
    return attention(query, key, value, mask, lengths, slopes, None, seed, p, scale, softcap, left, right, DOT)


def attention_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts_of_queries: torch.Tensor,
    starts_of_keys: torch.Tensor, seed: torch.Tensor | None, p: float, scale: float, softcap: float, left: int, right: int,
) -> torch.Tensor:
    """attention() within each sequence of [tokens, H, D], b with seed + b; a window is aligned at the last query and the last
    key."""
    outputs = [query.new_zeros((0, query.shape[1], value.shape[2]))]
    starts, key_starts = starts_of_queries.tolist(), starts_of_keys.tolist()
    for b in range(len(starts) - 1):
        q = query[starts[b] : starts[b + 1]]
        k, v = (x[key_starts[b] : key_starts[b + 1]] for x in (key, value))
        i, j = (torch.arange(x.shape[0], device=query.device) for x in (q, k))
        distance = j - i[:, None] - (k.shape[0] - q.shape[0])
        seen = torch.ones((), dtype=torch.bool, device=query.device).expand(distance.shape)
        seen = seen & (distance >= -left) if left >= 0 else seen
        seen = seen & (distance <= right) if right >= 0 else seen
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        of_row = None if seed is None else seed + b
        y = attention(q, k, v, seen[None, None], None, None, None, of_row, p, scale, softcap, -1, -1, DOT)
        outputs.append(y[0].transpose(0, 1))
    return torch.cat(outputs)
