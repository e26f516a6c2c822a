"""dropout in plain torch expressions: Philox-4x32-10 on int64 tensors (csrc/philox.h has the contract)."""

from __future__ import annotations

import torch

from dlkern._layout import is_channels_last

__all__ = ["dropout", "feature_dropout", "philox_words", "philox_words_of"]

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_RUN, _GROUP = 1024, 4096


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product, in int64 without overflow (16 bits of b at a time)."""
    low_part = a * (b & 0xFFFF)
    high_part = a * (b >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox_words_of(counter: torch.Tensor, word: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Word `word` (0 to 3) of the block of each counter, as int64; word has the shape of the counters."""
    c0, c1 = counter & _MASK, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed.reshape(()) & _MASK, (seed.reshape(()) >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER[0])
        high1, low1 = _multiply(c2, _MULTIPLIER[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3]).gather(0, word[None])[0]


def philox_words(count: int, seed: torch.Tensor) -> torch.Tensor:
    """The 32-bit word of each of `count` elements in memory order, as int64 [count]."""
    i = torch.arange(count, device=seed.device)
    return philox_words_of(i // _GROUP * _RUN + i % _RUN, i // _RUN % 4, seed)


def dropout(input: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Zeroes each element with probability p and scales the rest by 1 / (1 - p)."""
    if p == 1.0:
        return input * 0.0
    keep = philox_words(input.numel(), seed) >= int(p * 2**32)
    if is_channels_last(input):
        n, c, h, w = input.shape
        keep = keep.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return torch.where(keep.reshape(input.shape), input * (1.0 / (1.0 - p)), torch.zeros_like(input))


def feature_dropout(input: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Zeroes each channel of [N, C, ...] with probability p and scales the rest by 1 / (1 - p)."""
    if p == 1.0:
        return input * 0.0
    n, c, *rest = input.shape
    keep = (philox_words(n * c, seed) >= int(p * 2**32)).reshape(n, c, *(1,) * len(rest))
    return torch.where(keep, input * (1.0 / (1.0 - p)), torch.zeros_like(input))
