"""The activations that ops fuse into their last step, by the number their schemas carry."""

from __future__ import annotations

import enum

__all__ = ["Activation"]


class Activation(enum.IntEnum):
    """An activation fused into an op. csrc/cpu/activation.h and the Triton kernels use the same numbers."""

    NONE = 0
    RELU = 1
    TANH = 2
    SIGMOID = 3
