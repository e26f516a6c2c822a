"""cross_entropy with torch.nn.functional's signature, and perplexity."""

from __future__ import annotations

import torch
from torch.nn import _reduction

from dlkern import ops, reference
from dlkern import trace as tracing
from dlkern.nn.functional._autocast import autocasts
from dlkern.ops import _plain

__all__ = ["cross_entropy", "perplexity"]

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _unusual(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, label_smoothing: float
) -> str | None:
    """What of a call is outside our kernels (torch takes it, or raises its own error), or None."""
    dims = input.dim()
    if target.is_floating_point():
        if target.shape != input.shape or target.dtype != input.dtype or 0 in input.shape or dims == 0 or ignore_index >= 0:
            return "probabilities are not of input's shape and dtype, or empty, or there is an ignore_index"
    elif target.dtype != torch.int64:
        return f"no kernel for targets of {str(target.dtype).removeprefix('torch.')}"
    elif dims == 0 or target.dim() != max(dims - 1, 0) or not input.is_floating_point():
        return "input is not [C] or [N, C, ...] with a target of [] or [N, ...]"
    elif dims > 1 and (input.size(0) != target.size(0) or input.shape[2:] != target.shape[1:]):
        return "input and target differ in size"
    if input.device != target.device:
        return "input and target are on different devices"
    if weight is not None:
        if weight.dtype != input.dtype or weight.device != input.device or weight.requires_grad:
            return "weight differs from input in dtype or device, or requires grad"
        if weight.dim() != 1 or weight.size(0) != input.size(0 if dims == 1 else 1):
            return "weight is not [C]"
    if label_smoothing > 1.0:
        return "label_smoothing is over 1"
    return None


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch.nn.functional.cross_entropy and, beyond it, weights of single positions: softmax
    cross-entropy of logits, without stored probabilities.

    Args:
        input: logits [C], [N, C] or [N, C, d1, ...].
        target: int64 class indices [], [N] or [N, d1, ...] (uint8 ones run on torch's own op); or probabilities of the
            classes, in input's shape and dtype, which may require a gradient.
        weight: [C], the weight of each class.
        size_average, reduce: deprecated, as in torch.
        ignore_index: positions with this target count for nothing; their gradient is zero.
        reduction: "none", "mean" (weighted by `weight`) or "sum".
        label_smoothing: share of the target that is spread evenly over the classes.
        sample_weight: of target's shape in input's dtype, the weight of each position, as in importance-weighted
            training; only with class indices. (If it requires a gradient, plain torch expressions serve the call.)

    Returns:
        A scalar, or a tensor of target's shape with reduction "none". Position i contributes
        s[i] (-(1 - e) w[t] log p[t] - e / C sum_c w[c] log p[c]), p = softmax(input), w = weight, s = sample_weight; "mean"
        divides the sum by that of s[i] w[t]. With probabilities t it is -sum_c ((1 - e) t[c] + e / C) w[c] log p[c], and
        "mean" divides by the number of positions.

    Raises:
        IndexError: a target is outside [0, C) and not ignore_index; on a GPU, where looking at the targets would wait
            for it, such a target gives NaN (torch fails an assertion on the device).
        RuntimeError: probabilities with an ignore_index of 0 or more.
        RuntimeError, ValueError: sizes, dtypes or arguments do not fit; torch's own messages, but for sample_weight.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    try:
        column = _plain.column("cross_entropy", input)
        learned = (weight is not None and weight.requires_grad) or (sample_weight is not None and sample_weight.requires_grad)
        if column is not None and not learned:
            code = _REDUCTIONS[reduction]
            if not target.is_floating_point():
                return ops.loss.run(column, input, target, weight, sample_weight, code, ignore_index, label_smoothing)
            if ignore_index < 0 and sample_weight is None:
                return ops.loss.run_probabilities(column, input, target, weight, code, label_smoothing)
    except (*_plain.REFUSALS, KeyError):
        pass  # the long way says what is wrong
    try:
        if autocasts(input):  # on autocast's float32 list
            input = _widen(input)
            target = _widen(target)
            weight = _widen(weight) if weight is not None else None
            sample_weight = _widen(sample_weight) if sample_weight is not None else None
        reason = _unusual(input, target, weight, ignore_index, label_smoothing)
    except AttributeError:  # not tensors: torch says which
        reason = "not tensors"
    if reason is None:
        code = _reduction.get_enum(reduction)
        smoothing = max(label_smoothing, 0.0)  # torch ignores negative ones
        if target.is_floating_point():
            if sample_weight is not None:
                raise ValueError("cross_entropy: sample_weight is only for class indices")
            batched = (input, target) if input.dim() > 1 else (input[None], target[None])
            loss = ops.loss.probabilities(*batched, weight, code, smoothing)
            return loss[0] if input.dim() == 1 and code == 0 else loss
        if sample_weight is not None:
            _check_sample_weight(sample_weight, input, target)
            if sample_weight.requires_grad:
                return _with_learned_weights(input, target, weight, code, ignore_index, smoothing, sample_weight)
        if input.dim() == 1:
            alone = None if sample_weight is None else sample_weight[None]
            loss = ops.loss.cross_entropy(input[None], target[None], weight, code, ignore_index, smoothing, alone)
            return loss[0] if code == 0 else loss
        return ops.loss.cross_entropy(input, target, weight, code, ignore_index, smoothing, sample_weight)
    loss = torch.nn.functional.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if sample_weight is not None:
        raise ValueError(f"cross_entropy: sample_weight cannot be served where {reason}")
    if tracing.active:
        tracing.record("cross_entropy", "torch", reason, input, target, weight)
    return loss


def _check_sample_weight(sample_weight: torch.Tensor, input: torch.Tensor, target: torch.Tensor) -> None:
    if not isinstance(sample_weight, torch.Tensor) or sample_weight.shape != target.shape:
        given = tuple(sample_weight.shape) if isinstance(sample_weight, torch.Tensor) else type(sample_weight).__name__
        raise ValueError(f"cross_entropy: expected sample_weight of target's shape {tuple(target.shape)}, got {given}")
    if sample_weight.dtype != input.dtype or sample_weight.device != input.device:
        raise ValueError(
            f"cross_entropy: expected sample_weight in input's {input.dtype} on {input.device}, got {sample_weight.dtype} on "
            f"{sample_weight.device}"
        )


def _with_learned_weights(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignore_index: int,
    label_smoothing: float, sample_weight: torch.Tensor,
) -> torch.Tensor:
    """cross_entropy whose sample_weight gets a gradient: on the reference."""
    if tracing.active:
        tracing.record("cross_entropy", "reference", "sample_weight requires grad", input, target, weight)
    if input.dim() > 1:
        return reference.loss.cross_entropy(
            input, target, weight, sample_weight, reduction, ignore_index, label_smoothing
        )
    loss = reference.loss.cross_entropy(
        input[None], target[None], weight, sample_weight[None], reduction, ignore_index, label_smoothing
    )
    return loss[0] if reduction == 0 else loss


def perplexity(input: torch.Tensor, target: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Perplexity of a language model's predictions: exp of the mean cross-entropy over the tokens that count.

    Args:
        input: logits [C], [N, C] or [N, C, d1, ...], C the size of the vocabulary.
        target: int64 tokens [], [N] or [N, d1, ...].
        ignore_index: positions with this target do not count.

    Returns:
        A scalar in input's dtype, exp(-1/n sum_i log p(target_i)) over the n positions that count: 1 where every token was
        certain, C where all were equally likely. NaN where none counts. Differentiable.

    Raises:
        IndexError, RuntimeError, ValueError: as cross_entropy.
    """
    return cross_entropy(input, target, ignore_index=ignore_index).exp()


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
