"""Pooling modules."""

from __future__ import annotations

from typing import Any

import torch

from dlkern.nn import functional as F

__all__ = ["AdaptiveAvgPool2d", "AvgPool2d", "MaxPool2d"]


class MaxPool2d(torch.nn.MaxPool2d):
    """torch.nn.MaxPool2d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> Any:
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """torch.nn.AvgPool2d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)  # type: ignore[arg-type]  # the stub has None for a pair
