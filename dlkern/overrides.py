"""enabled(): torch.nn.functional's calls on dlkern's kernels, for code that is not made of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import dlkern.nn.functional as F

__all__ = ["enabled"]


# torch's lower-level forms, whose arguments come in another order than torch.nn.functional's.


def _max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    return F.max_pool2d(input, kernel_size, stride if stride else None, padding, dilation, ceil_mode)


def _max_pool2d_with_indices(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=True
):
    return F.max_pool2d(input, kernel_size, stride if stride else None, padding, dilation, ceil_mode, True)


def _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _dropout(input, p, train):
    return F.dropout(input, p, train)


def _dropout_(input, p, train):
    return F.dropout(input, p, train, inplace=True)


_REDUCTIONS = ("none", "mean", "sum")  # by the numbers of at::Reduction


def _cross_entropy_loss(self, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0):
    return F.cross_entropy(
        self, target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )  # fmt: skip


def _table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch's function -> ours, for every function dlkern.nn.functional has."""
    table = {}
    for name in F.__all__:
        theirs = getattr(torch.nn.functional, name, None)
        if theirs is not None:
            table[theirs] = getattr(F, name)
    lower = {
        "max_pool2d": {
            torch.max_pool2d: _max_pool2d,
            torch.nn.functional.max_pool2d_with_indices: _max_pool2d_with_indices,
            torch._C._nn.max_pool2d_with_indices: _max_pool2d_with_indices,
        },
        "batch_norm": {torch.batch_norm: _batch_norm},
        "dropout": {torch.dropout: _dropout, torch.dropout_: _dropout_},
        "adaptive_avg_pool2d": {torch._C._nn.adaptive_avg_pool2d: getattr(F, "adaptive_avg_pool2d", None)},
        "cross_entropy": {torch._C._nn.cross_entropy_loss: _cross_entropy_loss},
    }
    for name, forms in lower.items():
        if name in F.__all__:
            table.update(forms)
    return table


_TABLE = _table()


class _Enabled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        # `types` names tensor subclasses and fx proxies among the arguments: those know themselves what to do.
        ours = None if types else _TABLE.get(func)
        return (func if ours is None else ours)(*args, **(kwargs or {}))


def enabled() -> TorchFunctionMode:
    """A context manager: inside, torch.nn.functional's functions run on dlkern, wherever they are called from.

    Covers every function of dlkern.nn.functional, under all names torch has for it (torch.conv2d,
    torch.nn.functional.conv2d, an alias imported earlier …), also inside torch.nn modules and under torch.compile.
    Holds for the calling thread. A backward pass needs it only where it runs forwards again: checkpointing.
    It costs about 1 µs on every torch call inside.

    Example:
        >>> with dlkern.enabled():
        ...     y = torch.nn.functional.conv2d(x, weight)
    """
    return _Enabled()
