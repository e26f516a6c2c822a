"""cross_entropy: softmax and negative log-likelihood in one pass, and its gradient.

Forward: one program takes a few positions and runs over their classes once, keeping a running maximum and a sum of
exponentials (online softmax), so that the probabilities are never stored; only the maximum and the logarithm of the
sum are kept for the backward, which recomputes them (apart, because their sum would round). Weights of classes and of
positions, label smoothing and ignored targets are part of the same pass.
Targets that are a probability for each class have kernels of their own, which also keep the sum of a position's weighted
targets, and read the classes once more, relative to their largest logit.
The sum over positions is made of one partial a program, added by one last program in a fixed order. A target outside
[0, C) that is not ignore_index gives NaN (the launcher raises where the targets are on the host: looking at them on a
GPU would wait for it). Floor: the logits read once forward, read and written once backward.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import (
    accumulator,
    accumulator_dtype,
    check,
    check_tensors,
    is_large,
    launch,
    suggests_channels_last,
)
from dlkern.ops._layout import memory_format


@triton.jit
def _target(target_ptr, weight_ptr, position, POSITIONS, C, ignore_index, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    # Targets of a program's positions, and their weights: 0 where ignored, NaN where there is no such class.
    target = tl.load(target_ptr + position, mask=position < POSITIONS, other=0)
    used = (position < POSITIONS) & (target != ignore_index)
    exists = (target >= 0) & (target < C)
    share = tl.where(used, 1.0, 0.0).to(ACC)
    if HAS_WEIGHT:
        share = tl.load(weight_ptr + target, mask=used & exists, other=0.0).to(ACC)
    share = tl.where(used & (exists == 0), float("nan"), share)
    return target, share, used, exists


@triton.jit
def _grown(x, most, total):
    # The largest logit and the sum of exponentials relative to it, with a further tile [BLOCK_M, BLOCK_C].
    higher = tl.maximum(most, tl.max(x, axis=1))
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, total * tl.exp(most - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)


@triton.jit
def cross_entropy_forward_kernel(
    x_ptr, target_ptr, weight_ptr, sample_weight_ptr, loss_ptr, lse_ptr, loss_parts_ptr, weight_parts_ptr,
    POSITIONS, C, PIXELS, stride_n, stride_pixel, stride_c, ignore_index, smoothing: tl.float64,
    HAS_WEIGHT: tl.constexpr, HAS_SAMPLE_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, REDUCE: tl.constexpr,
    ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_M positions, all their classes. position = n * PIXELS + pixel.
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if LARGE:
        position = position.to(tl.int64)
    row = x_ptr + (position // PIXELS * stride_n + position % PIXELS * stride_pixel)  # [BLOCK_M]
    target, share, used, exists = _target(target_ptr, weight_ptr, position, POSITIONS, C, ignore_index, HAS_WEIGHT, ACC)
    most = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    weighted = tl.zeros((BLOCK_M,), ACC)  # sum of weight * x, for label smoothing
    weights = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (position < POSITIONS)[:, None] & (c < C)[None, :]
        x = tl.load(row[:, None] + (c * stride_c)[None, :], mask=inside, other=-float("inf")).to(ACC)  # [BLOCK_M, BLOCK_C]
        most, total = _grown(x, most, total)
        if SMOOTH:
            class_weight = tl.where(c < C, 1.0, 0.0).to(ACC)
            if HAS_WEIGHT:
                class_weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)
            weighted += tl.sum(tl.where(inside, x, 0.0) * class_weight[None, :], axis=1)
            weights += tl.sum(class_weight, axis=0)
    log_total = tl.log(total)
    at_target = tl.load(row + target * stride_c, mask=used & exists, other=0.0).to(ACC)
    # A few numbers a position: in float64, so that the loss is rounded once.
    lse = most.to(tl.float64) + log_total.to(tl.float64)
    loss = share.to(tl.float64) * (lse - at_target.to(tl.float64))
    if SMOOTH:
        uniform = weights.to(tl.float64) * lse - weighted.to(tl.float64)
        loss = (1.0 - smoothing) * loss + (smoothing / C) * uniform
    if HAS_SAMPLE_WEIGHT:
        own = tl.load(sample_weight_ptr + position, mask=position < POSITIONS, other=0.0).to(ACC)
        loss = loss * own.to(tl.float64)
        share = tl.where(used, share * own, 0.0)
    loss = tl.where(used, loss, 0.0)
    tl.store(lse_ptr + position, most, mask=position < POSITIONS)
    tl.store(lse_ptr + POSITIONS + position, log_total, mask=position < POSITIONS)
    if REDUCE:
        tl.store(loss_parts_ptr + tl.program_id(0), tl.sum(loss, axis=0))
    else:
        tl.store(loss_ptr + position, loss.to(loss_ptr.dtype.element_ty), mask=position < POSITIONS)
    tl.store(weight_parts_ptr + tl.program_id(0), tl.sum(share.to(tl.float64), axis=0))


@triton.jit
def cross_entropy_reduce_kernel(
    loss_parts_ptr, weight_parts_ptr, loss_ptr, weight_ptr, COUNT,
    REDUCE: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program adds all partials in order.
    loss = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, COUNT, BLOCK):
        i = start + tl.arange(0, BLOCK)
        weight += tl.load(weight_parts_ptr + i, mask=i < COUNT, other=0.0)
        if REDUCE:
            loss += tl.load(loss_parts_ptr + i, mask=i < COUNT, other=0.0)
    total_weight = tl.sum(weight, axis=0)
    tl.store(weight_ptr, total_weight.to(weight_ptr.dtype.element_ty))
    if REDUCE:
        total = tl.sum(loss, axis=0)
        if MEAN:
            total = total / total_weight
        tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))


@triton.jit
def cross_entropy_backward_kernel(
    grad_ptr, x_ptr, target_ptr, weight_ptr, sample_weight_ptr, lse_ptr, total_weight_ptr, dx_ptr,
    POSITIONS, C, PIXELS, stride_n, stride_pixel, stride_c, dx_stride_n, dx_stride_pixel, dx_stride_c,
    ignore_index, smoothing: tl.float64,
    HAS_WEIGHT: tl.constexpr, HAS_SAMPLE_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, REDUCE: tl.constexpr,
    MEAN: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_M positions; dx = grad * share * (softmax - onehot), and the same towards the uniform target.
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if LARGE:
        position = position.to(tl.int64)
    row = x_ptr + (position // PIXELS * stride_n + position % PIXELS * stride_pixel)  # [BLOCK_M]
    dx_row = dx_ptr + (position // PIXELS * dx_stride_n + position % PIXELS * dx_stride_pixel)
    target, share, used, _ = _target(target_ptr, weight_ptr, position, POSITIONS, C, ignore_index, HAS_WEIGHT, ACC)
    most = tl.load(lse_ptr + position, mask=position < POSITIONS, other=0.0)
    log_total = tl.load(lse_ptr + POSITIONS + position, mask=position < POSITIONS, other=0.0)
    if REDUCE:
        grad = tl.zeros((BLOCK_M,), ACC) + tl.load(grad_ptr).to(ACC)
        if MEAN:
            grad = grad / tl.load(total_weight_ptr)
    else:
        grad = tl.load(grad_ptr + position, mask=position < POSITIONS, other=0.0).to(ACC)
    if HAS_SAMPLE_WEIGHT:
        grad = grad * tl.load(sample_weight_ptr + position, mask=position < POSITIONS, other=0.0).to(ACC)
    grad = tl.where(used, grad, 0.0)
    hard = grad * tl.where(used, share, 0.0)  # an ignored position gets 0, whatever the gradient
    soft = tl.zeros((BLOCK_M,), ACC)
    weights = tl.full((), 0, ACC)
    if SMOOTH:
        hard = hard * (1.0 - smoothing).to(ACC)
        soft = grad * (smoothing / C).to(ACC)
        if HAS_WEIGHT:
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                weights += tl.sum(tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC), axis=0)
        else:
            weights += tl.cast(C, ACC)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (position < POSITIONS)[:, None] & (c < C)[None, :]
        x = tl.load(row[:, None] + (c * stride_c)[None, :], mask=inside, other=-float("inf")).to(ACC)  # [BLOCK_M, BLOCK_C]
        softmax = tl.exp(x - most[:, None] - log_total[:, None])
        onehot = tl.where(c[None, :] == target[:, None], 1.0, 0.0)
        dx = hard[:, None] * (softmax - onehot)
        if SMOOTH:
            class_weight = tl.where(c < C, 1.0, 0.0).to(ACC)
            if HAS_WEIGHT:
                class_weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)
            dx += soft[:, None] * (softmax * weights - class_weight[None, :])
        dx = tl.where(used[:, None], dx, 0.0)
        tl.store(dx_row[:, None] + (c * dx_stride_c)[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weighted(target, c, C, weight_ptr, keep, spread, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    # v = ((1 - e) t + e / C) w of a tile [BLOCK_M, BLOCK_C], 0 beyond the classes; and w.
    class_weight = tl.where(c < C, 1.0, 0.0).to(ACC)
    if HAS_WEIGHT:
        class_weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)
    return (target.to(ACC) * keep + spread) * class_weight[None, :], class_weight


@triton.jit
def probabilities_forward_kernel(
    x_ptr, target_ptr, weight_ptr, loss_ptr, kept_ptr, loss_parts_ptr, count_parts_ptr,
    POSITIONS, C, PIXELS, stride_n, stride_pixel, stride_c, smoothing: tl.float64,
    HAS_WEIGHT: tl.constexpr, REDUCE: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_M positions, all their classes. position = n * PIXELS + pixel; targets lie as logits do.
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if LARGE:
        position = position.to(tl.int64)
    row = position // PIXELS * stride_n + position % PIXELS * stride_pixel  # [BLOCK_M]
    keep, spread = (1.0 - smoothing).to(ACC), (smoothing / C).to(ACC)
    most = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (position < POSITIONS)[:, None] & (c < C)[None, :]
        at = row[:, None] + (c * stride_c)[None, :]  # [BLOCK_M, BLOCK_C]
        x = tl.load(x_ptr + at, mask=inside, other=-float("inf")).to(ACC)
        most, total = _grown(x, most, total)
    log_total = tl.log(total)
    mass = tl.zeros((BLOCK_M,), tl.float64)
    apart = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (position < POSITIONS)[:, None] & (c < C)[None, :]
        at = row[:, None] + (c * stride_c)[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
        target = tl.load(target_ptr + at, mask=inside, other=0.0)
        v, _ = _weighted(target, c, C, weight_ptr, keep, spread, HAS_WEIGHT, ACC)
        mass += tl.sum(v, axis=1).to(tl.float64)
        apart += tl.sum(tl.where(inside, v * (most[:, None] - x), 0.0), axis=1).to(tl.float64)
    loss = tl.where(position < POSITIONS, apart + mass * log_total.to(tl.float64), 0.0)
    tl.store(kept_ptr + position, most, mask=position < POSITIONS)
    tl.store(kept_ptr + POSITIONS + position, total, mask=position < POSITIONS)
    tl.store(kept_ptr + 2 * POSITIONS + position, mass, mask=position < POSITIONS)
    if REDUCE:
        tl.store(loss_parts_ptr + tl.program_id(0), tl.sum(loss, axis=0))
        tl.store(count_parts_ptr + tl.program_id(0), tl.sum(tl.where(position < POSITIONS, 1.0, 0.0), axis=0).to(tl.float64))
    else:
        tl.store(loss_ptr + position, loss.to(loss_ptr.dtype.element_ty), mask=position < POSITIONS)


@triton.jit
def probabilities_backward_kernel(
    grad_ptr, x_ptr, target_ptr, weight_ptr, kept_ptr, dx_ptr, dtarget_ptr,
    POSITIONS, C, PIXELS, stride_n, stride_pixel, stride_c, smoothing: tl.float64,
    HAS_WEIGHT: tl.constexpr, REDUCE: tl.constexpr, MEAN: tl.constexpr, OF_INPUT: tl.constexpr, OF_TARGET: tl.constexpr,
    ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_M positions; dx = grad (softmax sum(v) - v), dtarget = -grad (1 - e) w log softmax. All lie as x.
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if LARGE:
        position = position.to(tl.int64)
    row = position // PIXELS * stride_n + position % PIXELS * stride_pixel  # [BLOCK_M]
    keep, spread = (1.0 - smoothing).to(ACC), (smoothing / C).to(ACC)
    most = tl.load(kept_ptr + position, mask=position < POSITIONS, other=0.0).to(ACC)
    total = tl.load(kept_ptr + POSITIONS + position, mask=position < POSITIONS, other=1.0).to(ACC)
    mass = tl.load(kept_ptr + 2 * POSITIONS + position, mask=position < POSITIONS, other=0.0).to(ACC)
    if REDUCE:
        grad = tl.zeros((BLOCK_M,), ACC) + tl.load(grad_ptr).to(ACC)
        if MEAN:
            grad = grad / tl.cast(POSITIONS, ACC)
    else:
        grad = tl.load(grad_ptr + position, mask=position < POSITIONS, other=0.0).to(ACC)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (position < POSITIONS)[:, None] & (c < C)[None, :]
        at = row[:, None] + (c * stride_c)[None, :]  # [BLOCK_M, BLOCK_C]
        below = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC) - most[:, None]
        target = tl.load(target_ptr + at, mask=inside, other=0.0)
        v, class_weight = _weighted(target, c, C, weight_ptr, keep, spread, HAS_WEIGHT, ACC)
        if OF_INPUT:
            dx = grad[:, None] * (tl.exp(below) * (mass / total)[:, None] - v)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if OF_TARGET:
            dtarget = -grad[:, None] * keep * class_weight[None, :] * (below - tl.log(total)[:, None])
            tl.store(dtarget_ptr + at, dtarget.to(dtarget_ptr.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------

_NONE, _MEAN, _SUM = 0, 1, 2


def _check(op, input, target, weight, sample_weight, reduction, ignore_index, label_smoothing):
    check_tensors(op, input)
    check(input.dim() >= 2, f"{op}: expected input [N, C, ...], got {tuple(input.shape)}")
    check(target.dtype == torch.int64 and target.device == input.device, f"{op}: target must be int64 on the same device")
    expected = (input.shape[0], *input.shape[2:])
    check(tuple(target.shape) == expected, f"{op}: input {tuple(input.shape)}, target {tuple(target.shape)}")
    check(reduction in (_NONE, _MEAN, _SUM), f"{op}: no reduction {reduction}")
    check(0.0 <= label_smoothing <= 1.0, f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if target.device.type == "cpu":
        wrong = ((target < 0) | (target >= input.shape[1])) & (target != ignore_index)
        if wrong.any():
            raise IndexError(f"Target {target[wrong][0].item()} is out of bounds.")
    if weight is not None:
        check(weight.device == input.device and weight.is_floating_point(), f"{op}: weight of another device or kind")
        check(tuple(weight.shape) == (input.shape[1],), f"{op}: expected weight [{input.shape[1]}], got {tuple(weight.shape)}")
    if sample_weight is not None:
        check(
            sample_weight.device == input.device and sample_weight.is_floating_point(),
            f"{op}: sample_weight of another device or kind",
        )
        check(
            tuple(sample_weight.shape) == expected,
            f"{op}: expected sample_weight {expected}, got {tuple(sample_weight.shape)}",
        )


def _layout(x):
    """x where positions and classes have one stride each, else a contiguous copy; and the number of pixels."""
    pixels = x[0, 0].numel() if x.shape[0] and x.shape[1] else 1
    if x.dim() == 2 or x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return x, pixels
    return x.contiguous(), pixels


def _strides(x, pixels):
    """Strides of image, pixel and class."""
    if x.dim() == 2:
        return x.stride(0), 0, x.stride(1)
    if x.is_contiguous():
        return x.shape[1] * pixels, 1, pixels
    return x.shape[1] * pixels, x.shape[1], 1


def cross_entropy_forward(input, target, weight, sample_weight, reduction, ignore_index, label_smoothing):
    """torch.nn.functional.cross_entropy for class targets; also, a position, the largest logit and
    log(sum(exp(x - largest))) as [2, ...], and the sum of the weights."""
    _check("cross_entropy", input, target, weight, sample_weight, reduction, ignore_index, label_smoothing)
    dtype = accumulator_dtype(input.dtype)
    reduce = reduction != _NONE
    loss = torch.empty(() if reduce else target.shape, dtype=input.dtype, device=input.device)
    lse = torch.empty((2, *target.shape), dtype=dtype, device=input.device)
    total_weight = torch.empty((), dtype=dtype, device=input.device)
    positions, C = target.numel(), input.shape[1]
    x, pixels = _layout(input)
    config = configs.cross_entropy(x, positions, C)
    programs = triton.cdiv(positions, config["BLOCK_M"])
    loss_parts, weight_parts = (torch.empty(programs, dtype=torch.float64, device=x.device) for _ in range(2))
    weight, sample_weight = (w.contiguous() if w is not None else None for w in (weight, sample_weight))
    if positions:
        launch(
            cross_entropy_forward_kernel, (programs,), x, target.contiguous(), weight if weight is not None else x,
            sample_weight if sample_weight is not None else x, loss, lse, loss_parts, weight_parts, positions, C, pixels,
            *_strides(x, pixels), ignore_index,
            float(label_smoothing), HAS_WEIGHT=weight is not None, HAS_SAMPLE_WEIGHT=sample_weight is not None,
            SMOOTH=label_smoothing > 0.0, REDUCE=reduce, ACC=accumulator(x.dtype), LARGE=is_large(x), **config,
        )
    launch(
        cross_entropy_reduce_kernel, (1,), loss_parts, weight_parts, loss if reduce else total_weight, total_weight, programs,
        REDUCE=reduce, MEAN=reduction == _MEAN, BLOCK=1024,
    )
    return loss, lse, total_weight


def cross_entropy_backward(
    grad_loss, input, target, weight, sample_weight, lse, total_weight, reduction, ignore_index, label_smoothing
):
    """Gradient of cross_entropy by its input."""
    op = "cross_entropy_backward"
    _check(op, input, target, weight, sample_weight, reduction, ignore_index, label_smoothing)
    dtype = accumulator_dtype(input.dtype)
    expected = () if reduction != _NONE else tuple(target.shape)
    check(tuple(grad_loss.shape) == expected, f"{op}: expected grad_loss {expected}, got {tuple(grad_loss.shape)}")
    check(tuple(lse.shape) == (2, *target.shape) and lse.dtype == dtype, f"{op}: lse does not match target")
    check(total_weight.numel() == 1 and total_weight.dtype == dtype, f"{op}: total_weight must be one {dtype}")
    check(grad_loss.device == lse.device == total_weight.device == input.device, f"{op}: tensors on several devices")
    x, pixels = _layout(input)
    grad_input = torch.empty_like(x, memory_format=memory_format(suggests_channels_last(input), input.dim()))
    positions, C = target.numel(), input.shape[1]
    if grad_input.numel() == 0:
        return grad_input
    config = configs.cross_entropy(x, positions, C)
    weight, sample_weight = (w.contiguous() if w is not None else None for w in (weight, sample_weight))
    launch(
        cross_entropy_backward_kernel, (triton.cdiv(positions, config["BLOCK_M"]),), grad_loss.contiguous(), x,
        target.contiguous(), weight if weight is not None else x, sample_weight if sample_weight is not None else x,
        lse.contiguous(), total_weight, grad_input,
        positions, C, pixels, *_strides(x, pixels), *_strides(grad_input, pixels), ignore_index, float(label_smoothing),
        HAS_WEIGHT=weight is not None, HAS_SAMPLE_WEIGHT=sample_weight is not None, SMOOTH=label_smoothing > 0.0,
        REDUCE=reduction != _NONE, MEAN=reduction == _MEAN, ACC=accumulator(x.dtype), LARGE=is_large(x), **config,
    )
    return grad_input


def _check_probabilities(op, input, target, weight, reduction, label_smoothing):
    check_tensors(op, input, target, weight)
    check(input.dim() >= 2 and input.numel() > 0, f"{op}: expected input [N, C, ...] with elements, got {tuple(input.shape)}")
    check(target.shape == input.shape, f"{op}: input {tuple(input.shape)}, target {tuple(target.shape)}")
    check(reduction in (_NONE, _MEAN, _SUM), f"{op}: no reduction {reduction}")
    check(0.0 <= label_smoothing <= 1.0, f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if weight is not None:
        check(tuple(weight.shape) == (input.shape[1],), f"{op}: expected weight [{input.shape[1]}], got {tuple(weight.shape)}")


def _alike(input, target):
    """Both in the layout that results have, and the number of pixels."""
    layout = memory_format(suggests_channels_last(input), input.dim())
    return *(x.contiguous(memory_format=layout) for x in (input, target)), input[0, 0].numel()


def probabilities_forward(input, target, weight, reduction, label_smoothing):
    """torch.nn.functional.cross_entropy for class probabilities; also, a position, the largest logit,
    sum(exp(x - largest)) and the sum of its weighted targets as [3, ...]."""
    _check_probabilities("cross_entropy", input, target, weight, reduction, label_smoothing)
    reduce, places = reduction != _NONE, (input.shape[0], *input.shape[2:])
    loss = torch.empty(() if reduce else places, dtype=input.dtype, device=input.device)
    kept = torch.empty((3, *places), dtype=torch.float64, device=input.device)
    x, target, pixels = _alike(input, target)
    positions, C = x.numel() // x.shape[1], x.shape[1]
    config = configs.cross_entropy(x, positions, C)
    programs = triton.cdiv(positions, config["BLOCK_M"])
    loss_parts, count_parts = (torch.empty(programs, dtype=torch.float64, device=x.device) for _ in range(2))
    launch(
        probabilities_forward_kernel, (programs,), x, target, x if weight is None else weight.contiguous(), loss,
        kept, loss_parts, count_parts, positions, C, pixels, *_strides(x, pixels), float(label_smoothing),
        HAS_WEIGHT=weight is not None, REDUCE=reduce, ACC=accumulator(x.dtype), LARGE=is_large(x), **config,
    )
    if reduce:
        count = torch.empty((), dtype=torch.float64, device=x.device)
        launch(
            cross_entropy_reduce_kernel, (1,), loss_parts, count_parts, loss, count, programs, REDUCE=True,
            MEAN=reduction == _MEAN, BLOCK=1024,
        )
    return loss, kept


def probabilities_backward(grad_loss, input, target, weight, kept, reduction, label_smoothing, of_input, of_target):
    """Gradients of cross_entropy by logits and class probabilities; of size [0] where not wanted."""
    op = "cross_entropy_probabilities_backward"
    _check_probabilities(op, input, target, weight, reduction, label_smoothing)
    places = (input.shape[0], *input.shape[2:])
    expected = () if reduction != _NONE else places
    check(tuple(grad_loss.shape) == expected, f"{op}: expected grad_loss {expected}, got {tuple(grad_loss.shape)}")
    check(tuple(kept.shape) == (3, *places) and kept.dtype == torch.float64, f"{op}: kept does not match")
    check(grad_loss.device == kept.device == input.device, f"{op}: tensors on several devices")
    x, target, pixels = _alike(input, target)
    gradients = [torch.empty_like(x) if wanted else x.new_empty(0) for wanted in (of_input, of_target)]
    positions, C = x.numel() // x.shape[1], x.shape[1]
    config = configs.cross_entropy(x, positions, C)
    launch(
        probabilities_backward_kernel, (triton.cdiv(positions, config["BLOCK_M"]),), grad_loss.contiguous(), x,
        target, x if weight is None else weight.contiguous(), kept.contiguous(), *gradients, positions, C, pixels,
        *_strides(x, pixels), float(label_smoothing), HAS_WEIGHT=weight is not None, REDUCE=reduction != _NONE,
        MEAN=reduction == _MEAN, OF_INPUT=of_input, OF_TARGET=of_target, ACC=accumulator(x.dtype), LARGE=is_large(x), **config,
    )
    return tuple(gradients)
