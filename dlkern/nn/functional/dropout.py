"""dropout with torch.nn.functional's signature."""

from __future__ import annotations

import torch

from dlkern import ops
from dlkern.ops import _plain

__all__ = ["dropout"]


def _seed(input: torch.Tensor) -> torch.Tensor:
    # A tensor on the device: obeys torch.manual_seed, and a CUDA graph draws a new one at each replay.
    return torch.randint(0, 2**62, (), device=input.device)


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """torch.nn.functional.dropout, without a stored mask.

    Args:
        input: floating-point tensor of any shape.
        p: probability of an element to be zeroed.
        training: apply dropout; otherwise the input comes back as it is.
        inplace: write the result into `input`.

    Returns:
        A tensor of input's shape, dtype and memory format: each element zero with probability p, else
        input / (1 - p). Srivastava et al. 2014, "Dropout". The mask follows torch.manual_seed; its elements are
        not the ones torch itself would drop.

    Raises:
        ValueError: p is not in [0, 1].
    """
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0.0:
        return input
    seed = _seed(input)
    column = _plain.column("dropout", input)
    if column is not None:
        output = ops.dropout.run(column, input, p, seed)
    else:
        output = ops.dropout.dropout(input, p, seed)
    return input.copy_(output) if inplace else output
