"""layer_norm in plain torch expressions."""

from __future__ import annotations

import torch

__all__ = ["layer_norm", "layer_norm_backward"]


def layer_norm(
    input: torch.Tensor, dims: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last `dims` dimensions."""
    return torch.nn.functional.layer_norm(input, input.shape[input.dim() - dims :], weight, bias, eps)


def layer_norm_backward(
    grad_output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor | None, dims: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of input, weight and bias, from the input alone."""
    last = tuple(range(input.dim() - dims, input.dim()))
    rows = tuple(range(input.dim() - dims))
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    x, g = input.to(wide), grad_output.to(wide)
    centered = x - x.mean(last, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(last, keepdim=True) + eps)
    xhat = centered * rstd
    weighted = g if weight is None else g * weight.to(wide)
    along = (weighted * xhat).mean(last, keepdim=True)
    grad_input = (weighted - weighted.mean(last, keepdim=True) - xhat * along) * rstd
    parameters = input.dtype if weight is None else weight.dtype
    grad_weight, grad_bias = g * xhat, g
    if rows:
        grad_weight, grad_bias = grad_weight.sum(rows), grad_bias.sum(rows)
    return grad_input.to(input.dtype), grad_weight.to(parameters), grad_bias.to(parameters)
