"""Batch norm in plain torch expressions, forward and backward, differentiable to any order.

Computed in float64, as torch's CPU kernels sum; torch's own batch norm is not used, so that the tests have two
independent references.
"""

from __future__ import annotations

import torch

from dlkern.reference.linear import activate, activation_backward

__all__ = ["batch_norm_backward", "batch_norm_eval", "batch_norm_train"]


def _per_channel(x: torch.Tensor, dim: int) -> torch.Tensor:
    """[C] as [1, C, 1, ...] with `dim` dimensions."""
    return x.reshape(1, -1, *(1,) * (dim - 2))


def _other_dims(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _finish(x, residual, weight, bias, mean, invstd, activation, dtype):
    y = (x - _per_channel(mean, x.dim())) * _per_channel(invstd, x.dim())
    if weight is not None:
        y = y * _per_channel(weight.to(y.dtype), x.dim())
    if bias is not None:
        y = y + _per_channel(bias.to(y.dtype), x.dim())
    if residual is not None:
        y = y + residual.to(y.dtype)
    return activate(y, activation).to(dtype)


def batch_norm_train(
    input: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor | None, running_var: torch.Tensor | None, momentum: float, eps: float, activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and the new running statistics (of size 0 where there are none)."""
    x = input.double()
    dims = _other_dims(x)
    count = x.numel() // max(x.shape[1], 1)
    empty = x.new_empty(0)
    if count == 0:  # nothing to normalise, statistics stay as they are
        mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    else:
        mean = x.mean(dims)
        var = (x - _per_channel(mean, x.dim())).square().mean(dims)
    output = _finish(x, residual, weight, bias, mean, torch.rsqrt(var + eps), activation, input.dtype)
    if running_mean is None or running_var is None:
        return output, empty, empty
    if count == 0:
        return output, running_mean.clone(), running_var.clone()
    with torch.no_grad():
        unbiased = var * (count / (count - 1)) if count > 1 else var
        new_mean = running_mean + momentum * (mean - running_mean)
        new_var = running_var + momentum * (unbiased - running_var)
    return output, new_mean.to(running_mean.dtype), new_var.to(running_var.dtype)


def batch_norm_eval(
    input: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    running_mean: torch.Tensor, running_var: torch.Tensor, eps: float, activation: int,
) -> torch.Tensor:
    x = input.double()
    invstd = torch.rsqrt(running_var.to(x.dtype) + eps)
    return _finish(x, residual, weight, bias, running_mean.to(x.dtype), invstd, activation, input.dtype)


def batch_norm_backward(
    grad_output: torch.Tensor, input: torch.Tensor, output: torch.Tensor | None, weight: torch.Tensor | None,
    mean: torch.Tensor, invstd: torch.Tensor, train: bool, activation: int, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight, bias and residual.

    When training, mean and invstd are functions of input and are made from it again, so that this expression can be
    differentiated; with frozen statistics they are the constants passed in.
    """
    dtype = torch.float64
    grad = grad_output.to(dtype)
    if output is not None:
        grad = activation_backward(grad, output.to(dtype), activation)
    x = input.to(dtype)
    dims = _other_dims(x)
    mean, invstd = mean.double(), invstd.double()
    if train:
        mean = x.mean(dims)
        invstd = torch.rsqrt((x - _per_channel(mean, x.dim())).square().mean(dims) + eps)
    normalised = (x - _per_channel(mean, x.dim())) * _per_channel(invstd, x.dim())
    grad_bias = grad.sum(dims)
    grad_weight = (grad * normalised).sum(dims)
    scale = invstd if weight is None else invstd * weight.to(dtype)
    grad_input = grad
    if train:
        count = x.numel() // max(x.shape[1], 1)
        grad_input = grad - _per_channel(grad_bias / count, x.dim()) - normalised * _per_channel(grad_weight / count, x.dim())
    grad_input = (grad_input * _per_channel(scale, x.dim())).to(input.dtype)
    parameter = (dtype if input.dtype == dtype else torch.float32) if weight is None else weight.dtype
    return grad_input, grad_weight.to(parameter), grad_bias.to(parameter), grad.to(input.dtype)
