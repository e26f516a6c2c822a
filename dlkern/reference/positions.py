"""Rotary positions in plain torch expressions."""

from __future__ import annotations

import torch

__all__ = ["rotary"]


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool = False) -> torch.Tensor:
    """Pairs (a, b) of x's elements as (a cos - b sin, b cos + a sin), and the other way round where inverse."""
    half = cos.shape[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide), -sin.to(wide) if inverse else sin.to(wide)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([y.to(x.dtype), rest], -1)
