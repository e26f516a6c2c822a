"""Memory formats, on real and on fake tensors alike."""

from __future__ import annotations

import torch

__all__ = ["memory_format", "suggests_channels_last"]


def suggests_channels_last(x: torch.Tensor) -> bool:
    """Whether torch would give an op's result channels_last for this input (its suggest_memory_format).

    The same function as csrc/ops/common.h's, so that fake kernels and kernels agree: sizes of 1 are resolved by
    their strides. For 5-D tensors the answer is about channels_last_3d.
    """
    stride = x.stride()
    dim = len(stride)
    if dim not in (4, 5) or stride[1] == 0 or stride[1] > stride[-1]:
        return False
    size = x.shape
    least = 0
    for d in (1, 3, 2, 0) if dim == 4 else (1, 4, 3, 2, 0):
        if size[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * size[d] if size[d] > 1 else stride[d]
    return True


def memory_format(channels_last: bool, dim: int = 4) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if dim == 4 else torch.channels_last_3d
