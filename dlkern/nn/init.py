"""torch.nn.init's names, and Xavier and He initialisation of whole modules with the fans their layers have.

torch.nn.init takes a weight's fans from its shape, which is right for Linear and plain convolutions. Given a module, the
four functions here take them from the layer: a group's part of a grouped convolution, the swapped channels and the stride
of a transposed one, one gate of a recurrent weight, one projection of an attention's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.nn.init import (
    calculate_gain,
    constant_,
    dirac_,
    eye_,
    normal_,
    ones_,
    orthogonal_,
    sparse_,
    trunc_normal_,
    uniform_,
    zeros_,
)
from torch.nn.utils import parametrize

from dlkern.nn.modules.positions import LearnedPositions, RelativePositionBias

__all__ = [
    "calculate_gain", "constant_", "dirac_", "eye_", "fans", "kaiming_normal_", "kaiming_uniform_", "normal_", "ones_",
    "orthogonal_", "sparse_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "zeros_",
]  # fmt: skip

Target = TypeVar("Target", torch.Tensor, torch.nn.Module)

_RECURRENT = (torch.nn.RNNBase, torch.nn.RNNCellBase)

# Their weights may have two dimensions, but are no matrices that an input is multiplied by.
_TABLES = (
    torch.nn.Embedding, torch.nn.EmbeddingBag, torch.nn.LayerNorm, torch.nn.RMSNorm, LearnedPositions, RelativePositionBias,
)  # fmt: skip


def _blocks(module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, float, float]]:
    """(weight or a part of it, fan_in, fan_out) of one module, its children left out."""
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        taps = math.prod(module.kernel_size)
        steps = math.prod(module.stride)
        for weight in module.weight.chunk(module.groups):
            # Rows are output channels, of a transposed convolution input channels. A stride of s reaches 1 in s positions.
            rows, columns = weight.shape[0] * taps, weight.shape[1] * taps
            if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
                yield weight, rows / steps, columns
            else:
                yield weight, columns, rows / steps
    elif isinstance(module, _RECURRENT):
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 2 and not name.startswith("weight_peephole"):  # which is diagonal: no sums
                hidden = module.hidden_size
                for gate in (weight,) if name.startswith("weight_hr") else weight.split(hidden):
                    yield gate, gate.shape[1], gate.shape[0]
    elif isinstance(module, torch.nn.MultiheadAttention):
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 2:
                for projection in weight.split(module.embed_dim) if name == "in_proj_weight" else (weight,):
                    yield projection, projection.shape[1], projection.shape[0]
    elif isinstance(module, torch.nn.Bilinear):
        yield module.weight, module.weight.shape[1] * module.weight.shape[2], module.weight.shape[0]
    elif not isinstance(module, _TABLES):
        other = getattr(module, "weight", None)
        if isinstance(other, torch.Tensor) and other.dim() >= 2:  # Linear, TensorReduction
            yield other, other[0].numel(), other.shape[0]


def fans(module: torch.nn.Module) -> tuple[float, float]:
    """(fan_in, fan_out) of a layer: how many inputs an output is a sum of, and how many outputs an input goes into, away
    from borders and on average over positions.

    Raises:
        ValueError: a module without a weight matrix of its own.
    """
    for _, fan_in, fan_out in _blocks(module):
        return float(fan_in), float(fan_out)
    raise ValueError(f"fans: {type(module).__name__} has no weight matrix of its own")


def _fill(
    target: torch.Tensor | torch.nn.Module, std: Callable[[float, float], float], uniform: bool,
    generator: torch.Generator | None,
) -> None:
    if not isinstance(target, torch.nn.Module):
        raise TypeError(f"expected a tensor or a module, got {type(target).__name__}")
    with torch.no_grad():
        found = [(module, list(_blocks(module))) for module in target.modules()]  # raises before anything is written
        for module, blocks in found:
            if blocks and parametrize.is_parametrized(module):
                raise ValueError(f"{type(module).__name__} is parametrized: its weight is computed; initialise it before")
        for module, blocks in found:
            for weight, fan_in, fan_out in blocks:
                if weight.numel() == 0:
                    continue
                scale = std(fan_in, fan_out)
                if uniform:
                    weight.uniform_(-scale * math.sqrt(3), scale * math.sqrt(3), generator=generator)
                else:
                    weight.normal_(0.0, scale, generator=generator)
            for name, parameter in module.named_parameters(recurse=False) if blocks else ():
                if parameter.dim() == 1 and "bias" in name:
                    parameter.zero_()


def _xavier(target: Any, gain: float, generator: torch.Generator | None, uniform: bool) -> Any:
    if isinstance(target, torch.Tensor):
        tensors = torch.nn.init.xavier_uniform_ if uniform else torch.nn.init.xavier_normal_
        return tensors(target, gain, generator)
    _fill(target, lambda fan_in, fan_out: gain * math.sqrt(2 / (fan_in + fan_out)), uniform, generator)
    return target


def _kaiming(
    target: Any, a: float, mode: str, nonlinearity: str, generator: torch.Generator | None, uniform: bool
) -> Any:
    if isinstance(target, torch.Tensor):
        tensors = torch.nn.init.kaiming_uniform_ if uniform else torch.nn.init.kaiming_normal_
        return tensors(target, a, mode, nonlinearity, generator)  # type: ignore[arg-type]
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"Mode {mode} not supported, please use one of ['fan_in', 'fan_out']")
    gain = calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    _fill(
        target, lambda fan_in, fan_out: gain / math.sqrt(fan_in if mode == "fan_in" else fan_out), uniform, generator
    )
    return target


def xavier_uniform_(tensor: Target, gain: float = 1.0, generator: torch.Generator | None = None) -> Target:
    """torch.nn.init.xavier_uniform_; of a module, all weight matrices in it by their layers' fans, their biases zeros.

    Embeddings and parameters of normalisations stay. Formula: U(-b, b), b = gain sqrt(6 / (fan_in + fan_out)). Glorot and
    Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", equation 16.

    Args:
        tensor: a tensor, or a module of torch.nn's or dlkern.nn's layers.
        gain: calculate_gain(...) of the activation behind.
        generator: to draw from.

    Returns:
        The same object.

    Raises:
        TypeError: neither tensor nor module.
        ValueError: a tensor of fewer than two dimensions; a module with lazy or parametrized layers. Nothing is written.
    """
    return _xavier(tensor, gain, generator, True)


def xavier_normal_(tensor: Target, gain: float = 1.0, generator: torch.Generator | None = None) -> Target:
    """xavier_uniform_ with N(0, gain² · 2 / (fan_in + fan_out))."""
    return _xavier(tensor, gain, generator, False)


def kaiming_uniform_(
    tensor: Target, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Target:
    """torch.nn.init.kaiming_uniform_ (He's); of a module, all weight matrices in it by their layers' fans, biases zeros.

    Embeddings and parameters of normalisations stay. Formula: U(-b, b), b = gain sqrt(3 / fan). He et al. 2015, "Delving
    deep into rectifiers", equations 10 and 14.

    Args:
        tensor: a tensor, or a module of torch.nn's or dlkern.nn's layers.
        a: negative slope of leaky_relu.
        mode: "fan_in" keeps the variance of activations, "fan_out" that of gradients.
        nonlinearity: as for calculate_gain.
        generator: to draw from.

    Returns:
        The same object.

    Raises:
        ValueError: an unknown mode or nonlinearity, or as xavier_uniform_.
    """
    return _kaiming(tensor, a, mode, nonlinearity, generator, True)


def kaiming_normal_(
    tensor: Target, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> Target:
    """kaiming_uniform_ with N(0, gain² / fan)."""
    return _kaiming(tensor, a, mode, nonlinearity, generator, False)
