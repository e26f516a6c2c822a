"""Batch norm in training and evaluation, with the residual add and the activation fused, and the backward.

Training: row blocks x channel tiles each reduce to (mean, M2) of their rows, two passes over the tile and Chan's merge
along the block (raw E[x^2] - E[x]^2 cancels); one small kernel merges the partials in a fixed order and makes the
statistics; a last kernel applies scale, shift, residual and activation. Backward the same way, from the sums of g and
g * xhat. Never one program a channel: 64 channels would half-fill the machine. A "row" is everything but the channel;
in NCHW its offset is split into image and pixel. Floor: 3 S forward and 5 S backward, S the bytes of the input.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._activation import activate, activation_gradient
from dlkern.kernels._launch import accumulator, accumulator_dtype, check, check_tensors, is_large, launch


@triton.jit
def _offsets(row, channel, PIXELS, stride_n, stride_pixel, stride_c, LARGE: tl.constexpr):
    # [BLOCK_M, BLOCK_C] element offsets; row = n * PIXELS + pixel.
    if LARGE:
        row = row.to(tl.int64)
        channel = channel.to(tl.int64)
    return (row // PIXELS * stride_n + row % PIXELS * stride_pixel)[:, None] + (channel * stride_c)[None, :]


# --- statistics -------------------------------------------------------------------------------------------------------


@triton.jit
def batch_norm_partial_kernel(
    x_ptr, mean_ptr, m2_ptr, ROWS, C, ROWS_PER_BLOCK, PIXELS, stride_n, stride_pixel, stride_c,
    ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: (mean, M2) of ROWS_PER_BLOCK rows of BLOCK_C channels.
    block = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum(ROWS, (block + 1) * ROWS_PER_BLOCK)
    count = tl.full((), 0, ACC)
    mean = tl.zeros((BLOCK_C,), ACC)
    m2 = tl.zeros((BLOCK_C,), ACC)
    for start in range(block * ROWS_PER_BLOCK, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & (channel < C)[None, :]
        offset = _offsets(row, channel, PIXELS, stride_n, stride_pixel, stride_c, LARGE)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_C]
        tile_count = tl.minimum(end - start, BLOCK_M).to(ACC)
        rough = tl.sum(x, axis=0) / tile_count
        deviation = tl.where(inside, x - rough[None, :], 0.0)
        tile_mean = rough + tl.sum(deviation, axis=0) / tile_count
        deviation = tl.where(inside, x - tile_mean[None, :], 0.0)
        tile_m2 = tl.sum(deviation * deviation, axis=0)
        # Chan's merge of the tile into the block.
        total = count + tile_count
        delta = tile_mean - mean
        mean += delta * (tile_count / total)
        m2 += tile_m2 + delta * (delta * (count * tile_count / total))
        count = total
    tl.store(mean_ptr + block * C + channel, mean, mask=channel < C)
    tl.store(m2_ptr + block * C + channel, m2, mask=channel < C)


@triton.jit
def batch_norm_finalize_kernel(
    mean_parts_ptr, m2_parts_ptr, running_mean_ptr, running_var_ptr,
    mean_ptr, invstd_ptr, new_running_mean_ptr, new_running_var_ptr,
    ROWS, C, ROWS_PER_BLOCK, BLOCKS, momentum: tl.float64, eps: tl.float64,
    TRACKED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: merges the partials of BLOCK_C channels, in float64 (they are few), as a two-pass variance.
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.cast(ROWS, tl.float64)
    mean = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, BLOCKS, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        inside = (block < BLOCKS)[:, None] & (channel < C)[None, :]
        count = tl.minimum(ROWS - block * ROWS_PER_BLOCK, ROWS_PER_BLOCK).to(tl.float64)
        part = tl.load(mean_parts_ptr + block[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float64)
        mean += tl.sum(part * count[:, None], axis=0)
    mean = mean / rows
    m2 = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, BLOCKS, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        inside = (block < BLOCKS)[:, None] & (channel < C)[None, :]
        count = tl.minimum(ROWS - block * ROWS_PER_BLOCK, ROWS_PER_BLOCK).to(tl.float64)
        part = tl.load(mean_parts_ptr + block[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float64)
        deviation = tl.where(inside, part - mean[None, :], 0.0)
        part_m2 = tl.load(m2_parts_ptr + block[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float64)
        m2 += tl.sum(part_m2 + deviation * deviation * count[:, None], axis=0)
    invstd = 1.0 / tl.sqrt(m2 / rows + eps)
    tl.store(mean_ptr + channel, mean.to(mean_ptr.dtype.element_ty), mask=channel < C)
    tl.store(invstd_ptr + channel, invstd.to(invstd_ptr.dtype.element_ty), mask=channel < C)
    if TRACKED:
        old_mean = tl.load(running_mean_ptr + channel, mask=channel < C, other=0.0).to(tl.float64)
        old_var = tl.load(running_var_ptr + channel, mask=channel < C, other=0.0).to(tl.float64)
        new_mean = (1.0 - momentum) * old_mean + momentum * mean
        new_var = (1.0 - momentum) * old_var + momentum * (m2 / (rows - 1.0))
        dtype = new_running_mean_ptr.dtype.element_ty
        tl.store(new_running_mean_ptr + channel, new_mean.to(dtype), mask=channel < C)
        tl.store(new_running_var_ptr + channel, new_var.to(dtype), mask=channel < C)


# --- application ------------------------------------------------------------------------------------------------------


@triton.jit
def batch_norm_apply_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, mean_ptr, spread_ptr, y_ptr,
    ROWS, C, PIXELS, stride_n, stride_pixel, stride_c, eps: tl.float64,
    VARIANCE: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # y = act((x - mean) * invstd * weight + bias + residual); spread is the variance in evaluation, else invstd.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < ROWS)[:, None] & (channel < C)[None, :]
    offset = _offsets(row, channel, PIXELS, stride_n, stride_pixel, stride_c, LARGE)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0).to(ACC)
    scale = tl.load(spread_ptr + channel, mask=channel < C, other=1.0).to(ACC)
    if VARIANCE:
        scale = 1.0 / tl.sqrt(scale + eps.to(ACC))
    if WEIGHT:
        scale *= tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(ACC)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_C]
    y = (x - mean[None, :]) * scale[None, :]
    if BIAS:
        y += tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(ACC)[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(ACC)
    y = activate(y, ACTIVATION)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _gradient(dy_ptr, y_ptr, offset, inside, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    # The gradient before the activation.
    g = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(ACC)
    if ACTIVATION != 0:
        y = tl.load(y_ptr + offset, mask=inside, other=0.0).to(ACC)
        g = activation_gradient(g, y, ACTIVATION)
    return g


@triton.jit
def batch_norm_backward_partial_kernel(
    dy_ptr, x_ptr, y_ptr, mean_ptr, invstd_ptr, sum_ptr, dot_ptr,
    ROWS, C, ROWS_PER_BLOCK, PIXELS, stride_n, stride_pixel, stride_c,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: sums of g and of g * xhat over ROWS_PER_BLOCK rows of BLOCK_C channels.
    block = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum(ROWS, (block + 1) * ROWS_PER_BLOCK)
    mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0).to(ACC)
    invstd = tl.load(invstd_ptr + channel, mask=channel < C, other=0.0).to(ACC)
    total = tl.zeros((BLOCK_C,), ACC)
    dot = tl.zeros((BLOCK_C,), ACC)
    for start in range(block * ROWS_PER_BLOCK, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & (channel < C)[None, :]
        offset = _offsets(row, channel, PIXELS, stride_n, stride_pixel, stride_c, LARGE)
        g = _gradient(dy_ptr, y_ptr, offset, inside, ACTIVATION, ACC)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(ACC)
        total += tl.sum(g, axis=0)
        dot += tl.sum(g * ((x - mean[None, :]) * invstd[None, :]), axis=0)
    tl.store(sum_ptr + block * C + channel, total, mask=channel < C)
    tl.store(dot_ptr + block * C + channel, dot, mask=channel < C)


@triton.jit
def batch_norm_backward_finalize_kernel(
    sum_parts_ptr, dot_parts_ptr, sum_ptr, dot_ptr, dweight_ptr, dbias_ptr, C, BLOCKS,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float64)
    dot = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, BLOCKS, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        inside = (block < BLOCKS)[:, None] & (channel < C)[None, :]
        offset = block[:, None] * C + channel[None, :]
        total += tl.sum(tl.load(sum_parts_ptr + offset, mask=inside, other=0.0).to(tl.float64), axis=0)
        dot += tl.sum(tl.load(dot_parts_ptr + offset, mask=inside, other=0.0).to(tl.float64), axis=0)
    tl.store(sum_ptr + channel, total.to(sum_ptr.dtype.element_ty), mask=channel < C)
    tl.store(dot_ptr + channel, dot.to(dot_ptr.dtype.element_ty), mask=channel < C)
    tl.store(dweight_ptr + channel, dot.to(dweight_ptr.dtype.element_ty), mask=channel < C)
    tl.store(dbias_ptr + channel, total.to(dbias_ptr.dtype.element_ty), mask=channel < C)


@triton.jit
def batch_norm_backward_apply_kernel(
    dy_ptr, x_ptr, y_ptr, weight_ptr, mean_ptr, invstd_ptr, sum_ptr, dot_ptr, dx_ptr, dresidual_ptr,
    ROWS, C, PIXELS, stride_n, stride_pixel, stride_c,
    TRAIN: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, ACTIVATION: tl.constexpr,
    ACC: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # dx = (g - mean(g) - xhat * mean(g xhat)) * invstd * weight in training, g * invstd * weight on frozen statistics.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < ROWS)[:, None] & (channel < C)[None, :]
    offset = _offsets(row, channel, PIXELS, stride_n, stride_pixel, stride_c, LARGE)
    invstd = tl.load(invstd_ptr + channel, mask=channel < C, other=0.0).to(ACC)
    scale = invstd
    if WEIGHT:
        scale *= tl.load(weight_ptr + channel, mask=channel < C, other=0.0).to(ACC)
    g = _gradient(dy_ptr, y_ptr, offset, inside, ACTIVATION, ACC)
    if RESIDUAL:
        tl.store(dresidual_ptr + offset, g.to(dresidual_ptr.dtype.element_ty), mask=inside)
    if TRAIN:
        rows = tl.cast(ROWS, ACC)
        mean = tl.load(mean_ptr + channel, mask=channel < C, other=0.0).to(ACC)
        mean_g = tl.load(sum_ptr + channel, mask=channel < C, other=0.0) / rows
        mean_dot = tl.load(dot_ptr + channel, mask=channel < C, other=0.0) / rows
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(ACC)
        g = g - mean_g[None, :] - (x - mean[None, :]) * (invstd * mean_dot)[None, :]
    tl.store(dx_ptr + offset, (g * scale[None, :]).to(dx_ptr.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------


def _channels_innermost(x):
    """Whether x is dense with channels innermost (channels_last in 4 or 5 dimensions, or [N, C])."""
    if x.dim() == 2:
        return x.is_contiguous()
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def _dense(x):
    return x if x.is_contiguous() or _channels_innermost(x) else x.contiguous()


def _like(x, other):
    """other, in the memory layout of x."""
    if other is None or other.stride() == x.stride():
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


class _Rows:
    """x as rows x channels, and the launch shared by the kernels over it."""

    def __init__(self, x):
        self.C = x.shape[1]
        self.rows = x.numel() // self.C
        if _channels_innermost(x):
            self.strides = (self.rows, 0, self.C, 1)  # PIXELS, stride_n, stride_pixel, stride_c
        else:
            pixels = x[0, 0].numel()
            self.strides = (pixels, self.C * pixels, 1, pixels)
        self.config = configs.batch_norm(x, self.rows, self.C, self.strides[3] == 1)
        self.blocks, self.rows_per_block = configs.row_blocks(x, self.rows, self.C, self.config)
        self.options = {"ACC": accumulator(x.dtype), "LARGE": is_large(x), **self.config}
        self.small = configs.finalize(x)

    def reduce(self, kernel, *args, **constants):
        grid = (self.blocks, triton.cdiv(self.C, self.config["BLOCK_C"]))
        launch(kernel, grid, *args, self.rows, self.C, self.rows_per_block, *self.strides, **constants, **self.options)

    def finalize(self, kernel, *args, **constants):
        launch(kernel, (triton.cdiv(self.C, self.small["BLOCK_C"]),), *args, **constants, **self.small)

    def apply(self, kernel, *args, extra=(), **constants):
        grid = (triton.cdiv(self.rows, self.config["BLOCK_M"]), triton.cdiv(self.C, self.config["BLOCK_C"]))
        launch(kernel, grid, *args, self.rows, self.C, *self.strides, *extra, **constants, **self.options)


def _check(op, x, per_channel, like_input, activation):
    check_tensors(op, x)
    check(x.dim() >= 2, f"{op}: expected at least 2 dimensions, got {x.dim()}")
    check(0 <= activation <= 3, f"{op}: no activation {activation}")
    for name, t in per_channel.items():
        if t is not None:
            check(t.dim() == 1 and t.shape[0] == x.shape[1], f"{op}: expected {name} [{x.shape[1]}], got {tuple(t.shape)}")
            check(t.device == x.device and t.is_floating_point(), f"{op}: {name} of another device or kind")
    for name, t in like_input.items():
        if t is not None:
            check(t.shape == x.shape and t.dtype == x.dtype and t.device == x.device, f"{op}: {name} does not match input")


def _or(tensor, other):
    """A pointer for an argument the kernel will not read."""
    return other if tensor is None else tensor.contiguous() if tensor.dim() == 1 else tensor


def batch_norm_train_forward(input, residual, weight, bias, running_mean, running_var, momentum, eps, activation):
    """act(batch_norm(input) + residual) by the batch's statistics, which come back with the new running ones."""
    op = "batch_norm"
    per_channel = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check(op, input, per_channel, {"residual": residual}, activation)
    check((running_mean is None) == (running_var is None), f"{op}: one of running_mean and running_var is missing")
    x = _dense(input)
    C, dtype = x.shape[1], accumulator_dtype(x.dtype)
    mean, invstd = (torch.empty(C, dtype=dtype, device=x.device) for _ in range(2))
    tracked = running_mean is not None
    new = [
        torch.empty(C if tracked else 0, dtype=running_mean.dtype if tracked else dtype, device=x.device) for _ in range(2)
    ]
    output = torch.empty_like(x)
    if x.numel() == 0:
        mean.zero_(), invstd.zero_()
        if tracked:
            new[0].copy_(running_mean), new[1].copy_(running_var)
        return output, mean, invstd, *new
    check(x.numel() > C, f"{op}: expected more than 1 value per channel when training, got {tuple(x.shape)}")
    rows = _Rows(x)
    mean_parts, m2_parts = (torch.empty((rows.blocks, C), dtype=dtype, device=x.device) for _ in range(2))
    rows.reduce(batch_norm_partial_kernel, x, mean_parts, m2_parts)
    rows.finalize(
        batch_norm_finalize_kernel, mean_parts, m2_parts, _or(running_mean, mean), _or(running_var, mean), mean, invstd, *new,
        rows.rows, C, rows.rows_per_block, rows.blocks, float(momentum), float(eps), TRACKED=tracked,
    )
    rows.apply(
        batch_norm_apply_kernel, x, _or(_like(x, residual), x), _or(weight, mean), _or(bias, mean), mean, invstd, output,
        extra=(float(eps),), VARIANCE=False, RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        ACTIVATION=activation,
    )
    return output, mean, invstd, *new


