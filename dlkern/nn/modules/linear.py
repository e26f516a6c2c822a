"""Linear modules."""

from __future__ import annotations

import torch

from dlkern.nn import functional as F

__all__ = ["LazyLinear", "Linear"]


class Linear(torch.nn.Linear):
    """torch.nn.Linear on dlkern's kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight, self.bias)


class LazyLinear(torch.nn.LazyLinear):
    """torch.nn.LazyLinear; becomes a dlkern.nn.Linear on its first call."""

    cls_to_become = Linear  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight, self.bias)
