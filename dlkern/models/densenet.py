"""DenseNet-121: every layer of a block sees the results of all layers before it.

Huang, Liu, van der Maaten and Weinberger 2016, "Densely connected convolutional networks", table 1 (DenseNet-BC, growth
rate 32). The names of its parameters are torchvision's, whose state_dicts load.
"""

from __future__ import annotations

from typing import Any

import torch

import dlkern.nn

__all__ = ["DenseNet", "densenet121"]


class DenseLayer(torch.nn.Module):
    """conv(relu(bn(conv(relu(bn(x)))))): 1×1 to four times the growth rate, then 3×3; joined to x along the channels.

    Shapes: input [batch, inputs, height, width], output [batch, inputs + growth, height, width].
    """

    def __init__(self, inputs: int, growth: int, *, nn: Any) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = torch.nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = torch.nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))], 1)


class DenseNet(torch.nn.Module):
    """A DenseNet-BC: dense blocks, between them 1×1 convolutions that halve the channels, and poolings.

    Shapes: input [batch, 3, height, width] (224 × 224 in the paper), output (logits) [batch, classes].
    """

    def __init__(
        self, blocks: tuple[int, ...], growth: int = 32, classes: int = 1000, *, nn: Any = dlkern.nn
    ) -> None:
        super().__init__()
        channels = 2 * growth
        layers: dict[str, torch.nn.Module] = {
            "conv0": nn.Conv2d(3, channels, 7, 2, padding=3, bias=False), "norm0": nn.BatchNorm2d(channels),
            "relu0": torch.nn.ReLU(inplace=True), "pool0": nn.MaxPool2d(3, 2, padding=1),
        }  # fmt: skip
        for i, count in enumerate(blocks, 1):
            block = torch.nn.Sequential()
            for j in range(1, count + 1):
                block.add_module(f"denselayer{j}", DenseLayer(channels, growth, nn=nn))
                channels += growth
            layers[f"denseblock{i}"] = block
            if i < len(blocks):
                transition = torch.nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(channels))
                transition.add_module("relu", torch.nn.ReLU(inplace=True))
                transition.add_module("conv", nn.Conv2d(channels, channels // 2, 1, bias=False))
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                layers[f"transition{i}"] = transition
                channels //= 2
        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features = torch.nn.Sequential()
        for name, layer in layers.items():
            self.features.add_module(name, layer)
        self.relu = torch.nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        torch.nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.relu(self.features(x))), 1))


def densenet121(classes: int = 1000, *, nn: Any = dlkern.nn) -> DenseNet:
    """DenseNet-121 with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return DenseNet((6, 12, 24, 16), classes=classes, nn=nn)
