"""Memory layouts of image batches, told by strides alone."""

from __future__ import annotations

import torch

__all__ = ["is_channels_last", "to_layout"]


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a 4-D tensor lies densely as N, H, W, C and not as N, C, H, W. Works under vmap as well."""
    if x.dim() != 4 or x.is_contiguous():
        return False
    _, c, h, w = x.shape
    return x.stride() == (h * w * c, 1, w * c, c)


def to_layout(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """x itself where it lies in memory as asked, else a copy that does."""
    if not channels_last:
        return x.contiguous()
    return x if is_channels_last(x) else x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
