"""Batch norm with torch.nn.functional's signature, and batch_norm_act, which adds a residual and an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function

from dlkern import ops
from dlkern import trace as tracing
from dlkern.ops import _plain
from dlkern.ops._activation import Activation
from dlkern.reference.linear import activate

__all__ = ["batch_norm", "batch_norm_act"]

_REDUCED = (torch.bfloat16, torch.float16)


def _reason_for_torch(input: Any, *parameters: torch.Tensor | None) -> str | None:
    """Why a call goes to torch's own batch_norm (which refuses it), or None."""
    if not isinstance(input, torch.Tensor) or not input.is_floating_point() or input.dim() < 2:
        return "input is not floating-point [N, C, ...]"
    present = [p for p in parameters if p is not None]
    if any(not isinstance(p, torch.Tensor) or p.numel() != input.shape[1] for p in present):
        return "a parameter or running statistic does not have one element a channel"
    dtypes = {p.dtype for p in present}
    if dtypes and dtypes != {input.dtype} and not (dtypes == {torch.float32} and input.dtype in _REDUCED):
        return "parameters are neither in input's dtype nor in float32 beside a 16-bit input"
    if any(p.device != input.device for p in present):
        return "tensors on several devices"
    return None


def batch_norm(
    input: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> torch.Tensor:
    """torch.nn.functional.batch_norm.

    Args:
        input: [N, C] or [N, C, ...].
        running_mean, running_var: [C], used when not training, and moved by `momentum` towards the batch's mean and
            unbiased variance when training; may be None then.
        weight, bias: [C] or None; float32 or input's dtype, as the statistics.
        training: normalise by the batch's own mean and biased variance.
        momentum: share of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        (input - mean) / sqrt(var + eps) * weight + bias, in input's dtype and memory format. Ioffe and Szegedy 2015,
        algorithm 1.

    Raises:
        ValueError: one value per channel when training; eps not positive when training, or negative; one running
            statistic without the other.
        RuntimeError: a parameter of another size or dtype; no statistics in evaluation.
    """
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps)


def batch_norm_act(
    input: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5, *, activation: Activation | str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(batch_norm(input) + residual) in one pass over memory; torch has no such function.

    Args:
        input, ..., eps: as in batch_norm.
        activation: dlkern.Activation (or its name) to apply at the end, or None.
        residual: tensor of input's shape and dtype that is added before the activation.

    Raises:
        ValueError: an unknown activation, a residual of another shape or dtype, and what batch_norm raises.
    """
    code = 0 if activation is None else int(Activation.of(activation))
    results = None
    try:
        column = _plain.column("batch_norm", input)
        if column is not None:
            results = ops.batch_norm.run(
                column, input, residual, weight, bias, running_mean, running_var, training, momentum, eps, code
            )
    except _plain.REFUSALS:
        pass  # the long way says what is wrong
    if results is not None:
        return _updated(results, training, running_mean, running_var)
    if _plain.overridden(input, residual, weight, bias):
        return handle_torch_function(
            batch_norm_act, (input, residual, weight, bias), input, running_mean, running_var, weight, bias, training,
            momentum, eps, activation=activation, residual=residual,
        )  # fmt: skip
    reason = _reason_for_torch(input, running_mean, running_var, weight, bias)
    if training or eps <= 0.0 or running_mean is None or running_var is None or reason is not None:
        reason = _check(input, running_mean, running_var, training, eps, reason)
    if residual is not None and reason is None:
        if residual.shape != input.shape or residual.dtype != input.dtype:
            raise ValueError(
                f"residual: expected {tuple(input.shape)} {input.dtype}, got {tuple(residual.shape)} {residual.dtype}"
            )
    if reason is not None:
        if tracing.active and isinstance(input, torch.Tensor):
            tracing.record("batch_norm", "torch", reason, input)
        output = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return activate(output if residual is None else output + residual, code)
    results = ops.batch_norm.batch_norm(
        input, residual, weight, bias, running_mean, running_var, training, momentum, eps, code
    )
    return _updated(results, training, running_mean, running_var)


def _updated(results, training, running_mean, running_var):
    """The output of (output, new running mean, new running variance), once the statistics are in their buffers."""
    output, new_mean, new_var = results
    if training and running_mean is not None:
        if new_mean.requires_grad:  # torch.jit.trace records raw ops, whose results all seem to depend on parameters
            new_mean, new_var = new_mean.detach(), new_var.detach()
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return output


def _check(input, running_mean, running_var, training, eps, reason):
    """torch's ValueErrors; the reason for which the call goes to torch, which raises the RuntimeErrors."""
    if training:
        if isinstance(input, torch.Tensor) and input.dim() >= 2:
            count = input.shape[0]
            for size in input.shape[2:]:
                count = count * size
            if count == 1:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if not training and (running_mean is None or running_var is None):
        return "no running statistics in evaluation"
    return reason
