"""Dropout modules."""

from __future__ import annotations

import torch

from dlkern.nn import functional as F

__all__ = ["Dropout"]


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout on dlkern's kernel: no mask is stored for the backward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)
