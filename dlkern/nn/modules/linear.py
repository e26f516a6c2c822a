"""Linear modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dlkern.nn import functional as F

__all__ = ["LazyLinear", "Linear", "TensorReduction"]


class Linear(torch.nn.Linear):
    """torch.nn.Linear on dlkern's kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight, self.bias)


class LazyLinear(torch.nn.LazyLinear):
    """torch.nn.LazyLinear; becomes a dlkern.nn.Linear on its first call."""

    cls_to_become = Linear  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight, self.bias)


class TensorReduction(torch.nn.Module):
    """Reduces several dimensions at once to one of features: y[b, k] = bias[k] + sum over i, j of weight[k, i, j] x[b, i, j].

    On the linear kernel; torch has no such module (torch.tensordot, or an einsum). Initialised as torch.nn.Linear.

    Args:
        sizes: sizes of the reduced dimensions.
        out_features: how many features they become.
        dims: the reduced dimensions of the input, in the order of `sizes`; None: the last len(sizes).
        bias: whether there is a bias.
        device, dtype: of the parameters.

    Shape: [*kept, *sizes] (reduced dimensions may lie anywhere, as `dims` says) to [*kept, out_features].

    Raises:
        ValueError: `dims` and `sizes` are of different lengths, or `sizes` is empty.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self, sizes: Sequence[int], out_features: int, dims: Sequence[int] | None = None, bias: bool = True,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sizes, self.out_features = tuple(sizes), out_features
        self.dims = None if dims is None else tuple(dims)
        if not self.sizes or (self.dims is not None and len(self.dims) != len(self.sizes)):
            raise ValueError(f"TensorReduction: expected a dimension for each size, got sizes={sizes} and dims={dims}")
        self.weight = torch.nn.Parameter(torch.empty(out_features, *self.sizes, device=device, dtype=dtype))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else torch.nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-b, b) with b = 1 / sqrt(product of sizes)."""
        bound = 1 / math.sqrt(max(math.prod(self.sizes), 1))
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.tensor_reduction(input, self.weight, self.bias, self.dims)

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, out_features={self.out_features}, dims={self.dims}, bias={self.bias is not None}"
