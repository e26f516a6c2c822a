"""Network in network: convolutions followed by 1×1 convolutions, and an average over the image as the classifier.

Lin, Chen and Yan 2013, "Network in network", section 3 and figure 2; sizes of the CIFAR-10 network published with it.
"""

from __future__ import annotations

from typing import Any

import torch

import dlkern.nn

__all__ = ["NiN", "nin"]


def _block(inputs: int, kernel: int, widths: tuple[int, int, int], nn: Any) -> list[torch.nn.Module]:
    """One "mlpconv" layer: a convolution, and a perceptron of two layers at every pixel."""
    sizes = (inputs, *widths)
    return [
        layer
        for i, k in enumerate((kernel, 1, 1))
        for layer in (nn.Conv2d(sizes[i], sizes[i + 1], k, padding=k // 2), torch.nn.ReLU(inplace=True))
    ]


class NiN(torch.nn.Sequential):
    """Network in network.

    Shapes: input [batch, 3, height, width] (32 × 32 in the paper), output (logits) [batch, classes].
    """

    def __init__(self, classes: int = 10, dropout: float = 0.5, *, nn: Any = dlkern.nn) -> None:
        super().__init__(
            *_block(3, 5, (192, 160, 96), nn), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout),
            *_block(96, 5, (192, 192, 192), nn), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout),
            *_block(192, 3, (192, 192, classes), nn), nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        )  # fmt: skip


def nin(classes: int = 10, dropout: float = 0.5, *, nn: Any = dlkern.nn) -> NiN:
    """Network in network with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return NiN(classes, dropout, nn=nn)
