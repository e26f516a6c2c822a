"""ResNet-18 and ResNet-50, as first published and with pre-activation.

He, Zhang, Ren and Sun 2015, "Deep residual learning for image recognition", table 1, with projection shortcuts (option B)
and, in bottlenecks, the stride in the 3×3 convolution; the names of the parameters are torchvision's, whose state_dicts
load. Pre-activation: He, Zhang, Ren and Sun 2016, "Identity mappings in deep residual networks", fig. 1b.
"""

from __future__ import annotations

from typing import Any

import torch

import dlkern.nn

__all__ = ["BasicBlock", "Bottleneck", "ResNet", "preact_resnet18", "preact_resnet50", "resnet18", "resnet50"]


def _projection(channels_in: int, channels: int, stride: int, normalise: bool, nn: Any) -> torch.nn.Sequential | None:
    """The shortcut where the shape changes."""
    if stride == 1 and channels_in == channels:
        return None
    layers = [nn.Conv2d(channels_in, channels, 1, stride, bias=False)]
    return torch.nn.Sequential(*layers, *([nn.BatchNorm2d(channels)] if normalise else []))


class _Block(torch.nn.Module):
    """Convolutions beside a shortcut; `stride` halves the image, `preactivation` normalises before each convolution.

    Shapes: input [batch, channels_in, height, width],
    output [batch, expansion · width, ceil(height / stride), ceil(width / stride)].
    """

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int, preactivation: bool, *, nn: Any) -> None:
        super().__init__()
        channels = self.expansion * width
        self.count = 0
        previous = channels_in
        for outputs, kernel, step in self._convolutions(width, stride):
            self.count += 1
            self.add_module(f"conv{self.count}", nn.Conv2d(previous, outputs, kernel, step, padding=kernel // 2, bias=False))
            self.add_module(f"bn{self.count}", nn.BatchNorm2d(previous if preactivation else outputs))
            previous = outputs
        self.relu = torch.nn.ReLU(inplace=True)
        self.downsample = _projection(channels_in, channels, stride, not preactivation, nn)
        self.preactivation = preactivation

    def _convolutions(self, width: int, stride: int) -> list[tuple[int, int, int]]:
        """Channels, kernel size and stride of each."""
        return [(width, 3, stride), (width, 3, 1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        convs = [getattr(self, f"conv{i}") for i in range(1, self.count + 1)]
        norms = [getattr(self, f"bn{i}") for i in range(1, self.count + 1)]
        if self.preactivation:
            y = self.relu(norms[0](x))
            shortcut = x if self.downsample is None else self.downsample(y)
            for conv, norm in zip(convs, norms[1:]):
                y = self.relu(norm(conv(y)))
            return convs[-1](y) + shortcut
        shortcut = x if self.downsample is None else self.downsample(x)
        for conv, norm in zip(convs[:-1], norms):
            x = self.relu(norm(conv(x)))
        return self.relu(norms[-1](convs[-1](x)) + shortcut)


class BasicBlock(_Block):
    """Two 3×3 convolutions (fig. 5, left)."""


class Bottleneck(_Block):
    """1×1 to fewer channels, 3×3, 1×1 to four times as many (fig. 5, right)."""

    expansion = 4

    def _convolutions(self, width: int, stride: int) -> list[tuple[int, int, int]]:
        return [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]


class ResNet(torch.nn.Module):
    """A residual network of four stages of blocks, `width` to 8 · `width` channels before expansion.

    Shapes: input [batch, 3, height, width] (224 × 224 in the paper), output (logits) [batch, classes].
    """

    def __init__(
        self, block: type[_Block], blocks: tuple[int, int, int, int], classes: int = 1000, *, preactivation: bool = False,
        width: int = 64, nn: Any = dlkern.nn,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = torch.nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = width
        for i, count in enumerate(blocks):  # [batch, ..., height / 4, width / 4], then half of it each
            stage = torch.nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(block(channels, width << i, stride, preactivation, nn=nn))
                channels = block.expansion * (width << i)
            self.add_module(f"layer{i + 1}", stage)
        self.last = None
        if preactivation:
            self.last = torch.nn.Sequential(nn.BatchNorm2d(channels), torch.nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):  # He et al. 2015, "Delving deep into rectifiers", equation 14
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self) -> list[torch.nn.Module]:
        """layer1 to layer4."""
        return [self.get_submodule(f"layer{i}") for i in range(1, 5)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages():
            x = stage(x)
        if self.last is not None:
            x = self.last(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(classes: int = 1000, *, width: int = 64, nn: Any = dlkern.nn) -> ResNet:
    """ResNet-18 with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, width=width, nn=nn)


def resnet50(classes: int = 1000, *, nn: Any = dlkern.nn) -> ResNet:
    """ResNet-50 with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, nn=nn)


def preact_resnet18(classes: int = 1000, *, nn: Any = dlkern.nn) -> ResNet:
    """ResNet-18 with pre-activation, with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, preactivation=True, nn=nn)


def preact_resnet50(classes: int = 1000, *, nn: Any = dlkern.nn) -> ResNet:
    """ResNet-50 with pre-activation, with layers from `nn`: dlkern.nn, or torch.nn for its torch twin."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, preactivation=True, nn=nn)
