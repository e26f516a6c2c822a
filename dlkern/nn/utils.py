"""torch.nn.utils' gradient clipping on dlkern's kernels: all gradients in one pass, or two."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable

import torch

from dlkern.ops import optim as ops
from dlkern.reference import optim as reference

__all__ = ["clip_grad_norm_", "clip_grad_value_"]


def _gradients(op: str, parameters: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], str]:
    """The gradients there are, and the column that serves them."""
    grads = [p.grad for p in parameters if p.grad is not None]
    reason = next((why for why in map(ops.refusal, grads) if why), "")
    if not reason and len({g.device for g in grads}) > 1:
        reason = "gradients on several devices"
    return grads, ops.choose(op, grads, reason=reason) if grads else ""


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0,
    error_if_nonfinite: bool = False, foreach: bool | None = None,
) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_: scales the gradients in place so that their norm is at most max_norm.

    Norms are summed in double by blocks in a fixed order: the same bits every time. Gradients that need no scaling are
    not written. On a GPU nothing waits for the norm but error_if_nonfinite. `foreach` changes nothing.

    Args:
        parameters: tensors (or one) whose .grad is scaled; those without one are skipped.
        max_norm: the largest norm allowed.
        norm_type: p, inf or -inf, of all elements together (0: the number of gradients that are not all zero, as torch
            has it).
        error_if_nonfinite: raise where the norm is NaN or infinite, before anything is written.

    Returns:
        The norm before, a scalar in the gradients' common dtype. Formula: g *= min(1, max_norm / (norm + 1e-6)).

    Raises:
        RuntimeError: error_if_nonfinite, or a gradient without elements and an order that it has no norm of.
    """
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    max_norm, norm_type = float(max_norm), float(norm_type)
    grads, column = _gradients("clip_grad_norm_", parameters)
    if not grads:
        return torch.tensor(0.0)
    if column == "reference":
        return reference.clip_grad_norm(grads, max_norm, norm_type, error_if_nonfinite)
    total = ops.raw_op("clip_grad_norm", column)(grads, max_norm, norm_type, error_if_nonfinite)
    torch.autograd.graph.increment_version(grads)
    return total


@torch.no_grad()
def clip_grad_value_(
    parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """torch.nn.utils.clip_grad_value_: clamps the gradients in place to [-clip_value, clip_value]; NaN stays NaN.

    `foreach` changes nothing.
    """
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    clip_value = float(clip_value)
    grads, column = _gradients("clip_grad_value_", parameters)
    if not grads:
        return
    if column == "reference":
        reference.clip_grad_value(grads, clip_value)
    else:
        ops.raw_op("clip_grad_value", column)(grads, clip_value)
        torch.autograd.graph.increment_version(grads)
