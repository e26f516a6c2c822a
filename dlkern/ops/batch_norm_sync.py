"""Batch norm over the batches of several processes, from the ops of batch_norm.py and two exchanges of a few numbers.

Forward: each process finds its count, means and sums of squared deviations; all of them are gathered and merged by
count (Chan et al. 1983), in the order of ranks, so that every process computes the same bits; the merged statistics
then serve as frozen ones. Backward: with frozen statistics a gradient is grad_output scaled, and its sums over all
processes give what the statistics' own dependence on the input takes off again, which is batch norm of the input with
other parameters. A process may hold no image at all. Both passes read the input once more than one process needs to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dlkern import columns
from dlkern import trace as tracing
from dlkern.ops._registry import raw
from dlkern.reference import batch_norm as reference

__all__ = ["sync_batch_norm"]

_NO_ACTIVATION = 0


def _gather(values: torch.Tensor, group: Any) -> torch.Tensor:
    """values of every process, [processes, ...], in the order of ranks."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.stack(parts)


def _parameter_dtype(input: torch.Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _local_statistics(input: torch.Tensor, count: int, eps: float, column: str) -> torch.Tensor:
    """[3, C] in float64: how many elements a channel, their mean and their sum of squared deviations."""
    channels = input.shape[1]
    found = torch.zeros(3, channels, dtype=torch.float64, device=input.device)
    found[0] = count
    if count == 1:
        found[1] = input.detach().reshape(channels)
    elif count > 1:
        none = torch.zeros(channels, dtype=_parameter_dtype(input), device=input.device)
        args = (input.detach(), None, None, None, none, none, 1.0, eps, _NO_ACTIVATION)
        if column == "reference":
            _, mean, unbiased = reference.batch_norm_train(*args)
        else:
            *_, mean, unbiased = raw["batch_norm_train_forward"][column](*args)
        found[1], found[2] = mean, unbiased.double() * (count - 1)
    return found


def _frozen(column, input, residual, weight, bias, mean, var, eps):
    """Batch norm of input with given statistics, plus residual."""
    args = (input, residual, weight, bias, mean, var, eps, _NO_ACTIVATION)
    return reference.batch_norm_eval(*args) if column == "reference" else raw["batch_norm_eval_forward"][column](*args)[0]


def _frozen_backward(column, grad_output, input, weight, mean, invstd, eps):
    """Its gradients by input, weight and bias."""
    args = (grad_output, input, None, weight, mean, invstd, False, _NO_ACTIVATION)
    if column == "reference":
        return reference.batch_norm_backward(*args, eps)[:3]
    return raw["batch_norm_backward"][column](*args, False)[:3]


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, mean, var, total, eps, group, column):
        dtype = _parameter_dtype(input)
        weight_, bias_ = (None if p is None else p.detach().to(dtype) for p in (weight, bias))
        ctx.save_for_backward(input, weight, mean, var, total)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.settings = eps, group, column
        if input.numel() == 0:
            return torch.empty_like(input)
        return _frozen(column, input, None, weight_, bias_, mean.to(dtype), var.to(dtype), eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        input, weight, mean, var, total = ctx.saved_tensors
        eps, group, column = ctx.settings
        dtype, channels = _parameter_dtype(input), input.shape[1]
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        # 16-bit gradients are rounded once, at the end.
        x, grad = input.to(dtype), grad_output.to(dtype)
        scale = torch.ones(channels, dtype=dtype, device=input.device) if weight is None else weight.detach().to(dtype)
        mean_, var_ = mean.to(dtype), var.to(dtype)
        invstd = torch.rsqrt(var_.double() + eps)
        if input.numel() == 0:
            grad_input, sums = torch.empty_like(x), torch.zeros(2, channels, dtype=dtype, device=input.device)
        else:
            grad_input, *sums_ = _frozen_backward(column, grad, x, scale, mean_.double(), invstd, eps)
            sums = torch.stack(sums_)  # of grad * normalised input, and of grad
        if need_input:
            shares = _gather(sums.double(), group).sum(0) / total * (scale.double() * invstd)
            if input.numel():
                slope, offset = (-shares).to(dtype)
                grad_input = _frozen(column, x, grad_input, slope, offset, mean_, var_, eps)
        return (
            grad_input.to(input.dtype) if need_input else None,
            sums[0].to(weight.dtype) if need_weight else None,
            sums[1].to(ctx.bias_dtype) if need_bias else None,
            *(None,) * 6,
        )


def sync_batch_norm(
    input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None, momentum: float, eps: float, group: Any,
) -> torch.Tensor:
    """Batch norm in training, by the statistics of every process of `group`; moves running_mean and running_var.

    Every process has to call it, forward and backward, with the same number of channels; weight's and bias's gradients
    are those of the process's own part of the batch, as in torch.
    """
    choice = columns.choose(
        "batch_norm", input.device.type, input.dtype, columns.state.forced, columns.state.emulated
    )
    if tracing.active:
        tracing.record("batch_norm", choice.column, choice.reason, input, weight, bias)
    count = input.numel() // input.shape[1]
    counts, means, squares = _gather(_local_statistics(input, count, eps, choice.column), group).unbind(1)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    deviations = (squares + counts * (means - mean).square()).sum(0)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = deviations / (total - 1).clamp(min=1)
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                moved = running.double() + momentum * (new - running.double())
                running.copy_(torch.where(total > 0, moved, running.double()))
    return _SyncBatchNorm.apply(input, weight, bias, mean, deviations / total, total, eps, group, choice.column)
