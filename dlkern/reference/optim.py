"""LARS and gradient clipping in plain torch expressions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["clip_grad_norm", "clip_grad_value", "lars"]


def lars(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], momentum_buffers: Sequence[torch.Tensor],
    groups: Sequence[int], settings: Sequence[float],
) -> None:
    """One step of algorithm 1 of You, Gitman and Ginsburg 2017; arguments as of the raw op."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        rate, momentum, decay, trust, eps, maximize = settings[6 * groups[i] : 6 * groups[i] + 6]
        if trust >= 0:
            param_norm, grad_norm = float(param.double().norm()), float(grad.double().norm())
            if param_norm > 0 and grad_norm > 0:
                rate *= trust * param_norm / (grad_norm + decay * param_norm + eps)
        change = rate * ((-grad if maximize else grad) + decay * param)
        if momentum_buffers:
            momentum_buffers[i].mul_(momentum).add_(change)
            change = momentum_buffers[i]
        param.sub_(change)


def clip_grad_norm(
    grads: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> torch.Tensor:
    """Scales `grads` in place to a norm of at most max_norm; returns the norm before."""
    norms = [torch.linalg.vector_norm(grad, norm_type).to(grads[0].device) for grad in grads]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. "
            "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    for grad in grads:
        grad.mul_((max_norm / (total + 1e-6)).clamp(max=1.0).to(grad.device))
    return total


def clip_grad_value(grads: Sequence[torch.Tensor], clip_value: float) -> None:
    """Clamps `grads` in place to [-clip_value, clip_value]."""
    for grad in grads:
        grad.clamp_(min=-clip_value).clamp_(max=clip_value)
