"""Softmax cross-entropy in plain torch expressions."""

from __future__ import annotations

import torch

__all__ = ["cross_entropy", "cross_entropy_backward", "probabilities", "probabilities_backward"]

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, sample_weight: torch.Tensor | None,
    reduction: int, ignore_index: int, label_smoothing: float,
) -> torch.Tensor:
    """torch's own cross_entropy, with its reduction by number; with sample_weight, each place's loss is multiplied by its
    own, and so is its share in what a mean is divided by."""
    if sample_weight is not None:
        each = cross_entropy(input, target, weight, None, 0, ignore_index, label_smoothing) * sample_weight
        if reduction == 0:
            return each
        if reduction == 2:
            return each.sum()
        chosen, _ = _chosen(input, target, weight, ignore_index)
        return each.sum() / (chosen.squeeze(1) * sample_weight).sum()
    return torch.nn.functional.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
    )


def _chosen(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of each place's class, zero where it is ignored, and the class, 0 where ignored: [N, 1, ...]."""
    valid = target != ignore_index
    index = torch.where(valid, target, torch.zeros_like(target)).unsqueeze(1)
    w = torch.ones(input.shape[1], dtype=input.dtype, device=input.device) if weight is None else weight
    return w[index] * valid.unsqueeze(1), index


def cross_entropy_backward(
    grad_loss: torch.Tensor, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None,
    sample_weight: torch.Tensor | None, reduction: int, ignore_index: int, label_smoothing: float,
) -> torch.Tensor:
    """Gradient for the logits: g_i (p (v_t + s W) - v_t onehot(t) - s w), with v_t = (1 - e) w[t], s = e / C and
    W = sum(w); zero where the target is ignored. A place's own weight is a factor of its g."""
    classes = input.shape[1]
    valid = target != ignore_index
    shape = (1, classes) + (1,) * (input.dim() - 2)
    w = torch.ones(classes, dtype=input.dtype, device=input.device) if weight is None else weight
    chosen, index = _chosen(input, target, weight, ignore_index)
    grad = grad_loss
    if reduction == 1:
        grad = grad_loss / (chosen if sample_weight is None else chosen * sample_weight.unsqueeze(1)).sum()
    grad = (grad.unsqueeze(1) if reduction == 0 else grad) * valid.unsqueeze(1)
    if sample_weight is not None:
        grad = grad * sample_weight.unsqueeze(1)
    spread = label_smoothing / classes if classes else 0.0
    one_hot = torch.zeros_like(input).scatter(1, index, torch.ones_like(index, dtype=input.dtype))
    probability = torch.softmax(input, 1)
    along_target = (1.0 - label_smoothing) * chosen
    result = probability * (along_target + spread * w.sum()) - along_target * one_hot - spread * w.reshape(shape)
    return torch.where(valid.unsqueeze(1), grad * result, torch.zeros_like(result))


def probabilities(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, label_smoothing: float
) -> torch.Tensor:
    """torch's own cross_entropy of class probabilities, with its reduction by number."""
    return torch.nn.functional.cross_entropy(
        input, target, weight, reduction=REDUCTIONS[reduction], label_smoothing=label_smoothing
    )


def probabilities_backward(
    grad_loss: torch.Tensor, input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for logits and targets: g_i (p sum(v) - v) and -(1 - e) g_i w log p, v = ((1 - e) t + e / C) w."""
    classes = input.shape[1]
    grad = grad_loss.unsqueeze(1) if reduction == 0 else grad_loss
    if reduction == 1:
        grad = grad / (input.numel() // classes)
    w = 1.0 if weight is None else weight.reshape(1, classes, *(1,) * (input.dim() - 2))
    v = ((1.0 - label_smoothing) * target + label_smoothing / classes) * w
    log_p = torch.log_softmax(input, 1)
    return grad * (log_p.exp() * v.sum(1, keepdim=True) - v), grad * w * log_p * (label_smoothing - 1.0)
