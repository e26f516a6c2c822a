"""embedding with torch.nn.functional's signature."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function

from dlkern import ops
from dlkern import trace as tracing
from dlkern.ops import _plain

__all__ = ["embedding"]


def _unusual(
    input: torch.Tensor, weight: torch.Tensor, padding_idx: int | None, max_norm: float | None, sparse: bool
) -> str | None:
    """What of a call is outside our kernels (torch takes it, or raises its own error), or None."""
    if input.dtype not in (torch.int64, torch.int32) or weight.dim() != 2 or not weight.is_floating_point():
        return "input is not int64 or int32, or weight is not a floating-point [V, D]"
    if input.device != weight.device:
        return "input and weight are on different devices"
    if input.layout != torch.strided or weight.layout != torch.strided:
        return "input or weight is sparse"
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        return "padding_idx is outside weight"
    if max_norm is not None:
        return "max_norm changes the weight in place, which no kernel does"
    if sparse:
        return "no kernel for a sparse gradient"
    return None


def embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.embedding, with a gradient whose bits are the same every time.

    Args:
        input: int64 or int32 indices of any shape [*].
        weight: the table [V, D], floating point.
        padding_idx: a row whose gradient is zero; negative ones count from the end.
        max_norm, norm_type: shrink the rows that are looked up, in place, to at most this norm first; torch does that.
        scale_grad_by_freq: divide each row's gradient by how often its index occurs in input.
        sparse: give the gradient as a sparse tensor; torch does that.

    Returns:
        [*, D] in weight's dtype: output[i] = weight[input[i]]. The gradient of weight[v] is the sum of output's gradients
        where input is v, in a fixed order and in double (float32 on a GPU).

    Raises:
        IndexError: an index is outside [0, V); on a GPU, where looking at the indices would wait for it, such a row is
            NaN and takes no gradient (torch fails an assertion on the device).
        AssertionError, RuntimeError, TypeError: other arguments do not fit; torch's own messages.
    """
    try:
        column = _plain.column("embedding", weight)
        if column is not None and _unusual(input, weight, padding_idx, max_norm, sparse) is None:
            padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
            return ops.embedding.run(column, weight, input, padding, scale_grad_by_freq)
    except (*_plain.REFUSALS, ZeroDivisionError):
        pass  # the long way says what is wrong
    if _plain.overridden(input, weight):
        return handle_torch_function(
            embedding, (input, weight), input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    try:
        reason = _unusual(input, weight, padding_idx, max_norm, sparse)
    except AttributeError:  # not tensors: torch says which
        reason = "not tensors"
    if reason is None:
        padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
        return ops.embedding.embedding(weight, input, padding, scale_grad_by_freq)
    output = torch.nn.functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if tracing.active:
        tracing.record("embedding", "torch", reason, weight, input)
    return output
