"""linear in plain torch expressions."""

from __future__ import annotations

import torch

from dlkern.ops._activation import Activation

__all__ = ["activate", "activation_backward", "linear"]


def activate(x: torch.Tensor, activation: int) -> torch.Tensor:
    """The activation by its number."""
    if activation == Activation.RELU:
        return torch.relu(x)
    if activation == Activation.TANH:
        return torch.tanh(x)
    if activation == Activation.SIGMOID:
        return torch.sigmoid(x)
    return x


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: int) -> torch.Tensor:
    """activation(input @ weight.T + bias)."""
    return activate(torch.nn.functional.linear(input, weight, bias), activation)


def activation_backward(grad_output: torch.Tensor, output: torch.Tensor, activation: int) -> torch.Tensor:
    """Gradient before the activation, from the activation's own output."""
    if activation == Activation.RELU:
        return torch.where(output <= 0, torch.zeros_like(grad_output), grad_output)
    if activation == Activation.TANH:
        return grad_output * (1 - output * output)
    if activation == Activation.SIGMOID:
        return grad_output * output * (1 - output)
    return grad_output
