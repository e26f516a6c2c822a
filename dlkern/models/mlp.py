"""Multilayer perceptron: linear layers with ReLU between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import dlkern.nn

__all__ = ["MLP", "mlp"]


class MLP(torch.nn.Sequential):
    """Flattens its input, then linear layers of the given widths, ReLU and dropout after each but the last.

    Shapes: input [batch, ...] of widths[0] features in all, output (logits) [batch, widths[-1]].
    """

    def __init__(self, widths: Sequence[int], dropout: float = 0.0, *, nn: Any = dlkern.nn) -> None:
        layers: list[torch.nn.Module] = [torch.nn.Flatten()]
        for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):  # noqa: RUF007
            if i > 0:
                layers.append(torch.nn.ReLU())
                if dropout > 0:
                    layers.append(nn.Dropout(dropout))
            layers.append(nn.Linear(inputs, outputs))
        super().__init__(*layers)


def mlp(widths: Sequence[int] = (1024, 256, 128, 10), dropout: float = 0.0, *, nn: Any = dlkern.nn) -> MLP:
    """A multilayer perceptron with layers from `nn`: dlkern.nn, or torch.nn for its torch twin.

    Args:
        widths: features of the input, of each hidden layer and of the output; at least two numbers.
        dropout: probability with which a hidden unit is dropped in training.

    Raises:
        ValueError: fewer than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"mlp: expected the widths of input and output at least, got {tuple(widths)}")
    return MLP(widths, dropout, nn=nn)
