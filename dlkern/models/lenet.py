"""LeNet-5: two convolutions, two poolings, three linear layers.

LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document recognition", fig. 2. As usual
today the pooling has no parameters, C3 sees all maps, and a softmax takes the place of the radial basis functions.
"""

from __future__ import annotations

from typing import Any

import torch

import dlkern.nn

__all__ = ["LeNet", "lenet"]


class LeNet(torch.nn.Module):
    """LeNet-5 on images of 1 × 32 × 32.

    Shapes: input [batch, 1, 32, 32], output (logits) [batch, classes].
    """

    def __init__(self, classes: int = 10, *, nn: Any = dlkern.nn) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            nn.Conv2d(1, 6, 5),  # [batch, 6, 28, 28]
            torch.nn.Tanh(),
            nn.AvgPool2d(2),  # [batch, 6, 14, 14]
            nn.Conv2d(6, 16, 5),  # [batch, 16, 10, 10]
            torch.nn.Tanh(),
            nn.AvgPool2d(2),  # [batch, 16, 5, 5]
        )
        self.classifier = torch.nn.Sequential(
            torch.nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            torch.nn.Tanh(),
            nn.Linear(120, 84),
            torch.nn.Tanh(),
            nn.Linear(84, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def lenet(classes: int = 10, *, nn: Any = dlkern.nn) -> LeNet:
    """LeNet-5 with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return LeNet(classes, nn=nn)
