"""layer_norm with torch.nn.functional's signature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.overrides import handle_torch_function

from dlkern import ops
from dlkern import trace as tracing
from dlkern.nn.functional._autocast import autocasts
from dlkern.ops import _plain

__all__ = ["layer_norm"]


def _unusual(
    input: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None
) -> str | None:
    """What of a call is outside our kernels (torch takes it, or raises its own error), or None."""
    layout = _plain.laid_out(input, weight, bias)
    if layout is not None:
        return layout
    if not isinstance(shape, tuple | list) or len(shape) < 1:
        return "normalized_shape is not a tuple of at least one"
    if not input.is_floating_point():
        return "not floating point"
    if input.dim() < len(shape) or tuple(input.shape[input.dim() - len(shape) :]) != tuple(shape):
        return "normalized_shape is not the end of input's"
    dtypes = set()
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        if tuple(x.shape) != tuple(shape) or x.device != input.device:
            return f"{name} is not of normalized_shape, or elsewhere"
        dtypes.add(x.dtype)
    if len(dtypes) > 1 or not dtypes <= {input.dtype, torch.float32}:
        return "weight and bias are in other dtypes"
    if torch.float32 in dtypes and input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "weight and bias are in other dtypes"
    return None


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """torch.nn.functional.layer_norm.

    Args:
        input: [*, *normalized_shape], floating point.
        normalized_shape: the last dimensions of input.
        weight, bias: [*normalized_shape] in input's dtype (or float32 beside a 16-bit input), or None.
        eps: added to the variance.

    Returns:
        (x - mean) / sqrt(var + eps) · weight + bias in input's shape and dtype, contiguous; mean and (biased) variance
        are those of each normalized block. Ba, Kiros and Hinton 2016, "Layer normalization", section 3.

    Raises:
        RuntimeError, TypeError: shapes or dtypes do not fit; torch's own messages.
    """
    try:
        column = _plain.column("layer_norm", input)
        if column is not None and normalized_shape and input.shape[-len(normalized_shape) :] == normalized_shape:
            return ops.layer_norm.run(column, input, len(normalized_shape), weight, bias, eps)
    except _plain.REFUSALS:
        pass  # the long way says what is wrong
    if _plain.overridden(input, weight, bias):
        return handle_torch_function(layer_norm, (input, weight, bias), input, normalized_shape, weight, bias, eps)
    try:
        if input.is_cuda and autocasts(input):  # float32 there, as given on a CPU
            input, weight, bias = (x if x is None else x.float() for x in (input, weight, bias))  # type: ignore[assignment]
        reason = _unusual(input, normalized_shape, weight, bias)
    except AttributeError:  # not tensors: torch says which
        reason = "not tensors"
    if reason is None:
        return ops.layer_norm.layer_norm(input, len(normalized_shape), weight, bias, eps)
    output = torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)  # type: ignore[arg-type]
    if tracing.active:
        tracing.record("layer_norm", "torch", reason, input, weight, bias)
    return output
