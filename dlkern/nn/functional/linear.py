"""linear with torch.nn.functional's signature, and an activation that costs nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.overrides import handle_torch_function

from dlkern import ops
from dlkern import trace as tracing
from dlkern.nn.functional._autocast import lowered
from dlkern.ops import _plain
from dlkern.ops._activation import Activation
from dlkern.reference.linear import activate

__all__ = ["linear", "tensor_reduction"]


def _unusual(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """What of a call is outside our kernels (torch takes it, or raises its own error), or None."""
    layout = _plain.laid_out(input, weight, bias)
    if layout is not None:
        return layout
    if weight.dim() != 2 or input.dim() == 0 or input.size(-1) != weight.size(1):
        return "weight is not [out_features, in_features]"
    if input.dtype != weight.dtype or input.device != weight.device:
        return "input and weight differ in dtype or device"
    if bias is not None:
        if bias.dim() != 1 or bias.size(0) != weight.size(0):
            return "bias is not [out_features]"
        if bias.dtype != weight.dtype or bias.device != weight.device:
            return "bias and weight differ in dtype or device"
    if not input.is_floating_point():
        return f"no {str(input.dtype).removeprefix('torch.')} linear"
    return None


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation | str | None = None,
) -> torch.Tensor:
    """torch.nn.functional.linear, with an optional fused activation: activation(input @ weight.T + bias).

    Args:
        input: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features], or None.
        activation: dlkern.Activation (or its name) to apply to the result, or None. torch has no such argument.

    Returns:
        [..., out_features], contiguous, in the inputs' dtype (autocast's inside torch.autocast).

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit together; torch's own messages.
        ValueError: an unknown activation.
    """
    code = 0 if activation is None else int(Activation.of(activation))
    try:
        column = _plain.column("linear", input)
        if column is not None:
            return ops.linear.run(column, input, weight, bias, code)
    except _plain.REFUSALS:
        pass  # the long way says what is wrong
    if _plain.overridden(input, weight, bias):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias, activation=activation)
    try:
        input, weight, bias = lowered(input, weight, bias)  # type: ignore[assignment]
        reason = _unusual(input, weight, bias)
    except AttributeError:  # not tensors: torch says which
        reason = "not tensors"
    if reason is None:
        return ops.linear.linear(input, weight, bias, code)
    output = torch.nn.functional.linear(input, weight, bias)
    if tracing.active:
        tracing.record("linear", "torch", reason, input, weight, bias)
    return activate(output, code)


def tensor_reduction(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dims: Sequence[int] | None = None
) -> torch.Tensor:
    """Reduces several dimensions at once to one of features: y[b, k] = sum over i, j of weight[k, i, j] input[b, i, j].

    Computed as `linear` of the reduced dimensions laid side by side. torch's twin is torch.tensordot.

    Args:
        input: any number of dimensions.
        weight: [out_features, *sizes], sizes of the reduced dimensions.
        bias: [out_features], or None.
        dims: the reduced dimensions of input, in the order of weight's; None: the last weight.dim() - 1.

    Returns:
        [*the other dimensions, out_features], in the inputs' dtype.

    Raises:
        IndexError: a dimension that input has not.
        RuntimeError: sizes, dtypes or devices do not fit together, or a dimension comes twice.
    """
    if dims is None:
        dims = range(1 - weight.dim(), 0)
    if len(dims) != weight.dim() - 1:
        raise RuntimeError(f"tensor_reduction: weight has {weight.dim() - 1} reduced dimensions, dims has {len(dims)}")
    moved = input.movedim(tuple(dims), tuple(range(-len(dims), 0))) if dims else input.unsqueeze(-1)
    if dims and moved.shape[-len(dims) :] != weight.shape[1:]:
        raise RuntimeError(
            f"tensor_reduction: the reduced dimensions are {tuple(moved.shape[-len(dims):])}, weight expects "
            f"{tuple(weight.shape[1:])}"
        )
    kept = moved.shape[: moved.dim() - max(len(dims), 1)]
    return linear(moved.reshape(*kept, weight[0].numel()), weight.reshape(weight.shape[0], weight[0].numel()), bias)
