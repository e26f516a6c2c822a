"""conv2d and its gradients, as implicit matrix products on the tensor cores: no column matrix is ever stored.
conv_transpose2d is the input gradient, with a bias.

Forward: rows are output pixels (n, p, q), columns output channels, and the contraction runs over (r, s, c) with the
channels innermost, so that channels_last reads are contiguous; NCHW is read through its strides. Where a group has
fewer channels than a tile is deep (stems, grouped convolutions), (r, s, c) is cut as one flat range; depthwise
convolutions are _depthwise.py's.
Input gradient: with stride s, input rows of one residue modulo s see only every s-th filter row, so each residue
class is a dense convolution of its own: no zeros are multiplied, and where the stride exceeds the filter, zeros are
written. Weight gradient: contracts over all pixels, split into parts that a second kernel adds in a fixed order; the
bias's gradient is summed on the way. Floor: 2 N P Q K C R S over the tensor cores' peak, or the tensors once.
"""

import math

import torch
import triton
import triton.language as tl

from dlkern.kernels import _depthwise, configs
from dlkern.kernels._activation import activate
from dlkern.kernels._launch import (
    accumulator,
    accumulator_dtype,
    allow_tf32_cudnn,
    check,
    check_tensors,
    dense,
    dot_precision,
    empty,
    is_large,
    launch,
    suggests_channels_last,
)
from dlkern.kernels._parts import sum_parts


