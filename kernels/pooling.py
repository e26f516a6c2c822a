"""max_pool2d, avg_pool2d, adaptive_avg_pool2d, adaptive_max_pool2d, forward and backward.

One lane computes one element of the result, lanes in the memory order of the result, so that reads and writes
coalesce in either layout. The backwards gather: an input element visits the windows that hold it (at most
ceil(kernel / stride) a dimension), adds in float32 in a fixed order and writes once; no atomics. Maxima remember
their place in the window in one byte where the caller does not want torch's int64 indices. Floor: input + output
(+ indices) over the memory's bandwidth.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import (
    accumulator,
    check,
    check_tensors,
    dense,
    empty,
    is_large,
    launch,
    suggests_channels_last,
)


@triton.jit
def _position(C, H, W, LARGE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    # Elements of a dense tensor in memory order: flat offset and n, c, h, w.
    if LARGE:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    else:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        c = i % C
        pixel = i // C
        w = pixel % W
        h = pixel // W % H
        n = pixel // W // H
    else:
        w = i % W
        h = i // W % H
        plane = i // W // H
        c = plane % C
        n = plane // C
    return i, n, c, h, w


# --- maximum ----------------------------------------------------------------------------------------------------------


@triton.jit
def max_pool2d_forward_kernel(
    x_ptr, y_ptr, indices_ptr, count, C, H, W, P, Q, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    INDICES: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    i, n, c, p, q = _position(C, P, Q, LARGE, CHANNELS_LAST, BLOCK)
    plane = x_ptr + n * x_stride_n + c * x_stride_c
    best = tl.full((BLOCK,), -float("inf"), ACC)
    place = tl.full((BLOCK,), -1, tl.int64 if INDICES == 2 else tl.int32)
    for r in range(KERNEL_H):
        h = p * STRIDE_H - PADDING_H + r * DILATION_H
        for s in range(KERNEL_W):
            w = q * STRIDE_W - PADDING_W + s * DILATION_W
            inside = (i < count) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x = tl.load(plane + h * x_stride_h + w * x_stride_w, mask=inside, other=-float("inf")).to(ACC)
            # The first of equal values, the last NaN; the first element where all are -inf.
            take = inside & ((x > best) | (x != x) | (place < 0))
            best = tl.where(take, x, best)
            if INDICES == 2:
                place = tl.where(take, (h * W + w).to(tl.int64), place)
            else:
                place = tl.where(take, r * KERNEL_W + s, place)
    tl.store(y_ptr + i, best.to(y_ptr.dtype.element_ty), mask=i < count)
    if INDICES != 0:
        tl.store(indices_ptr + i, place.to(indices_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def max_pool2d_backward_kernel(
    dy_ptr, indices_ptr, dx_ptr, count, C, H, W, P, Q, dy_stride_n, dy_stride_c, dy_stride_h, dy_stride_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr, FLAT_INDICES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    # indices has the strides of dy.
    i, n, c, h, w = _position(C, H, W, LARGE, CHANNELS_LAST, BLOCK)
    plane = n * dy_stride_n + c * dy_stride_c
    total = tl.zeros((BLOCK,), ACC)
    for a in range(WINDOWS_H):
        p = (h + PADDING_H) // STRIDE_H - a
        reach_h = h + PADDING_H - p * STRIDE_H
        row = (p >= 0) & (p < P) & (reach_h <= (KERNEL_H - 1) * DILATION_H) & (reach_h % DILATION_H == 0)
        for b in range(WINDOWS_W):
            q = (w + PADDING_W) // STRIDE_W - b
            reach_w = w + PADDING_W - q * STRIDE_W
            inside = row & (q >= 0) & (q < Q) & (reach_w <= (KERNEL_W - 1) * DILATION_W) & (reach_w % DILATION_W == 0)
            inside &= i < count
            offset = plane + p * dy_stride_h + q * dy_stride_w
            index = tl.load(indices_ptr + offset, mask=inside, other=0)
            if FLAT_INDICES:
                mine = index == h * W + w
            else:
                mine = index.to(tl.int32) == reach_h // DILATION_H * KERNEL_W + reach_w // DILATION_W
            total += tl.load(dy_ptr + offset, mask=inside & mine, other=0.0).to(ACC)
    tl.store(dx_ptr + i, total.to(dx_ptr.dtype.element_ty), mask=i < count)


# --- average ----------------------------------------------------------------------------------------------------------


@triton.jit
def _divisor(p, q, H, W, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
             PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, COUNT_PADDING: tl.constexpr):
    # Elements in window (p, q): of the padded input, which ends PADDING after the last row, or of the input alone.
    h = p * STRIDE_H - PADDING_H
    w = q * STRIDE_W - PADDING_W
    h_end = tl.minimum(h + KERNEL_H, H + PADDING_H)
    w_end = tl.minimum(w + KERNEL_W, W + PADDING_W)
    if COUNT_PADDING:
        size = (h_end - h) * (w_end - w)
    else:
        size = (tl.minimum(h_end, H) - tl.maximum(h, 0)) * (tl.minimum(w_end, W) - tl.maximum(w, 0))
    return size


@triton.jit
def avg_pool2d_forward_kernel(
    x_ptr, y_ptr, count, C, H, W, P, Q, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, COUNT_PADDING: tl.constexpr, DIVISOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    i, n, c, p, q = _position(C, P, Q, LARGE, CHANNELS_LAST, BLOCK)
    plane = x_ptr + n * x_stride_n + c * x_stride_c
    total = tl.zeros((BLOCK,), ACC)
    for r in range(KERNEL_H):
        h = p * STRIDE_H - PADDING_H + r
        for s in range(KERNEL_W):
            w = q * STRIDE_W - PADDING_W + s
            inside = (i < count) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            total += tl.load(plane + h * x_stride_h + w * x_stride_w, mask=inside, other=0.0).to(ACC)
    if DIVISOR != 0:
        y = total / DIVISOR
    else:
        size = _divisor(p, q, H, W, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, COUNT_PADDING)
        y = total / size.to(ACC)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def avg_pool2d_backward_kernel(
    dy_ptr, dx_ptr, count, C, H, W, P, Q, dy_stride_n, dy_stride_c, dy_stride_h, dy_stride_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, COUNT_PADDING: tl.constexpr, DIVISOR: tl.constexpr,
    WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    i, n, c, h, w = _position(C, H, W, LARGE, CHANNELS_LAST, BLOCK)
    plane = dy_ptr + n * dy_stride_n + c * dy_stride_c
    total = tl.zeros((BLOCK,), ACC)
    for a in range(WINDOWS_H):
        p = (h + PADDING_H) // STRIDE_H - a
        row = (p >= 0) & (p < P) & (h + PADDING_H - p * STRIDE_H < KERNEL_H)
        for b in range(WINDOWS_W):
            q = (w + PADDING_W) // STRIDE_W - b
            inside = (i < count) & row & (q >= 0) & (q < Q) & (w + PADDING_W - q * STRIDE_W < KERNEL_W)
            dy = tl.load(plane + p * dy_stride_h + q * dy_stride_w, mask=inside, other=0.0).to(ACC)
            if DIVISOR != 0:
                total += dy / DIVISOR
            else:
                size = _divisor(p, q, H, W, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, COUNT_PADDING)
                total += tl.where(inside, dy / size.to(ACC), 0.0)
    tl.store(dx_ptr + i, total.to(dx_ptr.dtype.element_ty), mask=i < count)


# --- adaptive average -------------------------------------------------------------------------------------------------


@triton.jit
def adaptive_avg_pool2d_forward_kernel(
    x_ptr, y_ptr, count, C, H, W, P, Q, x_stride_n, x_stride_c, x_stride_h, x_stride_w, LONGEST_H, LONGEST_W,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    # Window p holds rows floor(p H / P) up to ceil((p + 1) H / P).
    i, n, c, p, q = _position(C, P, Q, LARGE, CHANNELS_LAST, BLOCK)
    plane = x_ptr + n * x_stride_n + c * x_stride_c
    h_start, h_end = p * H // P, ((p + 1) * H + P - 1) // P
    w_start, w_end = q * W // Q, ((q + 1) * W + Q - 1) // Q
    total = tl.zeros((BLOCK,), ACC)
    for r in range(LONGEST_H):
        h = h_start + r
        row = tl.zeros((BLOCK,), ACC)  # sums of rows first: fewer roundings meet in one sum
        for s in range(LONGEST_W):
            w = w_start + s
            inside = (i < count) & (h < h_end) & (w < w_end)
            row += tl.load(plane + h * x_stride_h + w * x_stride_w, mask=inside, other=0.0).to(ACC)
        total += row
    y = total / ((h_end - h_start) * (w_end - w_start)).to(ACC)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def adaptive_avg_pool2d_backward_kernel(
    dy_ptr, dx_ptr, count, C, H, W, P, Q, dy_stride_n, dy_stride_c, dy_stride_h, dy_stride_w, WINDOWS_H, WINDOWS_W,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    # Row h lies in windows floor(h P / H) up to ceil((h + 1) P / H).
    i, n, c, h, w = _position(C, H, W, LARGE, CHANNELS_LAST, BLOCK)
    plane = dy_ptr + n * dy_stride_n + c * dy_stride_c
    p_start, p_end = h * P // H, ((h + 1) * P + H - 1) // H
    q_start, q_end = w * Q // W, ((w + 1) * Q + W - 1) // W
    total = tl.zeros((BLOCK,), ACC)
    for a in range(WINDOWS_H):
        p = p_start + a
        height = ((p + 1) * H + P - 1) // P - p * H // P
        for b in range(WINDOWS_W):
            q = q_start + b
            width = ((q + 1) * W + Q - 1) // Q - q * W // Q
            inside = (i < count) & (p < p_end) & (q < q_end)
            dy = tl.load(plane + p * dy_stride_h + q * dy_stride_w, mask=inside, other=0.0).to(ACC)
            total += dy / (height * width).to(ACC)
    tl.store(dx_ptr + i, total.to(dx_ptr.dtype.element_ty), mask=i < count)


# --- adaptive maximum -------------------------------------------------------------------------------------------------


@triton.jit
def adaptive_max_pool2d_forward_kernel(
    x_ptr, y_ptr, indices_ptr, count, C, H, W, P, Q, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    LONGEST_H, LONGEST_W, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    # The windows of the adaptive average.
    i, n, c, p, q = _position(C, P, Q, LARGE, CHANNELS_LAST, BLOCK)
    plane = x_ptr + n * x_stride_n + c * x_stride_c
    h_start, h_end = p * H // P, ((p + 1) * H + P - 1) // P
    w_start, w_end = q * W // Q, ((q + 1) * W + Q - 1) // Q
    best = tl.full((BLOCK,), -float("inf"), ACC)
    place = (h_start * W + w_start).to(tl.int64)
    for r in range(LONGEST_H):
        h = h_start + r
        for s in range(LONGEST_W):
            w = w_start + s
            inside = (i < count) & (h < h_end) & (w < w_end)
            x = tl.load(plane + h * x_stride_h + w * x_stride_w, mask=inside, other=-float("inf")).to(ACC)
            take = inside & ((x > best) | (x != x))  # the first of equal values, the last NaN
            best = tl.where(take, x, best)
            place = tl.where(take, (h * W + w).to(tl.int64), place)
    tl.store(y_ptr + i, best.to(y_ptr.dtype.element_ty), mask=i < count)
    tl.store(indices_ptr + i, place, mask=i < count)


@triton.jit
def adaptive_max_pool2d_backward_kernel(
    dy_ptr, indices_ptr, dx_ptr, count, C, H, W, P, Q, dy_stride_n, dy_stride_c, dy_stride_h, dy_stride_w,
    WINDOWS_H, WINDOWS_W, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    # indices has the strides of dy.
    i, n, c, h, w = _position(C, H, W, LARGE, CHANNELS_LAST, BLOCK)
    plane = n * dy_stride_n + c * dy_stride_c
    p_start, p_end = h * P // H, ((h + 1) * P + H - 1) // H
    q_start, q_end = w * Q // W, ((w + 1) * Q + W - 1) // W
    total = tl.zeros((BLOCK,), ACC)
    for a in range(WINDOWS_H):
        p = p_start + a
        for b in range(WINDOWS_W):
            q = q_start + b
            inside = (i < count) & (p < p_end) & (q < q_end)
            offset = plane + p * dy_stride_h + q * dy_stride_w
            mine = tl.load(indices_ptr + offset, mask=inside, other=-1) == h * W + w
            total += tl.load(dy_ptr + offset, mask=inside & mine, other=0.0).to(ACC)
    tl.store(dx_ptr + i, total.to(dx_ptr.dtype.element_ty), mask=i < count)


# --- launchers --------------------------------------------------------------------------------------------------------


def _pair(op, name, values, least):
    check(len(values) == 2 and all(v >= least for v in values), f"{op}: {name} must be two numbers >= {least}, got {values}")
    return tuple(int(v) for v in values)


def _geometry(op, window, pairs):
    """Kernel size, stride, padding and dilation, which a window of three pairs leaves at one."""
    check(len(window) == 2 * pairs, f"{op}: a window takes {2 * pairs} ints, got {window}")
    kernel_size, stride = _pair(op, "kernel_size", window[:2], 1), _pair(op, "stride", window[2:4], 1)
    padding, dilation = _pair(op, "padding", window[4:6], 0), _pair(op, "dilation", window[6:8] or (1, 1), 1)
    check(all(2 * p <= k for p, k in zip(padding, kernel_size)), f"{op}: padding {padding} over half of {kernel_size}")
    return kernel_size, stride, padding, dilation


def _output_size(op, size, kernel, stride, padding, dilation, ceil_mode):
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:  # a window that starts in the right padding
        out -= 1
    check(out >= 1, f"{op}: the window is larger than the input")
    return out


def _check_input(op, x):
    check_tensors(op, x)
    check(x.dim() == 4, f"{op}: expected a 4-D input, got {x.dim()}-D")
    check(x.shape[1] > 0 and x.shape[2] > 0 and x.shape[3] > 0, f"{op}: empty input {tuple(x.shape)}")


def _run(kernel, reads, writes, result, geometry, *sizes, **constants):
    """Launches over the elements of `result`; `reads[0]` gives the strides that are read through."""
    config = configs.elementwise(result)
    source = reads[0]
    launch(
        kernel, (triton.cdiv(result.numel(), config["BLOCK"]),), *reads, *writes, result.numel(), *geometry,
        *source.stride(), *sizes, CHANNELS_LAST=not result.is_contiguous(), ACC=accumulator(result.dtype),
        LARGE=is_large(*reads, *writes), **constants, **config,
    )


def _window(kernel_size, stride, padding, dilation=None):
    names = ("KERNEL", "STRIDE", "PADDING", "DILATION")
    values = (kernel_size, stride, padding) + ((dilation,) if dilation else ())
    return {f"{name}_{d}": v for name, pair in zip(names, values) for d, v in zip("HW", pair)}


def _windows(kernel_size, stride, dilation=(1, 1)):
    """How many windows can hold one input element, a dimension."""
    return {
        f"WINDOWS_{d}": (k - 1) * dil // s + 1 for d, k, s, dil in zip("HW", kernel_size, stride, dilation)
    }


def max_pool2d_forward(input, window, ceil_mode, indices):
    """Maxima, and where they were: indices 0 nothing, 1 offset in the window (uint8), 2 h * W + w (int64)."""
    op = "max_pool2d"
    _check_input(op, input)
    kernel_size, stride, padding, dilation = _geometry(op, window, 4)
    check(indices in (0, 1, 2), f"{op}: indices must be 0, 1 or 2")
    check(indices != 1 or kernel_size[0] * kernel_size[1] <= 256, f"{op}: one byte cannot number a {kernel_size} window")
    (N, C, H, W), x = input.shape, dense(input)
    P, Q = (_output_size(op, *a, ceil_mode) for a in zip((H, W), kernel_size, stride, padding, dilation))
    channels_last = suggests_channels_last(input)
    output = empty((N, C, P, Q), x, channels_last)
    place = empty((N, C, P, Q) if indices else (0,), x, channels_last, torch.int64 if indices == 2 else torch.uint8)
    if output.numel():
        _run(
            max_pool2d_forward_kernel, (x,), (output, place), output, (C, H, W, P, Q),
            **_window(kernel_size, stride, padding, dilation), INDICES=indices,
        )
    return output, place


def max_pool2d_backward(grad_output, indices, input_size, window, channels_last):
    """Each gradient goes to the element its index names."""
    op = "max_pool2d_backward"
    check_tensors(op, grad_output)
    kernel_size, stride, padding, dilation = _geometry(op, window, 4)
    check(indices.dtype in (torch.uint8, torch.int64), f"{op}: indices must be uint8 or int64")
    check(indices.device == grad_output.device, f"{op}: indices on {indices.device}")
    check(len(input_size) == 4 and min(input_size) >= 0, f"{op}: input_size must be four sizes")
    check(grad_output.dim() == 4 and indices.shape == grad_output.shape, f"{op}: grad_output and indices differ in shape")
    check(tuple(grad_output.shape[:2]) == tuple(input_size[:2]), f"{op}: grad_output does not belong to input_size")
    (N, C, H, W), (P, Q) = input_size, grad_output.shape[2:]
    for size, out, k, s, pad, dil in zip((H, W), (P, Q), kernel_size, stride, padding, dilation):
        sizes = [_output_size(op, size, k, s, pad, dil, ceil_mode) for ceil_mode in (False, True)]
        check(out in sizes, f"{op}: wrong output size")
    dy = dense(grad_output)
    place = indices if indices.stride() == dy.stride() else torch.empty_like(dy, dtype=indices.dtype).copy_(indices)
    grad_input = empty((N, C, H, W), dy, channels_last)
    if grad_input.numel():
        _run(
            max_pool2d_backward_kernel, (dy, place), (grad_input,), grad_input, (C, H, W, P, Q),
            **_window(kernel_size, stride, padding, dilation), **_windows(kernel_size, stride, dilation),
            FLAT_INDICES=indices.dtype == torch.int64,
        )
    return grad_input


def avg_pool2d_forward(input, window, ceil_mode, count_include_pad, divisor_override):
    """Means over windows."""
    op = "avg_pool2d"
    _check_input(op, input)
    kernel_size, stride, padding, _ = _geometry(op, window, 3)
    check(divisor_override != 0, f"{op}: divisor must be not zero")
    (N, C, H, W), x = input.shape, dense(input)
    P, Q = (_output_size(op, *a, 1, ceil_mode) for a in zip((H, W), kernel_size, stride, padding))
    output = empty((N, C, P, Q), x, suggests_channels_last(input))
    if output.numel():
        _run(
            avg_pool2d_forward_kernel, (x,), (output,), output, (C, H, W, P, Q), **_window(kernel_size, stride, padding),
            COUNT_PADDING=count_include_pad, DIVISOR=divisor_override or 0,
        )
    return output


def avg_pool2d_backward(
    grad_output, input_size, window, ceil_mode, count_include_pad, divisor_override, channels_last
):
    """Each gradient, divided by its window's size, goes to the window's elements."""
    op = "avg_pool2d_backward"
    check_tensors(op, grad_output)
    kernel_size, stride, padding, _ = _geometry(op, window, 3)
    check(divisor_override != 0, f"{op}: divisor must be not zero")
    check(len(input_size) == 4 and min(input_size) >= 0, f"{op}: input_size must be four sizes")
    N, C, H, W = input_size
    P, Q = (_output_size(op, *a, 1, ceil_mode) for a in zip((H, W), kernel_size, stride, padding))
    check(tuple(grad_output.shape) == (N, C, P, Q), f"{op}: expected grad_output {(N, C, P, Q)}")
    dy = dense(grad_output)
    grad_input = empty((N, C, H, W), dy, channels_last)
    if grad_input.numel():
        _run(
            avg_pool2d_backward_kernel, (dy,), (grad_input,), grad_input, (C, H, W, P, Q),
            **_window(kernel_size, stride, padding), **_windows(kernel_size, stride),
            COUNT_PADDING=count_include_pad, DIVISOR=divisor_override or 0,
        )
    return grad_input


def _longest(sizes, outputs):
    """Elements of the longest window, a dimension."""
    return [max(triton.cdiv((p + 1) * size, out) - p * size // out for p in range(out)) for size, out in zip(sizes, outputs)]


def adaptive_avg_pool2d_forward(input, output_size):
    """Means over windows that divide the input as evenly as they can."""
    op = "adaptive_avg_pool2d"
    _check_input(op, input)
    P, Q = _pair(op, "output_size", output_size, 0)
    (N, C, H, W), x = input.shape, dense(input)
    output = empty((N, C, P, Q), x, suggests_channels_last(input))
    if output.numel():
        longest = _longest((H, W), (P, Q))
        _run(adaptive_avg_pool2d_forward_kernel, (x,), (output,), output, (C, H, W, P, Q), *longest)
    return output


def adaptive_avg_pool2d_backward(grad_output, input_size, channels_last):
    """Each gradient, divided by its window's size, goes to the window's elements."""
    op = "adaptive_avg_pool2d_backward"
    check_tensors(op, grad_output)
    check(len(input_size) == 4 and min(input_size) >= 0, f"{op}: input_size must be four sizes")
    check(grad_output.dim() == 4 and tuple(grad_output.shape[:2]) == tuple(input_size[:2]), f"{op}: wrong input_size")
    (N, C, H, W), (P, Q) = input_size, grad_output.shape[2:]
    dy = dense(grad_output)
    grad_input = empty((N, C, H, W), dy, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    if dy.numel() == 0:
        return grad_input.zero_()
    most = [triton.cdiv(out, size) + 1 for size, out in ((H, P), (W, Q))]
    _run(adaptive_avg_pool2d_backward_kernel, (dy,), (grad_input,), grad_input, (C, H, W, P, Q), *most)
    return grad_input


def adaptive_max_pool2d_forward(input, output_size):
    """Maxima over windows that divide the input as evenly as they can, and where they were (int64, h * W + w)."""
    op = "adaptive_max_pool2d"
    _check_input(op, input)
    P, Q = _pair(op, "output_size", output_size, 0)
    (N, C, H, W), x = input.shape, dense(input)
    channels_last = suggests_channels_last(input)
    output = empty((N, C, P, Q), x, channels_last)
    place = empty((N, C, P, Q), x, channels_last, torch.int64)
    if output.numel():
        longest = _longest((H, W), (P, Q))
        _run(adaptive_max_pool2d_forward_kernel, (x,), (output, place), output, (C, H, W, P, Q), *longest)
    return output, place


def adaptive_max_pool2d_backward(grad_output, indices, input_size, channels_last):
    """Each gradient goes to the element its index names."""
    op = "adaptive_max_pool2d_backward"
    check_tensors(op, grad_output)
    check(indices.dtype == torch.int64, f"{op}: indices must be int64")
    check(indices.device == grad_output.device, f"{op}: indices on {indices.device}")
    check(len(input_size) == 4 and min(input_size) >= 0, f"{op}: input_size must be four sizes")
    check(grad_output.dim() == 4 and indices.shape == grad_output.shape, f"{op}: grad_output and indices differ in shape")
    check(tuple(grad_output.shape[:2]) == tuple(input_size[:2]), f"{op}: wrong input_size")
    (N, C, H, W), (P, Q) = input_size, grad_output.shape[2:]
    dy = dense(grad_output)
    place = indices if indices.stride() == dy.stride() else torch.empty_like(dy, dtype=indices.dtype).copy_(indices)
    grad_input = empty((N, C, H, W), dy, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    if dy.numel() == 0:
        return grad_input.zero_()
    most = [triton.cdiv(out, size) + 1 for size, out in ((H, P), (W, Q))]
    _run(adaptive_max_pool2d_backward_kernel, (dy, place), (grad_input,), grad_input, (C, H, W, P, Q), *most)
    return grad_input