def batch_norm_eval_forward(input, residual, weight, bias, running_mean, running_var, eps, activation):
    """act(batch_norm(input) + residual) by the running statistics, which come back as float64 mean and invstd."""
    per_channel = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check("batch_norm", input, per_channel, {"residual": residual}, activation)
    x = _dense(input)
    output = torch.empty_like(x)
    if x.numel():
        _Rows(x).apply(
            batch_norm_apply_kernel, x, _or(_like(x, residual), x), _or(weight, running_mean), _or(bias, running_mean),
            running_mean.contiguous(), running_var.contiguous(), output, extra=(float(eps),), VARIANCE=True,
            RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None, ACTIVATION=activation,
        )
    return output, running_mean.double(), torch.rsqrt(running_var.double() + eps)


def batch_norm_backward(grad_output, input, output, weight, mean, invstd, train, activation, residual):
    """Gradients by input, weight, bias and residual of act(batch_norm(input) + residual)."""
    op = "batch_norm_backward"
    check((output is not None) or activation == 0, f"{op}: the activation's gradient needs the output")
    parameters = {"weight": weight, "mean": mean, "invstd": invstd}
    _check(op, input, parameters, {"grad_output": grad_output, "output": output}, activation)
    x = _dense(input)
    C, dtype = x.shape[1], accumulator_dtype(x.dtype)
    parameter = weight.dtype if weight is not None else dtype
    grad_weight, grad_bias = (torch.empty(C, dtype=parameter, device=x.device) for _ in range(2))
    grad_input = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if residual else torch.empty(0, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_(), grad_residual
    rows = _Rows(x)
    dy, y = _like(x, grad_output), _or(_like(x, output), x)
    mean, invstd = mean.contiguous(), invstd.contiguous()
    sum_parts, dot_parts = (torch.empty((rows.blocks, C), dtype=dtype, device=x.device) for _ in range(2))
    total, dot = (torch.empty(C, dtype=dtype, device=x.device) for _ in range(2))
    rows.reduce(
        batch_norm_backward_partial_kernel, dy, x, y, mean, invstd, sum_parts, dot_parts, ACTIVATION=activation
    )
    rows.finalize(
        batch_norm_backward_finalize_kernel, sum_parts, dot_parts, total, dot, grad_weight, grad_bias, C, rows.blocks
    )
    rows.apply(
        batch_norm_backward_apply_kernel, dy, x, y, _or(weight, mean), mean, invstd, total, dot, grad_input,
        grad_residual if residual else grad_input, TRAIN=train, RESIDUAL=residual, WEIGHT=weight is not None,
        ACTIVATION=activation,
    )
    return grad_input, grad_weight, grad_bias, grad_residual
