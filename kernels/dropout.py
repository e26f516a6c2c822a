"""dropout: zero each element, or each channel, with probability p, scale the rest by 1 / (1 - p).

Counter-based random numbers by the contract of csrc/philox.h, so that every column drops the same elements: the
block of counter j gives the words of elements j, j + 1024, j + 2048 and j + 3072 of its group of 4096. The op is its
own backward and no mask is stored. Floor: one read and one write of the tensor.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import accumulator, accumulator_dtype, check, check_tensors, dense, launch


@triton.jit
def dropout_kernel(
    input_ptr, output_ptr, seed_ptr, count, scale: tl.float64, threshold, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    # One program: BLOCK consecutive counters, four elements each.
    seed = tl.load(seed_ptr)
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.uint32)
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, low, high, zero, zero)
    first = counter // 1024 * 4096 + counter % 1024
    _write(input_ptr, output_ptr, first, word0, count, scale, threshold, ACC)
    _write(input_ptr, output_ptr, first + 1024, word1, count, scale, threshold, ACC)
    _write(input_ptr, output_ptr, first + 2048, word2, count, scale, threshold, ACC)
    _write(input_ptr, output_ptr, first + 3072, word3, count, scale, threshold, ACC)


@triton.jit
def _write(input_ptr, output_ptr, element, word, count, scale, threshold, ACC: tl.constexpr):
    x = tl.load(input_ptr + element, mask=element < count, other=0.0).to(ACC)
    # word >= p * 2**32 on unsigned words, as a signed comparison of both sides less 2**31
    keep = (word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
    y = tl.where(keep, x * scale.to(ACC), 0.0)
    tl.store(output_ptr + element, y.to(output_ptr.dtype.element_ty), mask=element < count)


@triton.jit
def feature_dropout_kernel(
    input_ptr, factor_ptr, output_ptr, count, channels, inner, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr
):
    # One program: BLOCK elements in memory order, times the factor of their feature; zeros where that is 0.
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        feature = element // (channels * inner) * channels + element % channels
    else:
        feature = element // inner
    factor = tl.load(factor_ptr + feature, mask=element < count, other=0.0)
    x = tl.load(input_ptr + element, mask=element < count, other=0.0).to(ACC)
    y = tl.where(factor == 0, 0.0, x * factor)
    tl.store(output_ptr + element, y.to(output_ptr.dtype.element_ty), mask=element < count)


def _prepare(input: torch.Tensor, p: float, seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the arguments; the input, dense, and a result like it."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    check_tensors("dropout", input)
    check(seed.numel() == 1 and seed.dtype == torch.int64, "dropout: seed must be one int64")
    check(seed.device == input.device, "dropout: seed must be on the input's device")
    volume = input.dim() == 5 and input.is_contiguous(memory_format=torch.channels_last_3d)
    x = input if volume else dense(input)
    return x, torch.empty_like(x)


def feature_dropout(input: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Launches dropout of the channels of [N, C, ...], as of the elements of a tensor [N, C]."""
    x, output = _prepare(input, p, seed)
    check(input.dim() >= 2, "Feature dropout requires at least 2 dimensions in the input")
    if x.numel() == 0:
        return output
    if p == 1.0:
        return output.zero_()
    features = x.shape[0] * x.shape[1]
    factors = dropout(torch.ones(features, dtype=accumulator_dtype(x.dtype), device=x.device), p, seed)
    config = configs.elementwise(x)
    launch(
        feature_dropout_kernel, (triton.cdiv(x.numel(), config["BLOCK"]),), x, factors, output, x.numel(), x.shape[1],
        x.numel() // features, CHANNELS_LAST=not x.is_contiguous(), ACC=accumulator(x.dtype), **config,
    )
    return output


def dropout(input: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Launches dropout over the elements in memory order."""
    x, output = _prepare(input, p, seed)
    if x.numel() == 0:
        return output
    if p == 1.0:
        return output.zero_()
    config = configs.elementwise(x)
    counters = triton.cdiv(x.numel(), 4096) * 1024
    launch(
        dropout_kernel, (triton.cdiv(counters, config["BLOCK"]),), x, output, seed, x.numel(), 1.0 / (1.0 - p),
        int(p * 2**32) - 2**31, ACC=accumulator(x.dtype), **config,
    )
    return output
