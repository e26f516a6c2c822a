"""Autocast, as torch's dispatcher does it for the ops on its lower-precision list."""

from __future__ import annotations

import torch

__all__ = ["autocasts", "lowered"]


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device. Others than columns have (some, like meta, have no autocast) go
    on to torch, which looks for itself. (torch.amp.is_autocast_available would tell, but torch 2.11's Dynamo stops at it.)"""
    device = tensor.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def lowered(input: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in autocast's dtype where it is on for input's device: floating point but float64."""
    tensors = [input, *others]
    if not autocasts(input):
        return tensors
    dtype = torch.get_autocast_dtype(input.device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    ]
