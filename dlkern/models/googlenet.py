"""GoogLeNet: blocks of four parallel branches, joined along the channels.

Szegedy et al. 2014, "Going deeper with convolutions", table 1, without the auxiliary classifiers; batch norm behind each
convolution as in Ioffe and Szegedy 2015. The names of its parameters are torchvision's, whose state_dicts load (less
those of aux1 and aux2); like there, the "5×5" branches convolve 3×3.
"""

from __future__ import annotations

from typing import Any

import torch

import dlkern.nn

__all__ = ["GoogLeNet", "googlenet"]


class ConvUnit(torch.nn.Module):
    """relu(bn(conv(x)))."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, nn: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn(self.conv(x)))


class Inception(torch.nn.Module):
    """1×1, 1×1 and 3×3, 1×1 and 3×3 (the paper's 5×5), and pooling and 1×1, side by side (fig. 2b).

    Shapes: input [batch, inputs, height, width], output [batch, one + three[1] + five[1] + pool, height, width].
    """

    def __init__(
        self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int, *, nn: Any
    ) -> None:
        super().__init__()
        self.branch1 = ConvUnit(inputs, one, 1, nn=nn)
        self.branch2 = torch.nn.Sequential(ConvUnit(inputs, three[0], 1, nn=nn), ConvUnit(*three, 3, nn=nn))
        self.branch3 = torch.nn.Sequential(ConvUnit(inputs, five[0], 1, nn=nn), ConvUnit(*five, 3, nn=nn))
        self.branch4 = torch.nn.Sequential(nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), ConvUnit(inputs, pool, 1, nn=nn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(torch.nn.Module):
    """GoogLeNet.

    Shapes: input [batch, 3, height, width] (224 × 224 in the paper), output (logits) [batch, classes].
    """

    def __init__(self, classes: int = 1000, dropout: float = 0.2, *, nn: Any = dlkern.nn) -> None:
        super().__init__()
        self.conv1 = ConvUnit(3, 64, 7, 2, nn=nn)
        self.maxpool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = ConvUnit(64, 64, 1, nn=nn)
        self.conv3 = ConvUnit(64, 192, 3, nn=nn)
        self.maxpool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception3a = Inception(192, 64, (96, 128), (16, 32), 32, nn=nn)
        self.inception3b = Inception(256, 128, (128, 192), (32, 96), 64, nn=nn)
        self.maxpool3 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.inception4a = Inception(480, 192, (96, 208), (16, 48), 64, nn=nn)
        self.inception4b = Inception(512, 160, (112, 224), (24, 64), 64, nn=nn)
        self.inception4c = Inception(512, 128, (128, 256), (24, 64), 64, nn=nn)
        self.inception4d = Inception(512, 112, (144, 288), (32, 64), 64, nn=nn)
        self.inception4e = Inception(528, 256, (160, 320), (32, 128), 128, nn=nn)
        self.maxpool4 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.inception5a = Inception(832, 256, (160, 320), (32, 128), 128, nn=nn)
        self.inception5b = Inception(832, 384, (192, 384), (48, 128), 128, nn=nn)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool1(self.conv1(x))  # [batch, 64, height / 4, width / 4]
        x = self.maxpool2(self.conv3(self.conv2(x)))  # [batch, 192, height / 8, width / 8]
        x = self.maxpool3(self.inception3b(self.inception3a(x)))  # [batch, 480, height / 16, width / 16]
        for block in (self.inception4a, self.inception4b, self.inception4c, self.inception4d, self.inception4e):
            x = block(x)
        x = self.inception5b(self.inception5a(self.maxpool4(x)))  # [batch, 1024, height / 32, width / 32]
        return self.fc(self.dropout(torch.flatten(self.avgpool(x), 1)))


def googlenet(classes: int = 1000, dropout: float = 0.2, *, nn: Any = dlkern.nn) -> GoogLeNet:
    """GoogLeNet with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return GoogLeNet(classes, dropout, nn=nn)
