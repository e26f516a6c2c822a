"""ResNet-18: residual blocks of two 3×3 convolutions.

He, Zhang, Ren and Sun 2015, "Deep residual learning for image recognition", table 1 (18 layers) with projection
shortcuts (option B). The names of its parameters are torchvision's, whose state_dicts load.
"""

from __future__ import annotations

from typing import Any

import torch

import dlkern.nn

__all__ = ["BasicBlock", "ResNet", "resnet18"]


class BasicBlock(torch.nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), fig. 2 of the paper; `stride` halves the image in the first convolution.

    Shapes: input [batch, channels_in, height, width],
    output [batch, channels, ceil(height / stride), ceil(width / stride)].
    """

    def __init__(self, channels_in: int, channels: int, stride: int, *, nn: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = torch.nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = torch.nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


def _stage(blocks: int, channels_in: int, channels: int, stride: int, nn: Any) -> torch.nn.Sequential:
    first = BasicBlock(channels_in, channels, stride, nn=nn)
    return torch.nn.Sequential(first, *(BasicBlock(channels, channels, 1, nn=nn) for _ in range(blocks - 1)))


class ResNet(torch.nn.Module):
    """A residual network of four stages of BasicBlocks, 64 to 512 channels.

    Shapes: input [batch, 3, height, width] (224 × 224 in the paper), output (logits) [batch, classes].
    """

    def __init__(self, blocks: tuple[int, int, int, int], classes: int = 1000, *, nn: Any = dlkern.nn) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = torch.nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(blocks[0], 64, 64, 1, nn)  # [batch, 64, height / 4, width / 4]
        self.layer2 = _stage(blocks[1], 64, 128, 2, nn)  # [batch, 128, height / 8, width / 8]
        self.layer3 = _stage(blocks[2], 128, 256, 2, nn)  # [batch, 256, height / 16, width / 16]
        self.layer4 = _stage(blocks[3], 256, 512, 2, nn)  # [batch, 512, height / 32, width / 32]
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):  # He et al. 2015, "Delving deep into rectifiers", equation 14
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # [batch, 64, height / 4, width / 4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(classes: int = 1000, *, nn: Any = dlkern.nn) -> ResNet:
    """ResNet-18 with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return ResNet((2, 2, 2, 2), classes, nn=nn)
