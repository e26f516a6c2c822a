"""VGG: blocks of 3×3 convolutions, each ended by a pooling, then three linear layers.

Simonyan and Zisserman 2014, "Very deep convolutional networks for large-scale image recognition", table 1:
configurations A (11 layers) and D (16), with batch norm behind each convolution where asked for. The names of its
parameters are torchvision's, whose state_dicts load.
"""

from __future__ import annotations

from typing import Any

import torch

import dlkern.nn

__all__ = ["VGG", "vgg11", "vgg16"]

# Channels of the convolutions of each block.
_A = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_D = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(torch.nn.Module):
    """A VGG network.

    Shapes: input [batch, 3, height, width], 32 × 32 at least (224 × 224 in the paper), output (logits) [batch, classes].
    `hidden` is the width of the two hidden linear layers.
    """

    def __init__(
        self, blocks: tuple[tuple[int, ...], ...], classes: int = 1000, dropout: float = 0.5, batch_norm: bool = False,
        hidden: int = 4096, *, nn: Any = dlkern.nn,
    ) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        channels = 3
        for block in blocks:
            for outputs in block:
                layers.append(nn.Conv2d(channels, outputs, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(outputs))
                layers.append(torch.nn.ReLU(inplace=True))
                channels = outputs
            layers.append(nn.MaxPool2d(2, 2))
        self.features = torch.nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = torch.nn.Sequential(
            nn.Linear(512 * 7 * 7, hidden), torch.nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), torch.nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )  # fmt: skip
        for module in self.features:
            if isinstance(module, torch.nn.Conv2d):  # He et al. 2015, "Delving deep into rectifiers", equation 14
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                torch.nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def vgg11(
    classes: int = 1000, dropout: float = 0.5, batch_norm: bool = False, hidden: int = 4096, *, nn: Any = dlkern.nn
) -> VGG:
    """VGG-11 (configuration A) with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return VGG(_A, classes, dropout, batch_norm, hidden, nn=nn)


def vgg16(
    classes: int = 1000, dropout: float = 0.5, batch_norm: bool = False, hidden: int = 4096, *, nn: Any = dlkern.nn
) -> VGG:
    """VGG-16 (configuration D) with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return VGG(_D, classes, dropout, batch_norm, hidden, nn=nn)
