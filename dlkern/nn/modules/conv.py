"""Convolution modules. Constructors, repr, lazy initialisation and state_dict are torch.nn's."""

from __future__ import annotations

import torch

from dlkern.freeze import Frozen, convolution
from dlkern.nn import functional as F

__all__ = [
    "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d", "LazyConv1d", "LazyConv2d", "LazyConvTranspose1d",
    "LazyConvTranspose2d",
]  # fmt: skip


def _padded(module: torch.nn.modules.conv._ConvNd, input: torch.Tensor) -> tuple[torch.Tensor, str | tuple[int, ...]]:
    """The input and the padding left to do, for padding modes that are no zeros."""
    if module.padding_mode == "zeros":
        return input, module.padding
    pads = module._reversed_padding_repeated_twice
    return torch.nn.functional.pad(input, pads, mode=module.padding_mode), (0,) * len(module.kernel_size)


class Conv1d(torch.nn.Conv1d):
    """torch.nn.Conv1d on dlkern's kernels."""

    _frozen: Frozen | None = None

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        input, padding = _padded(self, input)
        if self._frozen is not None:
            output = convolution(self, self._frozen, input, weight, bias, padding)
            if output is not None:
                return output
        return F.conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d on dlkern's kernels."""

    _frozen: Frozen | None = None

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        input, padding = _padded(self, input)
        if self._frozen is not None:
            output = convolution(self, self._frozen, input, weight, bias, padding)
            if output is not None:
                return output
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def _output_padding(
    module: torch.nn.modules.conv._ConvTransposeNd, input: torch.Tensor, output_size: list[int] | None
) -> list[int]:
    if module.padding_mode != "zeros":
        raise ValueError(f"Only `zeros` padding mode is supported for {type(module).__name__}")
    return module._output_padding(
        input, output_size, module.stride, module.padding, module.kernel_size, len(module.kernel_size), module.dilation  # type: ignore[arg-type]
    )


class ConvTranspose1d(torch.nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d on dlkern's kernels."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        more = tuple(_output_padding(self, input, output_size))
        return F.conv_transpose1d(
            input, self.weight, self.bias, self.stride, self.padding, more, self.groups, self.dilation  # type: ignore[arg-type]
        )


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d on dlkern's kernels."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        more = tuple(_output_padding(self, input, output_size))
        return F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, more, self.groups, self.dilation  # type: ignore[arg-type]
        )


class LazyConv1d(torch.nn.LazyConv1d):
    """torch.nn.LazyConv1d; becomes this package's Conv1d on the first call."""

    cls_to_become = Conv1d  # type: ignore[assignment]


class LazyConv2d(torch.nn.LazyConv2d):
    """torch.nn.LazyConv2d; becomes this package's Conv2d on the first call."""

    cls_to_become = Conv2d  # type: ignore[assignment]


class LazyConvTranspose1d(torch.nn.LazyConvTranspose1d):
    """torch.nn.LazyConvTranspose1d; becomes this package's ConvTranspose1d on the first call."""

    cls_to_become = ConvTranspose1d  # type: ignore[assignment]


class LazyConvTranspose2d(torch.nn.LazyConvTranspose2d):
    """torch.nn.LazyConvTranspose2d; becomes this package's ConvTranspose2d on the first call."""

    cls_to_become = ConvTranspose2d  # type: ignore[assignment]
