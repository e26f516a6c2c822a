"""Softmax cross-entropy in plain torch expressions."""

from __future__ import annotations

import torch

__all__ = ["cross_entropy", "cross_entropy_backward"]

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """torch's own cross_entropy, with its reduction by number."""
    return torch.nn.functional.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )


def cross_entropy_backward(
    grad_loss: torch.Tensor, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int,
    ignore_index: int, label_smoothing: float,
) -> torch.Tensor:
    """Gradient for the logits: g_i (p (v_t + s W) - v_t onehot(t) - s w), with v_t = (1 - e) w[t], s = e / C and
    W = sum(w); zero where the target is ignored."""
    classes = input.shape[1]
    valid = target != ignore_index
    index = torch.where(valid, target, torch.zeros_like(target)).unsqueeze(1)  # [N, 1, ...]
    shape = (1, classes) + (1,) * (input.dim() - 2)
    w = torch.ones(classes, dtype=input.dtype, device=input.device) if weight is None else weight
    chosen = w[index] * valid.unsqueeze(1)  # [N, 1, ...], zero where ignored
    grad = grad_loss
    if reduction == 1:
        grad = grad_loss / chosen.sum()
    grad = (grad.unsqueeze(1) if reduction == 0 else grad) * valid.unsqueeze(1)
    spread = label_smoothing / classes if classes else 0.0
    one_hot = torch.zeros_like(input).scatter(1, index, torch.ones_like(index, dtype=input.dtype))
    probability = torch.softmax(input, 1)
    along_target = (1.0 - label_smoothing) * chosen
    result = probability * (along_target + spread * w.sum()) - along_target * one_hot - spread * w.reshape(shape)
    return torch.where(valid.unsqueeze(1), grad * result, torch.zeros_like(result))
