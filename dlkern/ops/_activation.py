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

    @classmethod
    def of(cls, value: Activation | str) -> Activation:
        """The activation itself or the one of that name, "relu" for RELU; ValueError for any other."""
        if isinstance(value, str):
            if value.upper() not in cls.__members__:
                raise ValueError(f"no activation {value!r}, expected one of {[name.lower() for name in cls.__members__]}")
            return cls[value.upper()]
        return cls(value)
