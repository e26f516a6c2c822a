"""conv2d, its gradients and conv_transpose2d in plain torch expressions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.nn import grad

from dlkern.reference.linear import activate

__all__ = ["conv2d", "conv2d_act", "conv2d_backward_input", "conv2d_backward_weight", "conv_transpose2d"]


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """y[n, k, p, q] = bias[k] + sum over c, r, s of weight[k, c, r, s] x[n, c, p·sh - ph + r·dh, q·sw - pw + s·dw]."""
    return F.conv2d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def conv2d_act(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
) -> torch.Tensor:
    """activation(conv2d(input) + residual)."""
    y = conv2d(input, weight, bias, stride, padding, dilation, groups)
    return activate(y if residual is None else y + residual, activation)


def conv2d_backward_input(
    grad_output: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Gradient with respect to the input; linear in grad_output and in weight, differentiable again."""
    return grad.conv2d_input(
        list(input_size), weight, grad_output, tuple(stride), tuple(padding), tuple(dilation), groups
    )


def conv2d_backward_weight(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to the weight and, where `bias`, the bias (else a tensor of size [0])."""
    grad_weight = grad.conv2d_weight(
        input, list(weight_size), grad_output, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    return grad_weight, grad_output.sum((0, 2, 3)) if bias else grad_output.new_empty(0)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> torch.Tensor:
    """What conv2d of these settings maps back: y[n, k, h, w] = bias[k] + sum over c, r, s with h = i·sh - ph + r·dh and
    w = j·sw - pw + s·dw of weight[c, k, r, s] x[n, c, i, j]."""
    return F.conv_transpose2d(
        input, weight, bias, tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation)
    )
