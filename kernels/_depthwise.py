"""Depthwise conv2d (one input channel a group): direct sums, because a matrix product of depth 1 would idle.

Tiles are pixels x channels, long in the direction that is contiguous; every filter tap is one multiply-add of a tile.
The weight's gradient sums over pixels, split into parts that are added in a fixed order. Floor: the tensors once over
the memory's bandwidth.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._activation import activate
from dlkern.kernels._launch import accumulator, accumulator_dtype, is_large, launch
from dlkern.kernels._parts import sum_parts


@triton.jit
def _pixels(C, ROWS, COLUMNS, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, LARGE: tl.constexpr):
    # The program's tile: flat pixel m, its n, row and column [BLOCK_M], and channels [BLOCK_C].
    tiles_c = tl.cdiv(C, BLOCK_C)
    m = tl.program_id(0) // tiles_c * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    if LARGE:
        m = m.to(tl.int64)
        channel = channel.to(tl.int64)
    return m, m // COLUMNS // ROWS, m // COLUMNS % ROWS, m % COLUMNS, channel


@triton.jit
def depthwise_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, M, K, MULTIPLIER, H, W, P, Q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, weight_stride_k, weight_stride_r, weight_stride_s,
    y_stride_n, y_stride_k, y_stride_p, y_stride_q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_M output pixels x BLOCK_C output channels; output channel k reads input channel k // MULTIPLIER.
    m, n, p, q, k = _pixels(K, P, Q, BLOCK_M, BLOCK_C, LARGE)
    tile = x_ptr + (n * x_stride_n)[:, None] + (k // MULTIPLIER * x_stride_c)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for r in range(R):
        h = p * STRIDE_H - PADDING_H + r * DILATION_H
        for s in range(S):
            w = q * STRIDE_W - PADDING_W + s * DILATION_W
            inside = (m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            offset = h * x_stride_h + w * x_stride_w
            x = tl.load(tile + offset[:, None], mask=inside[:, None] & (k < K)[None, :], other=0.0).to(ACC)
            tap = weight_ptr + k * weight_stride_k + r * weight_stride_r + s * weight_stride_s
            acc += x * tl.load(tap, mask=k < K, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(ACC)[None, :]
    y_offset = (n * y_stride_n + p * y_stride_p + q * y_stride_q)[:, None] + (k * y_stride_k)[None, :]
    mask = (m < M)[:, None] & (k < K)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + y_offset, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + y_offset, activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_backward_input_kernel(
    dy_ptr, weight_ptr, bias_ptr, dx_ptr, M, C, MULTIPLIER, H, W, P, Q,
    dy_stride_n, dy_stride_k, dy_stride_p, dy_stride_q, weight_stride_k, weight_stride_r, weight_stride_s,
    dx_stride_n, dx_stride_c, dx_stride_h, dx_stride_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_M input pixels x BLOCK_C input channels; taps that meet no output pixel are not loaded.
    m, n, h, w, c = _pixels(C, H, W, BLOCK_M, BLOCK_C, LARGE)
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for member in range(MULTIPLIER):
        k = c * MULTIPLIER + member
        tile = dy_ptr + (n * dy_stride_n)[:, None] + (k * dy_stride_k)[None, :]
        for r in range(R):
            reach_h = h + PADDING_H - r * DILATION_H
            p = reach_h // STRIDE_H
            row = (m < M) & (reach_h >= 0) & (reach_h % STRIDE_H == 0) & (p < P)
            for s in range(S):
                reach_w = w + PADDING_W - s * DILATION_W
                q = reach_w // STRIDE_W
                inside = row & (reach_w >= 0) & (reach_w % STRIDE_W == 0) & (q < Q)
                offset = p * dy_stride_p + q * dy_stride_q
                dy = tl.load(tile + offset[:, None], mask=inside[:, None] & (c < C)[None, :], other=0.0).to(ACC)
                tap = weight_ptr + k * weight_stride_k + r * weight_stride_r + s * weight_stride_s
                acc += dy * tl.load(tap, mask=c < C, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    dx_offset = (n * dx_stride_n + h * dx_stride_h + w * dx_stride_w)[:, None] + (c * dx_stride_c)[None, :]
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


@triton.jit
def depthwise_backward_weight_kernel(
    dy_ptr, x_ptr, dweight_ptr, dbias_ptr, M, M_PART, K, MULTIPLIER, H, W, P, Q,
    dy_stride_n, dy_stride_k, dy_stride_p, dy_stride_q, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    dweight_stride_part, dweight_stride_k, dweight_stride_r, dweight_stride_s,
    S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: one filter tap of BLOCK_C output channels over one part of the output pixels.
    k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) // S
    s = tl.program_id(1) % S
    part = tl.program_id(2)
    end = tl.minimum(M, (part + 1) * M_PART)
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    bias = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(part * M_PART, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        in_part = m < end
        if LARGE:
            m = m.to(tl.int64)
        q = m % Q
        p = m // Q % P
        n = m // Q // P
        dy_offset = (n * dy_stride_n + p * dy_stride_p + q * dy_stride_q)[:, None] + (k * dy_stride_k)[None, :]
        dy = tl.load(dy_ptr + dy_offset, mask=in_part[:, None] & (k < K)[None, :], other=0.0).to(ACC)
        h = p * STRIDE_H - PADDING_H + r * DILATION_H
        w = q * STRIDE_W - PADDING_W + s * DILATION_W
        inside = in_part & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_offset = (n * x_stride_n + h * x_stride_h + w * x_stride_w)[:, None] + (k // MULTIPLIER * x_stride_c)[None, :]
        acc += dy * tl.load(x_ptr + x_offset, mask=inside[:, None] & (k < K)[None, :], other=0.0).to(ACC)
        if HAS_BIAS:
            bias += dy
    out = part.to(tl.int64) * dweight_stride_part + k * dweight_stride_k + r * dweight_stride_r + s * dweight_stride_s
    tl.store(dweight_ptr + out, tl.sum(acc, axis=0).to(dweight_ptr.dtype.element_ty), mask=k < K)
    if HAS_BIAS:
        first = tl.program_id(1) == 0
        tl.store(dbias_ptr + part * K + k, tl.sum(bias, axis=0).to(dbias_ptr.dtype.element_ty), mask=(k < K) & first)


# --- launchers: called by conv.py with checked arguments --------------------------------------------------------------


def _options(x, config, constants):
    return {**constants, **config, "ACC": accumulator(x.dtype)}


def _taps(weight):
    stride_k, _, stride_r, stride_s = weight.stride()
    return stride_k, stride_r, stride_s


def forward(x, weight, bias, residual, output, groups, constants):
    (K, P, Q), (H, W) = output.shape[1:], x.shape[2:]
    M = output.shape[0] * P * Q
    config = configs.batch_norm(x, M, K, x.stride(1) == 1)
    launch(
        depthwise_forward_kernel, (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_C"]),),
        x, weight, bias, residual, output, M, K, K // groups, H, W, P, Q,
        *x.stride(), *_taps(weight), *output.stride(), LARGE=is_large(x, output),
        **_options(x, config, constants),
    )


def backward_input(dy, weight, bias, grad_input, constants):
    (C, H, W), (K, P, Q) = grad_input.shape[1:], dy.shape[1:]
    M = grad_input.shape[0] * H * W
    config = configs.batch_norm(dy, M, C, dy.stride(1) == 1)
    launch(
        depthwise_backward_input_kernel, (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(C, config["BLOCK_C"]),),
        dy, weight, bias if bias is not None else weight, grad_input, M, C, K // C, H, W, P, Q,
        *dy.stride(), *_taps(weight), *grad_input.stride(), HAS_BIAS=bias is not None, LARGE=is_large(dy, grad_input),
        **_options(dy, config, constants),
    )


def backward_weight(dy, x, grad_weight, grad_bias, bias, groups, constants):
    constants = dict(constants)
    R, S = constants.pop("R"), constants["S"]
    (K, P, Q), (H, W) = dy.shape[1:], x.shape[2:]
    M = dy.shape[0] * P * Q
    config = configs.batch_norm(x, M, K, x.stride(1) == 1)
    parts, part_length = configs.row_blocks(x, M, K * R * S, config)
    weight_parts, bias_parts = grad_weight, grad_bias
    if parts > 1:
        dtype = accumulator_dtype(x.dtype)
        weight_parts = torch.empty((parts, grad_weight.numel()), dtype=dtype, device=x.device)
        bias_parts = torch.empty((parts, grad_bias.numel()), dtype=dtype, device=x.device)
    launch(
        depthwise_backward_weight_kernel, (triton.cdiv(K, config["BLOCK_C"]), R * S, parts),
        dy, x, weight_parts, bias_parts if bias else weight_parts, M, part_length, K, K // groups, H, W, P, Q,
        *dy.stride(), *x.stride(), grad_weight.numel(), *_taps(grad_weight), HAS_BIAS=bias, LARGE=is_large(dy, x),
        **_options(x, config, constants),
    )
    if parts > 1:
        sum_parts(weight_parts, grad_weight)
        if bias:
            sum_parts(bias_parts, grad_bias)
