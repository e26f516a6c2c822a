"""Convolution modules."""

from __future__ import annotations

import torch

from dlkern.nn import functional as F

__all__ = ["Conv2d", "LazyConv2d"]


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d on dlkern's kernels."""

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            mode = self.padding_mode
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class LazyConv2d(torch.nn.LazyConv2d):
    """torch.nn.LazyConv2d; becomes this package's Conv2d on the first call."""

    cls_to_become = Conv2d  # type: ignore[assignment]
