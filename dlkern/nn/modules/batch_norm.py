"""Batch norm modules. Their forward is torch's, line for line in effect: which statistics, which momentum, when
num_batches_tracked counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dlkern import ops
from dlkern.nn import functional as F
from dlkern.ops._activation import Activation

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d", "SyncBatchNorm",
]  # fmt: skip


class _Statistics(NamedTuple):
    """What a call normalises by, and which buffers it moves."""

    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    training: bool
    momentum: float


def _statistics(self: torch.nn.modules.batchnorm._BatchNorm) -> _Statistics:
    momentum = 0.0 if self.momentum is None else self.momentum
    if self.training and self.track_running_stats and self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # a cumulative average: the mean over all batches so far
            momentum = 1.0 / float(self.num_batches_tracked)
    # Without buffers the batch's own statistics serve in evaluation too; buffers that are not tracked stay as they are.
    training = self.training or (self.running_mean is None and self.running_var is None)
    use_buffers = not self.training or self.track_running_stats
    running = (self.running_mean, self.running_var) if use_buffers else (None, None)
    return _Statistics(*running, training, momentum)


def _forward(
    self: torch.nn.modules.batchnorm._BatchNorm, input: torch.Tensor, *, activation: Activation | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch.nn's forward; with the keywords, which torch has not, activation(batch_norm(input) + residual)."""
    self._check_input_dim(input)
    mean, var, training, momentum = _statistics(self)
    if activation is None and residual is None:
        return F.batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps)
    return F.batch_norm_act(
        input, mean, var, self.weight, self.bias, training, momentum, self.eps, activation=activation, residual=residual
    )


class BatchNorm1d(torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d on dlkern's kernels."""

    forward = _forward


class BatchNorm2d(torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d on dlkern's kernels."""

    forward = _forward


class BatchNorm3d(torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d on dlkern's kernels."""

    forward = _forward


class LazyBatchNorm1d(torch.nn.LazyBatchNorm1d):
    """torch.nn.LazyBatchNorm1d; becomes dlkern's BatchNorm1d on the first call."""

    cls_to_become = BatchNorm1d
    forward = _forward


class LazyBatchNorm2d(torch.nn.LazyBatchNorm2d):
    """torch.nn.LazyBatchNorm2d; becomes dlkern's BatchNorm2d on the first call."""

    cls_to_become = BatchNorm2d
    forward = _forward


class LazyBatchNorm3d(torch.nn.LazyBatchNorm3d):
    """torch.nn.LazyBatchNorm3d; becomes dlkern's BatchNorm3d on the first call."""

    cls_to_become = BatchNorm3d
    forward = _forward


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm on dlkern's kernels, on CPU tensors as well.

    In training, inside a process group of several, normalises by the statistics of all processes' batches, which may
    differ in size or be empty; otherwise it is batch norm. DistributedDataParallel refuses to wrap a SyncBatchNorm whose
    parameters are on the CPU; wrap first there, then SyncBatchNorm.convert_sync_batchnorm(wrapped.module), which keeps the
    parameters and buffers themselves (examples/distributed.py).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        mean, var, training, momentum = _statistics(self)
        distributed = torch.distributed
        if self.training and distributed.is_available() and distributed.is_initialized():
            group = self.process_group or distributed.group.WORLD
            if distributed.get_world_size(group) > 1:
                return ops.batch_norm_sync.sync_batch_norm(
                    input, self.weight, self.bias, mean, var, momentum, self.eps, group
                )
        return F.batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """torch.nn.SyncBatchNorm.convert_sync_batchnorm, to this class."""
        converted = super().convert_sync_batchnorm(module, process_group)
        for part in converted.modules():
            if type(part) is torch.nn.SyncBatchNorm:
                part.__class__ = cls
        return converted
