"""Memory formats, on real and on fake tensors alike."""

from __future__ import annotations

import torch

__all__ = ["memory_format", "suggests_channels_last"]


def suggests_channels_last(x: torch.Tensor) -> bool:
    """Whether torch would give an op's result channels_last for this input (its suggest_memory_format).

    The same function as csrc/ops/common.h's, so that fake kernels and kernels agree: where sizes are 1 the
    strides decide.
    """
    if x.dim() != 4:
        return False
    size, stride = x.shape, x.stride()
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * size[d] if size[d] > 1 else stride[d]
    return True


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
