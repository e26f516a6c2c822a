"""Positions of tokens: added to embeddings, added to scores, or turning queries and keys."""

from __future__ import annotations

import torch

from dlkern.nn import functional as F

__all__ = ["LearnedPositions", "RelativePositionBias", "RotaryPositions", "SinusoidalPositions"]


def _rows(table: torch.Tensor, x: torch.Tensor, offset: int) -> torch.Tensor:
    """The table's rows for x [*, L, dim] at positions offset to offset + L - 1."""
    length = x.shape[-2]
    if x.shape[-1] != table.shape[1]:
        raise RuntimeError(f"positions of width {table.shape[1]} do not fit x {tuple(x.shape)}")
    if offset < 0 or offset + length > table.shape[0]:
        raise IndexError(f"positions {offset} to {offset + length - 1} are outside 0 to {table.shape[0] - 1}")
    return table[offset : offset + length]


class SinusoidalPositions(torch.nn.Module):
    """Adds a fixed sinusoid of each position. Vaswani et al. 2017, section 3.5.

    Args:
        dim: width of the embeddings.
        max_len: how many positions the table has; it is no part of the state_dict.
        base: of the wavelengths, which go from 2π to 2π · base.

    forward(x [*, L, dim], offset=0) gives x + table[offset : offset + L], in x's shape. IndexError where that is longer than
    max_len, RuntimeError where the width differs.
    """

    table: torch.Tensor

    def __init__(self, dim: int, max_len: int = 5000, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.max_len, self.base = dim, max_len, base
        self.register_buffer("table", F.sinusoidal_positions(max_len, dim, base), persistent=False)

    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        return x + _rows(self.table, x, offset).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, max_len={self.max_len}, base={self.base}"


class LearnedPositions(torch.nn.Module):
    """Adds a learned vector of each position. Gehring et al. 2017, section 3.1; Devlin et al. 2019.

    Args:
        max_len: how many positions there are.
        dim: width of the embeddings.

    Arguments, result and errors of forward as in SinusoidalPositions; the parameter `weight` is [max_len, dim].
    """

    def __init__(self, max_len: int, dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(max_len, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.02)  # BERT's and GPT-2's

    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        return x + _rows(self.weight, x, offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class RelativePositionBias(torch.nn.Module):
    """T5's learned bias of each head and bucket of distances. Raffel et al. 2020, section 2.1.

    Args:
        heads: number of heads.
        buckets, max_distance, bidirectional: as in functional.relative_position_buckets.

    forward(queries, keys, offset=0) gives [heads, queries, keys], an attn_mask of scaled_dot_product_attention; its gradient
    reaches the parameter `weight` [buckets, heads], T5's relative_attention_bias.weight.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = torch.nn.Parameter(torch.empty(buckets, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self, queries: int, keys: int, offset: int = 0) -> torch.Tensor:
        buckets = F.relative_position_buckets(
            queries, keys, self.weight.shape[0], self.max_distance, self.bidirectional, offset, device=self.weight.device
        )
        return self.weight[buckets].permute(2, 0, 1).contiguous()

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        return f"{heads}, buckets={buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"


class RotaryPositions(torch.nn.Module):
    """Turns queries and keys by their positions, so that scores depend on distances. Su et al. 2021, "RoFormer".

    Args:
        dim: how many elements of each head turn, an even number; the head's width, or less (partial rotary).
        base: of the wavelengths.
        interleaved: which elements are pairs, as in functional.rotary.

    forward(query [B, H, L, D], key [B, Hk, L, D], positions=None) gives both turned; positions: [L], or [B, 1, L] where they
    differ by row of the batch; 0 to L - 1 by default. No parameters.
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryPositions: dim must be even and positive, got {dim}")
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if positions is None:
            positions = torch.arange(query.shape[-2], device=query.device)
        cos, sin = F.rotary_angles(positions, self.dim, self.base)
        turned = (F.rotary(x, cos, sin, interleaved=self.interleaved) for x in (query, key))
        return next(turned), next(turned)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
