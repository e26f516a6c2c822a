"""Positions: rotary, which has a kernel, and tables, angles, buckets and slopes, which are plain torch expressions: made once
for all heads and rows, they are cheap beside what they feed. Attention takes them (attn_mask, alibi_slopes) unexpanded."""

from __future__ import annotations

import math

import torch

from dlkern import ops

__all__ = ["alibi_slopes", "relative_position_buckets", "rotary", "rotary_angles", "sinusoidal_positions"]


def _frequencies(dim: int, base: float, device: torch.device | None) -> torch.Tensor:
    """base^(-2i / dim) for i = 0 … ceil(dim / 2) - 1, float64."""
    return base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / -dim)


def sinusoidal_positions(length: int, dim: int, base: float = 10000.0, *, device: torch.device | None = None) -> torch.Tensor:
    """The table of sinusoidal positions, float32 [length, dim].

    Element (p, 2i) is sin(p / base^(2i / dim)), element (p, 2i + 1) the cosine of it. Vaswani et al. 2017, section 3.5.

    Raises:
        ValueError: length or dim below 1, base not positive.
    """
    if length < 1 or dim < 1 or not base > 0:
        raise ValueError(f"sinusoidal_positions: length {length}, dim {dim} and base {base} must be positive")
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * _frequencies(dim, base, device)
    table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # [length, dim or dim + 1]
    return table[:, :dim].float()


def rotary_angles(
    positions: torch.Tensor, dim: int, base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for rotary(), each float32 [*, dim / 2], of positions [*].

    Pair i of a vector at position p turns by p · base^(-2i / dim). Su et al. 2021, "RoFormer", equation 15.

    Raises:
        ValueError: dim is odd or below 2, or base is not positive.
    """
    if dim < 2 or dim % 2 or not base > 0:
        raise ValueError(f"rotary_angles: dim {dim} must be even and positive, base {base} positive")
    angles = positions[..., None].double() * _frequencies(dim, base, positions.device)
    return angles.cos().float(), angles.sin().float()


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Turns pairs of x's elements: rotary positions of queries or keys. Su et al. 2021, "RoFormer", equation 34.

    Args:
        x: [*, L, D].
        cos, sin: [L, R / 2], or with leading dimensions that broadcast to x's; R ≤ D. The elements from R on stay.
        interleaved: pairs are neighbours (2i, 2i + 1) as in the paper and GPT-J; False: (i, i + R / 2) as in Llama.

    Returns:
        (a cos - b sin, b cos + a sin) in place of each pair (a, b), in x's shape and dtype.

    Raises:
        RuntimeError: sizes do not fit, or x is not floating point.
    """
    half = cos.shape[-1]
    lead = x.shape[:-2]
    fits = cos.shape == sin.shape and cos.dim() >= 2 and x.dim() >= 2 and cos.shape[-2] == x.shape[-2]
    fits = fits and 0 < 2 * half <= x.shape[-1] and cos.dim() <= x.dim()
    if not fits or any(c not in (1, n) for c, n in zip(cos.shape[-3::-1], lead[::-1])):
        raise RuntimeError(f"rotary: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit x {tuple(x.shape)}")
    if not x.is_floating_point() or not cos.is_floating_point() or cos.dtype != sin.dtype:
        raise RuntimeError(f"rotary: {x.dtype}, {cos.dtype}, {sin.dtype} must be floating point, the last two alike")
    if not x.device == cos.device == sin.device:
        raise RuntimeError(f"rotary: x is on {x.device}, cos on {cos.device}, sin on {sin.device}")
    if cos.dtype != x.dtype:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = cos.to(wide), sin.to(wide)
    if x.dim() > 4 and cos.dim() > 3:
        cos, sin = (t.expand(*lead, *t.shape[-2:]) for t in (cos, sin))
    y = ops.positions.rotary(_four(x), _four(cos), _four(sin), interleaved)
    return y if x.dim() == 4 else y.reshape(x.shape)


def _four(x: torch.Tensor) -> torch.Tensor:
    """x [*, M, N] as 4-D."""
    if x.dim() == 4:
        return x
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.flatten(0, -4)


def relative_position_buckets(
    queries: int, keys: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True, offset: int = 0,
    *, device: torch.device | None = None,
) -> torch.Tensor:
    """T5's bucket of each pair of positions, int64 [queries, keys] in 0 … buckets - 1.

    Distances have a bucket each up to half of the buckets, then wider and wider ones up to max_distance, where the last
    begins. Keys after the query have buckets of their own where bidirectional, else share that of distance 0.
    Raffel et al. 2020, "Exploring the limits of transfer learning", section 2.1.

    Args:
        offset: position of the first query; that of the first key is 0.

    Raises:
        ValueError: buckets or max_distance too small to have these kinds of buckets.
    """
    side = buckets // 2 if bidirectional else buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(f"relative_position_buckets: {buckets} buckets up to distance {max_distance} are too few")
    i = torch.arange(offset, offset + queries, device=device)[:, None]
    ahead = torch.arange(keys, device=device) - i
    distance = ahead.abs() if bidirectional else (-ahead).clamp_min(0)
    # In float32 and this order, as the trained models have it: rounding decides the bucket at its border.
    share = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    wide = (exact + (share * (side - exact)).long()).clamp_max(side - 1)
    found = torch.where(distance < exact, distance, wide)
    return found + side * (ahead > 0) if bidirectional else found


def alibi_slopes(heads: int, *, device: torch.device | None = None) -> torch.Tensor:
    """ALiBi's slopes, float32 [heads], for scaled_dot_product_attention's alibi_slopes.

    2^(-8 h / heads) for h = 1 … heads where heads is a power of two; else those of the power below, and every second
    of the one above. Press et al. 2022, "Train short, test long", section 3.

    Raises:
        ValueError: heads below 1.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads must be positive, got {heads}")
    below = 1 << (heads.bit_length() - 1)
    exponents = [8 * h / below for h in range(1, below + 1)]
    exponents += [8 * h / (2 * below) for h in range(1, 2 * (heads - below), 2)]
    return 2.0 ** -torch.tensor(exponents, dtype=torch.float32, device=device)