@triton.jit
def conv2d_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, M, C, K, H, W, P, Q,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s,
    y_stride_n, y_stride_k, y_stride_p, y_stride_q,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    FLAT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_M output pixels x BLOCK_N output channels of one group. M = N P Q; C and K are a group's.
    tiles_k = tl.cdiv(K, BLOCK_N)
    m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    if LARGE:
        m = m.to(tl.int64)
        group = group.to(tl.int64)
    q = m % Q
    p = m // Q % P
    n = m // Q // P
    h0 = p * STRIDE_H - PADDING_H
    w0 = q * STRIDE_W - PADDING_W
    x_row = x_ptr + (n * x_stride_n + h0 * x_stride_h + w0 * x_stride_w + group * C * x_stride_c)  # [BLOCK_M]
    weight_column = weight_ptr + (group * K + k) * weight_stride_k  # [BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if FLAT:
        for start in range(0, R * S * C, BLOCK_K):
            rsc = start + tl.arange(0, BLOCK_K)
            c = rsc % C
            r = rsc // C // S
            s = rsc // C % S
            h = h0[:, None] + (r * DILATION_H)[None, :]
            w = w0[:, None] + (s * DILATION_W)[None, :]
            inside = (m < M)[:, None] & (rsc < R * S * C)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_column = r * DILATION_H * x_stride_h + s * DILATION_W * x_stride_w + c * x_stride_c
            x = tl.load(x_row[:, None] + x_column[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
            weight_row = r * weight_stride_r + s * weight_stride_s + c * weight_stride_c
            weight = tl.load(
                weight_column[None, :] + weight_row[:, None], mask=(rsc < R * S * C)[:, None] & (k < K)[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        steps = tl.cdiv(C, BLOCK_K)
        for i in range(0, R * S * steps):
            c = i % steps * BLOCK_K + tl.arange(0, BLOCK_K)
            r = i // steps // S
            s = i // steps % S
            h = h0 + r * DILATION_H
            w = w0 + s * DILATION_W
            inside = (m < M) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            x_column = r * DILATION_H * x_stride_h + s * DILATION_W * x_stride_w + c * x_stride_c
            x = tl.load(x_row[:, None] + x_column[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
            weight_row = r * weight_stride_r + s * weight_stride_s + c * weight_stride_c
            weight = tl.load(
                weight_column[None, :] + weight_row[:, None], mask=(c < C)[:, None] & (k < K)[None, :], other=0.0
            )
            acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + group * K + k, mask=k < K, other=0.0).to(ACC)[None, :]
    y_row = n * y_stride_n + p * y_stride_p + q * y_stride_q
    y_column = (group * K + k) * y_stride_k
    y_tile = y_row[:, None] + y_column[None, :]
    mask = (m < M)[:, None] & (k < K)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + y_tile, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + y_tile, activate(acc, ACTIVATION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residue(residue, size, FILTER: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
             STEP: tl.constexpr):
    # Input rows residue, residue + STRIDE, ...: how many there are, the first filter row that meets an output row
    # there, and how many do (that one, and every STEP-th after it).
    rows = (size - residue + STRIDE - 1) // STRIDE
    first = residue * 0 + FILTER
    for t in tl.static_range(STEP):
        first = tl.where((residue + PADDING - t * DILATION) % STRIDE == 0, t, first)
    return rows, first, (FILTER - first + STEP - 1) // STEP


@triton.jit
def conv2d_backward_input_kernel(
    dy_ptr, weight_ptr, bias_ptr, dx_ptr, N, C, K, H, W, P, Q,
    dy_stride_n, dy_stride_k, dy_stride_p, dy_stride_q, weight_stride_k, weight_stride_c, weight_stride_r, weight_stride_s,
    dx_stride_n, dx_stride_c, dx_stride_h, dx_stride_w,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, HAS_BIAS: tl.constexpr,
    FLAT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_M input pixels of one residue class (h mod STRIDE_H, w mod STRIDE_W) x BLOCK_N input channels
    # of one group. STEP = STRIDE / gcd(STRIDE, DILATION).
    residue_h = tl.program_id(2) // STRIDE_W
    residue_w = tl.program_id(2) % STRIDE_W
    rows, r0, count_r = _residue(residue_h, H, R, STRIDE_H, PADDING_H, DILATION_H, STEP_H)
    columns, s0, count_s = _residue(residue_w, W, S, STRIDE_W, PADDING_W, DILATION_W, STEP_W)
    M = N * rows * columns

    tiles_c = tl.cdiv(C, BLOCK_N)
    m = tl.program_id(0) // tiles_c * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    if LARGE:
        m = m.to(tl.int64)
        group = group.to(tl.int64)
    pixel = m // tl.maximum(columns, 1)
    n = pixel // tl.maximum(rows, 1)
    h = pixel % tl.maximum(rows, 1) * STRIDE_H + residue_h
    w = m % tl.maximum(columns, 1) * STRIDE_W + residue_w
    # Filter row r0 meets output row p0; STEP filter rows on, the output row is DOWN less.
    DOWN_H: tl.constexpr = STEP_H * DILATION_H // STRIDE_H
    DOWN_W: tl.constexpr = STEP_W * DILATION_W // STRIDE_W
    p0 = (h + PADDING_H - r0 * DILATION_H) // STRIDE_H
    q0 = (w + PADDING_W - s0 * DILATION_W) // STRIDE_W
    dy_row = dy_ptr + (n * dy_stride_n + p0 * dy_stride_p + q0 * dy_stride_q + group * K * dy_stride_k)  # [BLOCK_M]
    weight_column = weight_ptr + (
        group * K * weight_stride_k + c * weight_stride_c + r0 * weight_stride_r + s0 * weight_stride_s
    )  # [BLOCK_N]
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if FLAT:
        total = count_r * count_s * K
        for start in range(0, total, BLOCK_K):
            rsk = start + tl.arange(0, BLOCK_K)
            k = rsk % K
            a = rsk // K // tl.maximum(count_s, 1)
            b = rsk // K % tl.maximum(count_s, 1)
            p = p0[:, None] - (a * DOWN_H)[None, :]
            q = q0[:, None] - (b * DOWN_W)[None, :]
            inside = (m < M)[:, None] & (rsk < total)[None, :] & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
            dy_column = k * dy_stride_k - a * DOWN_H * dy_stride_p - b * DOWN_W * dy_stride_q
            dy = tl.load(dy_row[:, None] + dy_column[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_K]
            weight_row = k * weight_stride_k + a * STEP_H * weight_stride_r + b * STEP_W * weight_stride_s
            weight = tl.load(
                weight_column[None, :] + weight_row[:, None], mask=(rsk < total)[:, None] & (c < C)[None, :], other=0.0
            )  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(dy, weight, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        steps = tl.cdiv(K, BLOCK_K)
        for i in range(0, count_r * count_s * steps):
            k = i % steps * BLOCK_K + tl.arange(0, BLOCK_K)
            a = i // steps // count_s
            b = i // steps % count_s
            p = p0 - a * DOWN_H
            q = q0 - b * DOWN_W
            inside = (m < M) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)
            dy_column = k * dy_stride_k - a * DOWN_H * dy_stride_p - b * DOWN_W * dy_stride_q
            dy = tl.load(dy_row[:, None] + dy_column[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
            weight_row = k * weight_stride_k + a * STEP_H * weight_stride_r + b * STEP_W * weight_stride_s
            weight = tl.load(
                weight_column[None, :] + weight_row[:, None], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0
            )
            acc = tl.dot(dy, weight, acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + group * C + c, mask=c < C, other=0.0).to(ACC)[None, :]
    dx_row = n * dx_stride_n + h * dx_stride_h + w * dx_stride_w
    dx_column = (group * C + c) * dx_stride_c
    tl.store(
        dx_ptr + dx_row[:, None] + dx_column[None, :], acc.to(dx_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (c < C)[None, :],
    )


@triton.jit
def conv2d_backward_weight_kernel(
    dy_ptr, x_ptr, dweight_ptr, dbias_ptr, M, M_PART, C, K, GROUPS, H, W, P, Q,
    dy_stride_n, dy_stride_k, dy_stride_p, dy_stride_q, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    dweight_stride_part, dweight_stride_k, dweight_stride_c, dweight_stride_r, dweight_stride_s,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_M output channels x BLOCK_N filter elements (r, s, c) of one group, over one part of the pixels.
    tiles_n = tl.cdiv(R * S * C, BLOCK_N)
    k = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    rsc = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    part = tl.program_id(2)
    c = rsc % C
    r = rsc // C // S
    s = rsc // C % S
    dh = r * DILATION_H - PADDING_H
    dw = s * DILATION_W - PADDING_W
    if LARGE:
        group = group.to(tl.int64)
    dy_channel = dy_ptr + (group * K + k) * dy_stride_k  # [BLOCK_M]
    x_tap = x_ptr + ((group * C + c) * x_stride_c + dh * x_stride_h + dw * x_stride_w)  # [BLOCK_N]
    end = tl.minimum(M, (part + 1) * M_PART)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    bias = tl.zeros((BLOCK_M,), ACC)
    for start in range(part * M_PART, end, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        in_part = m < end
        if LARGE:
            m = m.to(tl.int64)
        q = m % Q
        p = m // Q % P
        n = m // Q // P
        dy_pixel = n * dy_stride_n + p * dy_stride_p + q * dy_stride_q
        dy = tl.load(
            dy_channel[:, None] + dy_pixel[None, :], mask=(k < K)[:, None] & in_part[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        h = (p * STRIDE_H)[:, None] + dh[None, :]
        w = (q * STRIDE_W)[:, None] + dw[None, :]
        inside = in_part[:, None] & (rsc < R * S * C)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        x_pixel = n * x_stride_n + p * STRIDE_H * x_stride_h + q * STRIDE_W * x_stride_w
        x = tl.load(x_tap[None, :] + x_pixel[:, None], mask=inside, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(dy, x, acc, input_precision=PRECISION, out_dtype=ACC)
        if HAS_BIAS:
            bias += tl.sum(dy.to(ACC), axis=1)
    column = c * dweight_stride_c + r * dweight_stride_r + s * dweight_stride_s
    row = part.to(tl.int64) * dweight_stride_part + (group * K + k) * dweight_stride_k
    tl.store(
        dweight_ptr + row[:, None] + column[None, :], acc.to(dweight_ptr.dtype.element_ty),
        mask=(k < K)[:, None] & (rsc < R * S * C)[None, :],
    )
    if HAS_BIAS:
        first = tl.program_id(0) % tiles_n == 0
        tl.store(
            dbias_ptr + part * GROUPS * K + group * K + k, bias.to(dbias_ptr.dtype.element_ty), mask=(k < K) & first
        )


@triton.jit
def channel_sums_kernel(
    dy_ptr, dbias_ptr, M, M_PART, K, P, Q, dy_stride_n, dy_stride_k, dy_stride_p, dy_stride_q,
    ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: the sums of BLOCK_C channels over one part of the pixels.
    k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    if LARGE:
        k = k.to(tl.int64)
    end = tl.minimum(M, (part + 1) * M_PART)
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(part * M_PART, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        in_part = m < end
        if LARGE:
            m = m.to(tl.int64)
        pixel = m // Q // P * dy_stride_n + m // Q % P * dy_stride_p + m % Q * dy_stride_q
        mask = in_part[:, None] & (k < K)[None, :]
        acc += tl.load(dy_ptr + pixel[:, None] + (k * dy_stride_k)[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(dbias_ptr + part * K + k, tl.sum(acc, axis=0).to(dbias_ptr.dtype.element_ty), mask=k < K)


# --- launchers --------------------------------------------------------------------------------------------------------


def _geometry(op, input_size, weight_size, stride, padding, dilation, groups):
    """Checks, and the output's height and width."""
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        fits = len(values) == 2 and all(v >= least for v in values)
        check(fits, f"{op}: {name} must be two numbers >= {least}, got {values}")
    check(len(input_size) == 4 and len(weight_size) == 4, f"{op}: expected a 4-D input and weight")
    check(min(input_size) >= 0 and min(weight_size) >= 0, f"{op}: negative size")
    check(groups >= 1 and weight_size[0] % groups == 0, f"{op}: {weight_size[0]} channels in {groups} groups")
    check(input_size[1] == weight_size[1] * groups, f"{op}: input {tuple(input_size)} and weight {tuple(weight_size)}")
    check(min(weight_size[2:]) >= 1, f"{op}: empty filter")
    out = [
        (size + 2 * pad - dil * (k - 1) - 1) // st + 1
        for size, k, st, pad, dil in zip(input_size[2:], weight_size[2:], stride, padding, dilation)
    ]
    check(min(out) >= 1, f"{op}: the filter is larger than the padded input")
    return out


def _constants(weight_size, stride, padding, dilation):
    names = ("STRIDE", "PADDING", "DILATION")
    result = {f"{name}_{d}": int(v) for name, pair in zip(names, (stride, padding, dilation)) for d, v in zip("HW", pair)}
    return {"R": int(weight_size[2]), "S": int(weight_size[3]), **result}


def _packed(weight):
    """The weight with a group's channels innermost: O(weights), and every tile of it is then read in whole lines."""
    return weight if weight.stride(1) == 1 else weight.contiguous(memory_format=torch.channels_last)


def conv2d_forward(input, weight, bias, stride, padding, dilation, groups):
    """torch.nn.functional.conv2d."""
    return conv2d_act_forward(input, weight, bias, None, stride, padding, dilation, groups, 0)


def conv2d_act_forward(input, weight, bias, residual, stride, padding, dilation, groups, activation):
    """activation(conv2d + residual)."""
    op = "conv2d"
    check_tensors(op, input, weight, bias, residual)
    P, Q = _geometry(op, input.shape, weight.shape, stride, padding, dilation, groups)
    check(bias is None or bias.shape == weight.shape[:1], f"{op}: expected bias [{weight.shape[0]}]")
    check(0 <= activation <= 3, f"{op}: no activation {activation}")
    (N, _, H, W), (K, C, R, S) = input.shape, weight.shape
    channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
    output = empty((N, K, P, Q), input, channels_last)
    if residual is not None:
        check(residual.shape == output.shape, f"{op}: expected a residual {tuple(output.shape)}")
        check(
            all(n <= 1 or a == b for n, a, b in zip(output.shape, residual.stride(), output.stride())),
            f"{op}: the residual is not laid out as the output",
        )
    if output.numel() == 0:
        return output
    bias = bias.contiguous() if bias is not None else None
    constants = _constants(weight.shape, stride, padding, dilation)
    constants |= {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "ACTIVATION": activation}
    extra = bias if bias is not None else weight, residual if residual is not None else weight
    if C == 1 and groups > 1:
        _depthwise.forward(dense(input), weight, *extra, output, groups, constants)
        return output
    x, w = dense(input), _packed(weight)
    M = N * P * Q
    config = configs.conv(x, M, K // groups, C, R * S)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(K // groups, config["BLOCK_N"])
    launch(
        conv2d_forward_kernel, (tiles, groups), x, w, *extra, output,
        M, C, K // groups, H, W, P, Q, *x.stride(), *w.stride(), *output.stride(), **constants,
        ACC=accumulator(x.dtype), PRECISION=dot_precision(x.dtype, allow_tf32_cudnn()), LARGE=is_large(x, w, output), **config,
    )
    return output


def _backward_input(op, grad_output, weight, bias, input_size, stride, padding, dilation, groups, channels_last):
    P, Q = _geometry(op, input_size, weight.shape, stride, padding, dilation, groups)
    (N, _, H, W), (K, C, R, S) = input_size, weight.shape
    check(tuple(grad_output.shape) == (N, K, P, Q), f"{op}: expected grad_output {(N, K, P, Q)}")
    grad_input = empty(tuple(input_size), grad_output, channels_last)
    if grad_input.numel() == 0:
        return grad_input
    if K == 0:
        return grad_input.zero_()
    constants = _constants(weight.shape, stride, padding, dilation)
    bias = bias.contiguous() if bias is not None else None
    if C == 1 and groups > 1:
        _depthwise.backward_input(dense(grad_output), weight, bias, grad_input, constants)
        return grad_input
    dy, w = dense(grad_output), _packed(weight)
    classes = stride[0] * stride[1]
    largest = N * triton.cdiv(H, stride[0]) * triton.cdiv(W, stride[1])  # pixels of a residue class
    config = configs.conv(dy, largest, C, K // groups, R * S)
    tiles = triton.cdiv(largest, config["BLOCK_M"]) * triton.cdiv(C, config["BLOCK_N"])
    steps = {f"STEP_{d}": s // math.gcd(s, dil) for d, s, dil in zip("HW", stride, dilation)}
    launch(
        conv2d_backward_input_kernel, (tiles, groups, classes), dy, w, bias if bias is not None else w, grad_input,
        N, C, K // groups, H, W, P, Q, *dy.stride(), *w.stride(), *grad_input.stride(),
        **constants, **steps, HAS_BIAS=bias is not None,
        ACC=accumulator(dy.dtype), PRECISION=dot_precision(dy.dtype, allow_tf32_cudnn()),
        LARGE=is_large(dy, w, grad_input), **config,
    )
    return grad_input


def conv2d_backward_input(grad_output, weight, input_size, stride, padding, dilation, groups, channels_last):
    """Gradient of conv2d by its input."""
    op = "conv2d_backward_input"
    check_tensors(op, grad_output, weight)
    return _backward_input(op, grad_output, weight, None, input_size, stride, padding, dilation, groups, channels_last)


def conv_transpose2d_forward(input, weight, bias, stride, padding, output_padding, groups, dilation):
    """torch.nn.functional.conv_transpose2d, for an output_padding below the stride."""
    op = "conv_transpose2d"
    check_tensors(op, input, weight, bias)
    check(input.dim() == 4 and weight.dim() == 4, f"{op}: expected a 4-D input and weight")
    check(all(len(v) == 2 for v in (stride, padding, output_padding, dilation)), f"{op}: settings come in twos")
    check(all(0 <= o < s for o, s in zip(output_padding, stride)), f"{op}: output padding must be smaller than stride")
    size = [input.shape[0], weight.shape[1] * groups]
    for i in (0, 1):
        reach = dilation[i] * (weight.shape[2 + i] - 1) + output_padding[i] + 1
        size.append((input.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach)
    check(bias is None or bias.shape == (size[1],), f"{op}: expected bias [{size[1]}]")
    channels_last = suggests_channels_last(input) or suggests_channels_last(weight)
    return _backward_input(op, input, weight, bias, size, stride, padding, dilation, groups, channels_last)


def conv2d_backward_bias(grad_output):
    """The sum of each channel."""
    op = "conv2d_backward_bias"
    check_tensors(op, grad_output)
    check(grad_output.dim() == 4, f"{op}: expected a 4-D grad_output")
    dy = dense(grad_output)
    N, K, P, Q = dy.shape
    grad_bias = torch.empty((K,), dtype=dy.dtype, device=dy.device)
    M = N * P * Q
    if M == 0 or K == 0:
        return grad_bias.zero_()
    config = configs.batch_norm(dy, M, K, dy.stride(1) == 1)
    parts, part_length = configs.row_blocks(dy, M, K, config)
    out = torch.empty((parts, K), dtype=accumulator_dtype(dy.dtype), device=dy.device) if parts > 1 else grad_bias
    launch(
        channel_sums_kernel, (triton.cdiv(K, config["BLOCK_C"]), parts), dy, out, M, part_length, K, P, Q,
        *dy.stride(), ACC=accumulator(dy.dtype), LARGE=is_large(dy), **config,
    )
    if parts > 1:
        sum_parts(out, grad_bias)
    return grad_bias


def conv2d_backward_weight(grad_output, input, weight_size, stride, padding, dilation, groups, bias, channels_last):
    """Gradients of conv2d by its weight and, where bias is True, by its bias."""
    op = "conv2d_backward_weight"
    check_tensors(op, grad_output, input)
    P, Q = _geometry(op, input.shape, weight_size, stride, padding, dilation, groups)
    (N, _, H, W), (K, C, R, S) = input.shape, weight_size
    check(tuple(grad_output.shape) == (N, K, P, Q), f"{op}: expected grad_output {(N, K, P, Q)}")
    grad_weight = empty(tuple(weight_size), input, channels_last)
    grad_bias = torch.empty((K if bias else 0,), dtype=input.dtype, device=input.device)
    if N == 0 or grad_weight.numel() == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    dy, x = dense(grad_output), dense(input)
    constants = _constants(weight_size, stride, padding, dilation)
    if C == 1 and groups > 1:
        _depthwise.backward_weight(dy, x, grad_weight, grad_bias, bias, groups, constants)
        return grad_weight, grad_bias
    M = N * P * Q
    config = configs.conv_weight(x, K // groups, R * S * C, M)
    parts = configs.split(x, K // groups, R * S * C, M, config, groups)
    part_length = triton.cdiv(triton.cdiv(M, parts), config["BLOCK_K"]) * config["BLOCK_K"]
    weight_parts, bias_parts = grad_weight, grad_bias
    if parts > 1:
        dtype = accumulator_dtype(x.dtype)
        weight_parts = torch.empty((parts, grad_weight.numel()), dtype=dtype, device=x.device)
        bias_parts = torch.empty((parts, grad_bias.numel()), dtype=dtype, device=x.device)
    tiles = triton.cdiv(K // groups, config["BLOCK_M"]) * triton.cdiv(R * S * C, config["BLOCK_N"])
    launch(
        conv2d_backward_weight_kernel, (tiles, groups, parts), dy, x, weight_parts, bias_parts if bias else weight_parts,
        M, part_length, C, K // groups, groups, H, W, P, Q, *dy.stride(), *x.stride(), grad_weight.numel(),
        *grad_weight.stride(), **constants, HAS_BIAS=bias,
        ACC=accumulator(x.dtype), PRECISION=dot_precision(x.dtype, allow_tf32_cudnn()), LARGE=is_large(dy, x), **config,
    )
    if parts > 1:
        sum_parts(weight_parts, grad_weight)
        if bias:
            sum_parts(bias_parts, grad_bias)
    return grad_weight, grad_bias
