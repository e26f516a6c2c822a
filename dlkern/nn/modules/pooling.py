"""Pooling modules."""

from __future__ import annotations

from typing import Any

import torch

from dlkern.nn import functional as F

__all__ = [
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AvgPool1d", "AvgPool2d",
    "LPPool1d", "LPPool2d", "MaxPool1d", "MaxPool2d",
]  # fmt: skip


class MaxPool1d(torch.nn.MaxPool1d):
    """torch.nn.MaxPool1d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> Any:
        return F.max_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool2d(torch.nn.MaxPool2d):
    """torch.nn.MaxPool2d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> Any:
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool1d(torch.nn.AvgPool1d):
    """torch.nn.AvgPool1d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """torch.nn.AvgPool2d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """torch.nn.AdaptiveAvgPool1d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool1d(input, self.output_size)  # type: ignore[arg-type]  # the stub has None here too


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """torch.nn.AdaptiveAvgPool2d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)  # type: ignore[arg-type]  # the stub has None for a pair


class AdaptiveMaxPool1d(torch.nn.AdaptiveMaxPool1d):
    """torch.nn.AdaptiveMaxPool1d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> Any:
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)  # type: ignore[arg-type]


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """torch.nn.AdaptiveMaxPool2d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> Any:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)  # type: ignore[arg-type]


class LPPool1d(torch.nn.LPPool1d):
    """torch.nn.LPPool1d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.lp_pool1d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)  # type: ignore[arg-type]


class LPPool2d(torch.nn.LPPool2d):
    """torch.nn.LPPool2d on dlkern's kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.lp_pool2d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)
