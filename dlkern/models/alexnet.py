"""AlexNet: five convolutions, three poolings, three linear layers.

Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks" (the one-tower form of Krizhevsky,
Sutskever and Hinton 2012, without response normalisation). The names of its parameters are torchvision's, whose
state_dicts load.
"""

from __future__ import annotations

from typing import Any

import torch

import dlkern.nn

__all__ = ["AlexNet", "alexnet"]


class AlexNet(torch.nn.Module):
    """AlexNet.

    Shapes: input [batch, 3, height, width], 63 × 63 at least (224 × 224 in the paper), output (logits) [batch, classes].
    `hidden` is the width of the two hidden linear layers.
    """

    def __init__(
        self, classes: int = 1000, dropout: float = 0.5, hidden: int = 4096, *, nn: Any = dlkern.nn
    ) -> None:
        super().__init__()
        relu = torch.nn.ReLU
        self.features = torch.nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, padding=2), relu(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), relu(inplace=True), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), relu(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1), relu(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1), relu(inplace=True), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = torch.nn.Sequential(
            nn.Dropout(dropout), nn.Linear(256 * 6 * 6, hidden), relu(inplace=True),
            nn.Dropout(dropout), nn.Linear(hidden, hidden), relu(inplace=True),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def alexnet(classes: int = 1000, dropout: float = 0.5, hidden: int = 4096, *, nn: Any = dlkern.nn) -> AlexNet:
    """AlexNet with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return AlexNet(classes, dropout, hidden, nn=nn)
