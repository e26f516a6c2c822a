"""lp_pool2d, forward and backward: (sum over a window of x^norm)^(1 / norm), as kernels/pooling.py pools.

The norms 1 and 2 need no more than float32's products and roots; every other one is computed in float64, where a power
is exp2 of a multiple of log2 or, of a small whole number, a product. The backward makes a slope a window first and
gathers those of the windows that hold an element. Floor: input + output over the memory's bandwidth.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import accumulator, check, dense, empty, is_large, launch, suggests_channels_last
from dlkern.kernels.pooling import _check_input, _output_size, _pair, _position


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    # x^EXPONENT as pow() has it.
    if EXPONENT == 0:
        result = tl.full(x.shape, 1.0, x.dtype)
    elif EXPONENT == 1:
        result = x
    elif EXPONENT == 0.5:
        result = tl.sqrt(x)
    elif EXPONENT == -0.5:
        result = 1.0 / tl.sqrt(x)
    elif EXPONENT == int(EXPONENT) and EXPONENT > 0 and EXPONENT <= 8:
        result = x
        for _ in tl.static_range(int(EXPONENT) - 1):
            result = result * x
    elif EXPONENT == int(EXPONENT) and EXPONENT < 0 and EXPONENT >= -8:
        result = x
        for _ in tl.static_range(-int(EXPONENT) - 1):
            result = result * x
        result = 1.0 / result
    elif EXPONENT == int(EXPONENT):
        # exp2 and log2 of the magnitude; odd powers keep the sign.
        result = tl.exp2(EXPONENT * tl.log2(tl.abs(x)))
        if int(EXPONENT) % 2 != 0:
            result = tl.where(x < 0, -result, result)
    else:
        result = tl.exp2(EXPONENT * tl.log2(tl.where(x == -float("inf"), -x, x)))  # as in C, -inf counts as inf here
    return result


@triton.jit
def _window_sum(
    x_ptr, i, n, c, p, q, count, H, W, x_stride_n, x_stride_c, x_stride_h, x_stride_w, NORM: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):
    # The window's sum of powers, times what the whole window's size is of the part inside the input; and that share.
    plane = x_ptr + n * x_stride_n + c * x_stride_c
    total = tl.zeros((BLOCK,), ACC)
    for r in range(KERNEL_H):
        h = p * STRIDE_H + r
        for s in range(KERNEL_W):
            w = q * STRIDE_W + s
            inside = (i < count) & (h < H) & (w < W)
            x = tl.load(plane + h * x_stride_h + w * x_stride_w, mask=inside, other=1.0).to(ACC)
            total += tl.where(inside, _power(x, NORM), 0.0)
    height = tl.minimum(KERNEL_H, H - p * STRIDE_H)
    width = tl.minimum(KERNEL_W, W - q * STRIDE_W)
    share = (KERNEL_H * KERNEL_W) / (height * width).to(ACC)
    return total * share, share


@triton.jit
def lp_pool2d_forward_kernel(
    x_ptr, y_ptr, count, C, H, W, P, Q, x_stride_n, x_stride_c, x_stride_h, x_stride_w, NORM: tl.constexpr,
    INVERSE: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program: BLOCK windows in the memory order of the result.
    i, n, c, p, q = _position(C, P, Q, LARGE, CHANNELS_LAST, BLOCK)
    total, _ = _window_sum(
        x_ptr, i, n, c, p, q, count, H, W, x_stride_n, x_stride_c, x_stride_h, x_stride_w, NORM, KERNEL_H, KERNEL_W,
        STRIDE_H, STRIDE_W, ACC, BLOCK,
    )
    tl.store(y_ptr + i, _power(total, INVERSE).to(y_ptr.dtype.element_ty), mask=i < count)


@triton.jit
def lp_pool2d_slope_kernel(
    dy_ptr, x_ptr, slope_ptr, count, C, H, W, P, Q, x_stride_n, x_stride_c, x_stride_h, x_stride_w, NORM: tl.constexpr,
    INVERSE: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program: BLOCK windows; dy and the slopes lie in the same order.
    i, n, c, p, q = _position(C, P, Q, LARGE, CHANNELS_LAST, BLOCK)
    total, share = _window_sum(
        x_ptr, i, n, c, p, q, count, H, W, x_stride_n, x_stride_c, x_stride_h, x_stride_w, NORM, KERNEL_H, KERNEL_W,
        STRIDE_H, STRIDE_W, ACC, BLOCK,
    )
    dy = tl.load(dy_ptr + i, mask=i < count, other=0.0).to(ACC)
    slope = dy * (INVERSE * _power(total, INVERSE - 1.0)) * share
    # As in torch: nothing from a sum of zero, and of one that is NaN nothing but a slope's own NaN.
    slope = tl.where(total == 0, 0.0, tl.where(total != total, slope * 0.0, slope))
    tl.store(slope_ptr + i, slope, mask=i < count)


@triton.jit
def lp_pool2d_backward_kernel(
    slope_ptr, x_ptr, dx_ptr, count, C, H, W, P, Q, slope_stride_n, slope_stride_c, slope_stride_h, slope_stride_w,
    NORM: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK: tl.constexpr,
):
    # One program: BLOCK elements of the input; x and dx lie in the same order.
    i, n, c, h, w = _position(C, H, W, LARGE, CHANNELS_LAST, BLOCK)
    plane = slope_ptr + n * slope_stride_n + c * slope_stride_c
    total = tl.zeros((BLOCK,), ACC)
    for a in range(WINDOWS_H):
        p = h // STRIDE_H - a
        row = (p >= 0) & (p < P) & (h - p * STRIDE_H < KERNEL_H)
        for b in range(WINDOWS_W):
            q = w // STRIDE_W - b
            inside = (i < count) & row & (q >= 0) & (q < Q) & (w - q * STRIDE_W < KERNEL_W)
            total += tl.load(plane + p * slope_stride_h + q * slope_stride_w, mask=inside, other=0.0)
    x = tl.load(x_ptr + i, mask=i < count, other=1.0).to(ACC)
    tl.store(dx_ptr + i, (total * (NORM * _power(x, NORM - 1.0))).to(dx_ptr.dtype.element_ty), mask=i < count)


# --- launchers --------------------------------------------------------------------------------------------------------


def _geometry(op, input, norm, window, ceil_mode):
    """Kernel size, stride and windows a dimension; the type to compute in."""
    _check_input(op, input)
    check(norm - norm == 0 and norm != 0, f"{op}: the norm must be finite and not 0, got {norm}")
    check(len(window) == 4, f"{op}: a window takes 4 ints, got {window}")
    kernel_size, stride = _pair(op, "kernel_size", window[:2], 1), _pair(op, "stride", window[2:], 1)
    P, Q = (_output_size(op, size, k, s, 0, 1, ceil_mode) for size, k, s in zip(input.shape[2:], kernel_size, stride))
    return kernel_size, stride, P, Q, accumulator(input.dtype) if norm in (1.0, 2.0) else tl.float64


def _run(kernel, tensors, source, result, sizes, acc, kernel_size, stride, **constants):
    """Launches over the elements of `result`; `source` gives the strides that are read through."""
    config = configs.elementwise(result)
    launch(
        kernel, (triton.cdiv(result.numel(), config["BLOCK"]),), *tensors, result.numel(), *sizes, *source.stride(),
        KERNEL_H=kernel_size[0], KERNEL_W=kernel_size[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        CHANNELS_LAST=not result.is_contiguous(), ACC=acc, LARGE=is_large(*tensors), **constants, **config,
    )


def lp_pool2d_forward(input, norm, window, ceil_mode):
    """Power averages over windows."""
    kernel_size, stride, P, Q, acc = _geometry("lp_pool2d", input, norm, window, ceil_mode)
    (N, C, H, W), x = input.shape, dense(input)
    output = empty((N, C, P, Q), x, suggests_channels_last(input))
    if output.numel():
        _run(
            lp_pool2d_forward_kernel, (x, output), x, output, (C, H, W, P, Q), acc, kernel_size, stride, NORM=float(norm),
            INVERSE=1.0 / norm,
        )
    return output


def lp_pool2d_backward(grad_output, input, norm, window, ceil_mode):
    """The gradient of the input."""
    op = "lp_pool2d_backward"
    kernel_size, stride, P, Q, acc = _geometry(op, input, norm, window, ceil_mode)
    N, C, H, W = input.shape
    check(grad_output.dtype == input.dtype, f"{op}: tensors of {input.dtype} and {grad_output.dtype}")
    check(grad_output.device == input.device, f"{op}: tensors on {input.device} and {grad_output.device}")
    check(tuple(grad_output.shape) == (N, C, P, Q), f"{op}: expected grad_output {(N, C, P, Q)}")
    channels_last = suggests_channels_last(input)
    x = dense(input)
    grad_input = empty((N, C, H, W), x, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    x = x if x.stride() == grad_input.stride() else torch.empty_like(grad_input).copy_(x)
    slopes = empty((N, C, P, Q), x, channels_last, torch.float64 if acc == tl.float64 else torch.float32)
    dy = torch.empty_like(slopes, dtype=grad_output.dtype).copy_(grad_output)
    sizes, named = (C, H, W, P, Q), dict(NORM=float(norm))
    _run(
        lp_pool2d_slope_kernel, (dy, x, slopes), x, slopes, sizes, acc, kernel_size, stride, INVERSE=1.0 / norm, **named
    )
    windows = {f"WINDOWS_{d}": (k - 1) // s + 1 for d, k, s in zip("HW", kernel_size, stride)}
    _run(
        lp_pool2d_backward_kernel, (slopes, x, grad_input), slopes, grad_input, sizes, acc, kernel_size, stride, **windows,
        **named,
    )
    return grad_input
