"""Pooling in plain torch expressions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = [
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "flat_indices", "lp_pool2d", "lp_pool2d_backward",
    "max_pool2d",
]  # fmt: skip

Ints = list[int] | tuple[int, ...]


def max_pool2d(
    input: torch.Tensor, kernel_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest element of each window and where it is (int64, y * width + x)."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)


def flat_indices(
    indices: torch.Tensor, width: int, kernel_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints,
) -> torch.Tensor:
    """Indices of max_pool2d_forward as torch has them: window offsets r * kw + s become y * width + x."""
    if indices.dtype == torch.int64:
        return indices
    offset = indices.long()
    rows = torch.arange(indices.shape[-2], device=indices.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(indices.shape[-1], device=indices.device) * stride[1] - padding[1]
    y = rows + offset // kernel_size[1] * dilation[0]
    x = columns + offset % kernel_size[1] * dilation[1]
    return y * width + x


def avg_pool2d(
    input: torch.Tensor, kernel_size: Ints, stride: Ints, padding: Ints, ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> torch.Tensor:
    return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool2d(input: torch.Tensor, output_size: Ints) -> torch.Tensor:
    return F.adaptive_avg_pool2d(input, output_size)  # type: ignore[arg-type]  # lists are as good


def adaptive_max_pool2d(input: torch.Tensor, output_size: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest element of each window and where it is (int64, y * width + x)."""
    return F.adaptive_max_pool2d(input, output_size, return_indices=True)  # type: ignore[arg-type]


def lp_pool2d(input: torch.Tensor, norm: float, kernel_size: Ints, stride: Ints, ceil_mode: bool) -> torch.Tensor:
    """(sum of x^norm over a window)^(1 / norm); a window cut off by the input's end counts as its mean over a whole one."""
    mean = F.avg_pool2d(input.pow(norm), kernel_size, stride, 0, ceil_mode)
    # sign(m) |m| is m, with no gradient where m is 0.
    return (torch.sign(mean) * torch.relu(mean.abs())).mul(kernel_size[0] * kernel_size[1]).pow(1.0 / norm)


def lp_pool2d_backward(
    grad_output: torch.Tensor, input: torch.Tensor, norm: float, kernel_size: Ints, stride: Ints, ceil_mode: bool
) -> torch.Tensor:
    """Gradient of lp_pool2d by its input, in expressions that can be differentiated."""

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return lp_pool2d(x, norm, kernel_size, stride, ceil_mode)

    _, pull = torch.func.vjp(pooled, input)  # type: ignore[misc]  # three with has_aux only
    return pull(grad_output)[0]
