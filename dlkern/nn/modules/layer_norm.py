"""The layer_norm module."""

from __future__ import annotations

import torch

from dlkern.nn import functional as F

__all__ = ["LayerNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on dlkern's kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
