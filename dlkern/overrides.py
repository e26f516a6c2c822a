"""enabled(): torch.nn.functional's calls on dlkern's kernels, for code that is not made of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

import dlkern.nn.functional as F
from dlkern.nn.functional.dropout import feature_dropout

__all__ = ["enabled"]


# torch's lower-level forms, whose arguments come in another order than torch.nn.functional's.


def _max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    return F.max_pool2d(input, kernel_size, stride if stride else None, padding, dilation, ceil_mode)


def _max_pool2d_with_indices(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=True
):
    return F.max_pool2d(input, kernel_size, stride if stride else None, padding, dilation, ceil_mode, True)


def _max_pool1d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    return F.max_pool1d(input, kernel_size, stride if stride else None, padding, dilation, ceil_mode)


def _max_pool1d_with_indices(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=True):
    return F.max_pool1d(input, kernel_size, stride if stride else None, padding, dilation, ceil_mode, True)


def _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _dropout(input, p, train):
    return F.dropout(input, p, train)


def _dropout_(input, p, train):
    return F.dropout(input, p, train, inplace=True)


def _feature_dropout(input, p, train):
    return feature_dropout(input, p, train)


def _feature_dropout_(input, p, train):
    return input.copy_(feature_dropout(input, p, train))


def _embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return F.embedding(indices, weight, padding_idx if padding_idx >= 0 else None, None, 2.0, scale_grad_by_freq, sparse)


_REDUCTIONS = ("none", "mean", "sum")  # by the numbers of at::Reduction


def _cross_entropy_loss(self, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0):
    return F.cross_entropy(
        self, target, weight, ignore_index=ignore_index, reduction=_REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )  # fmt: skip


def _addmm(*args, **kwargs):
    """Where it is a linear layer, as transformers' Conv1D writes one: a bias and two matrices."""
    if len(args) == 3 and not kwargs and all(isinstance(x, torch.Tensor) and x.layout == torch.strided for x in args):
        bias, input, weight = args
        fits = input.dim() == weight.dim() == 2 and input.shape[1] == weight.shape[0] and bias.shape == weight.shape[1:]
        if fits and input.is_floating_point():
            return F.linear(input, weight.t(), bias)
    return torch.addmm(*args, **kwargs)


_Function = Callable[..., Any]


def _table() -> dict[_Function, _Function]:
    """torch's function -> ours, for every function dlkern.nn.functional has, under every name torch has for it."""
    table: dict[_Function, _Function] = {}
    for name in F.__all__:
        theirs = getattr(torch.nn.functional, name, None)
        if theirs is not None:
            table[theirs] = getattr(F, name)
    return table | {
        torch.max_pool2d: _max_pool2d,
        torch._C._nn.max_pool2d_with_indices: _max_pool2d_with_indices,
        torch.nn.functional.max_pool2d_with_indices: _max_pool2d_with_indices,
        torch.max_pool1d: _max_pool1d,
        torch.max_pool1d_with_indices: _max_pool1d_with_indices,
        torch.nn.functional.max_pool1d_with_indices: _max_pool1d_with_indices,
        torch.adaptive_max_pool1d: F.adaptive_max_pool1d_with_indices,
        torch._C._nn.adaptive_max_pool2d: F.adaptive_max_pool2d_with_indices,
        torch.batch_norm: _batch_norm,
        torch.dropout: _dropout,
        torch.embedding: _embedding,
        torch.addmm: _addmm,
        torch.Tensor.addmm: _addmm,
        torch.lstm: F.lstm,
        torch.gru: F.gru,
        torch.rnn_tanh: F.rnn_tanh,
        torch.rnn_relu: F.rnn_relu,
        torch.dropout_: _dropout_,
        torch.feature_dropout: _feature_dropout,
        torch.feature_dropout_: _feature_dropout_,
        torch._C._nn.adaptive_avg_pool2d: F.adaptive_avg_pool2d,
        torch._C._nn.cross_entropy_loss: _cross_entropy_loss,
    }


_TABLE = _table()

# Tensors that leave torch functions as they are: what types may hold without anybody else having a say.
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _edges(tensors, gradients):
    """`tensors` as gradient edges and their gradients filled in, or None where torch is to say what is wrong."""
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    if gradients is None or isinstance(gradients, torch.Tensor):
        gradients = (gradients,) * len(tensors)
    if len(gradients) != len(tensors):
        return None
    for t, g in zip(tensors, gradients):
        if not t.requires_grad or (t.numel() != 1 or t.is_complex() if g is None else g.shape != t.shape):
            return None
    filled = tuple(torch.ones_like(t) if g is None else g for t, g in zip(tensors, gradients))
    return tuple(get_gradient_edge(t) for t in tensors), filled


class _Enabled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = _TABLE.get(func)
        backward = func in (torch.Tensor.backward, torch.autograd.backward) and kwargs.get("inputs") is None
        # Tensor subclasses and fx proxies among the arguments know themselves what to do.
        if (ours is None and not backward) or not all(t in _PLAIN for t in types):
            return func(*args, **kwargs)
        if backward:
            # torch leaves the mode while it runs an intercepted backward, and checkpointed forwards that run again
            # in it would be torch's. On gradient edges instead of tensors there is nothing to intercept.
            edges = _edges(args[0], kwargs.get("gradient", kwargs.get("grad_tensors")))
            if edges is not None:
                retain, create = kwargs.get("retain_graph"), kwargs.get("create_graph", False)
                with self:
                    return torch.autograd.backward(edges[0], edges[1], retain, create)
        return (ours or func)(*args, **kwargs)


def enabled() -> TorchFunctionMode:
    """A context manager: inside, torch.nn.functional's functions run on dlkern, wherever they are called from.

    Covers every function of dlkern.nn.functional, under all names torch has for it (torch.conv2d,
    torch.nn.functional.conv2d, an alias imported earlier …), also inside torch.nn modules and under torch.compile; and
    torch.addmm where it is a linear layer.
    Holds for the calling thread, and costs about 1 µs on every torch call inside.

    A backward pass may be called inside or outside. Only where it runs forwards again, under checkpointing, must
    `loss.backward()` stand inside, too (torch.autograd.grad leaves the mode before it runs; checkpoint then says
    that the two forwards differ).

    Example:
        >>> with dlkern.enabled():
        ...     y = torch.nn.functional.conv2d(x, weight)
    """
    return _Enabled()
