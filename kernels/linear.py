"""linear: act(input @ weight^T + bias), its two backwards, and the gradient of an activation.

All three products are one tiled matrix product over strided operands: tiles of the contraction are pipelined through
shared memory into tl.dot, accumulated in float32. The weight's gradient contracts over the rows of the batch, many
for few output tiles: it is split along them, and a second kernel adds the parts in a fixed order, so that the bits
are the same every run; the bias's gradient is summed on the way. Floor: 2 M N K over the tensor cores' peak, or the
operands once over the memory's bandwidth.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._activation import activate, activation_gradient
from dlkern.kernels._launch import (
    accumulator,
    accumulator_dtype,
    allow_tf32_matmul,
    check,
    check_tensors,
    dot_precision,
    is_large,
    launch,
    triton_type,
)
from dlkern.kernels._parts import sum_parts


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, bias_ptr, out_ptr, sum_ptr, M, N, K, K_PART,
    a_stride_m, a_stride_k, b_stride_k, b_stride_n, out_stride_part, out_stride_m,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SUM_ROWS: tl.constexpr, ACC: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    # out[part] = act(a[M, K of part] @ b[K of part, N] + bias); one program computes one tile of one part.
    # Programs run down GROUP_M tiles of rows before the next column, so that tiles in flight share operands in L2.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    tile = tl.program_id(0)
    part = tl.program_id(1)
    group = tile // (GROUP_M * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + tile % (GROUP_M * tiles_n) % rows_in_group
    pid_n = tile % (GROUP_M * tiles_n) // rows_in_group

    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = part * K_PART + tl.arange(0, BLOCK_K)
    k_end = tl.minimum(K, (part + 1) * K_PART)
    if LARGE:
        a_offset = m.to(tl.int64)[:, None] * a_stride_m + k.to(tl.int64)[None, :] * a_stride_k
        b_offset = k.to(tl.int64)[:, None] * b_stride_k + n.to(tl.int64)[None, :] * b_stride_n
    else:
        a_offset = m[:, None] * a_stride_m + k[None, :] * a_stride_k
        b_offset = k[:, None] * b_stride_k + n[None, :] * b_stride_n
    a_ptrs = a_ptr + a_offset
    b_ptrs = b_ptr + b_offset

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    row_sum = tl.zeros((BLOCK_M,), ACC)
    for start in range(part * K_PART, k_end, BLOCK_K):
        in_k = start + tl.arange(0, BLOCK_K) < k_end
        a = tl.load(a_ptrs, mask=(m < M)[:, None] & in_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(b_ptrs, mask=in_k[:, None] & (n < N)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION, out_dtype=ACC)
        if SUM_ROWS:
            row_sum += tl.sum(a.to(ACC), axis=1)
        a_ptrs += BLOCK_K * a_stride_k
        b_ptrs += BLOCK_K * b_stride_k

    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(ACC)[None, :]
    acc = activate(acc, ACTIVATION)
    out_row = part.to(tl.int64) * out_stride_part + m.to(tl.int64) * out_stride_m
    tl.store(
        out_ptr + out_row[:, None] + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :]
    )
    if SUM_ROWS:
        tl.store(sum_ptr + part * M + m, row_sum.to(sum_ptr.dtype.element_ty), mask=(m < M) & (pid_n == 0))


@triton.jit
def activation_backward_kernel(
    grad_output_ptr, output_ptr, grad_ptr, count, ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_output_ptr + i, mask=i < count, other=0.0).to(ACC)
    output = tl.load(output_ptr + i, mask=i < count, other=0.0).to(ACC)
    tl.store(grad_ptr + i, activation_gradient(grad, output, ACTIVATION).to(grad_ptr.dtype.element_ty), mask=i < count)


# --- launchers --------------------------------------------------------------------------------------------------------


def matmul(a, b, out, bias=None, activation=0, parts=1, row_sums=None, row_stride=None, operand=None, allow_tf32=None):
    """out[part] = act(a @ b + bias) over the part's share of K.

    Args:
        a, b: [M, K] and [K, N], of any strides.
        out: [parts, M, N], contiguous, or its rows row_stride apart.
        row_sums: where the sums of a's rows go, [parts, M], or None.
        operand: the dtype to multiply in, None for a's.
        allow_tf32: for float32; torch.backends.cuda.matmul's where None.
    """
    (M, K), N = a.shape, b.shape[1]
    operand = operand or a.dtype
    precision = dot_precision(operand, allow_tf32_matmul() if allow_tf32 is None else allow_tf32)
    config = configs.matmul(a, M, N, K, operand)
    part_length = triton.cdiv(triton.cdiv(K, parts), config["BLOCK_K"]) * config["BLOCK_K"] if parts > 1 else max(K, 1)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * max(triton.cdiv(N, config["BLOCK_N"]), 1)  # no columns: only sums
    launch(
        matmul_kernel, (tiles, parts), a, b, bias if bias is not None else a, out, row_sums if row_sums is not None else out,
        M, N, K, part_length, a.stride(0), a.stride(1), b.stride(0), b.stride(1), M * N, row_stride or N,
        HAS_BIAS=bias is not None, ACTIVATION=activation, SUM_ROWS=row_sums is not None, ACC=accumulator(operand),
        OPERAND=triton_type(operand), PRECISION=precision, LARGE=is_large(a, b), **config,
    )


def weight_gradient(dy, x, grad_weight, grad_bias, **product):
    """grad_weight = dy^T @ x and, unless None, grad_bias = the sum of dy's rows; dy is [rows, N] and x [rows, K].

    product: matmul's operand and allow_tf32.
    """
    (rows, N), K = dy.shape, x.shape[1]
    parts = configs.split(x, N, K, rows)
    if parts == 1:
        matmul(dy.t(), x, grad_weight, row_sums=grad_bias, **product)
        return
    dtype = accumulator_dtype(x.dtype)
    weight_parts = torch.empty((parts, N, K), dtype=dtype, device=x.device)
    bias_parts = None if grad_bias is None else torch.empty((parts, N), dtype=dtype, device=x.device)
    matmul(dy.t(), x, weight_parts, parts=parts, row_sums=bias_parts, **product)
    sum_parts(weight_parts, grad_weight)
    if grad_bias is not None:
        sum_parts(bias_parts, grad_bias)


def _rows(x):
    """x as a matrix of its last dimension."""
    return x.reshape(-1, x.shape[-1])


def linear_forward(input, weight, bias, activation):
    """act(input @ weight^T + bias)."""
    check_tensors("linear", input, weight, bias)
    check(0 <= activation <= 3, f"linear: no activation {activation}")
    check(input.dim() >= 1 and weight.dim() == 2, "linear: expected input [..., K] and weight [N, K]")
    check(input.shape[-1] == weight.shape[1], f"linear: input {tuple(input.shape)} and weight {tuple(weight.shape)}")
    check(bias is None or bias.shape == weight.shape[:1], "linear: expected bias [N]")
    output = torch.empty((*input.shape[:-1], weight.shape[0]), dtype=input.dtype, device=input.device)
    if output.numel():
        bias = bias.contiguous() if bias is not None else None
        matmul(_rows(input), weight.t(), output, bias, activation)
    return output


def linear_backward_input(grad_output, weight):
    """grad_output @ weight."""
    check_tensors("linear_backward_input", grad_output, weight)
    check(grad_output.dim() >= 1 and weight.dim() == 2, "linear_backward_input: expected [..., N] and weight [N, K]")
    check(grad_output.shape[-1] == weight.shape[0], "linear_backward_input: grad_output and weight differ in N")
    grad_input = torch.empty((*grad_output.shape[:-1], weight.shape[1]), dtype=weight.dtype, device=weight.device)
    if grad_input.numel():
        matmul(_rows(grad_output), weight, grad_input)
    return grad_input


def linear_backward_weight(grad_output, input, bias):
    """grad_output^T @ input and, where bias is True, the sum of grad_output over its rows."""
    check_tensors("linear_backward_weight", grad_output, input)
    check(grad_output.dim() == input.dim() >= 1, "linear_backward_weight: expected [..., N] and [..., K]")
    check(grad_output.shape[:-1] == input.shape[:-1], "linear_backward_weight: grad_output and input differ in rows")
    dy, x = _rows(grad_output), _rows(input)
    N, K = dy.shape[1], x.shape[1]
    grad_weight = torch.empty((N, K), dtype=x.dtype, device=x.device)
    grad_bias = torch.empty((N if bias else 0,), dtype=x.dtype, device=x.device)
    if N == 0 or (K == 0 and not bias):
        return grad_weight, grad_bias
    weight_gradient(dy, x, grad_weight, grad_bias if bias else None)
    return grad_weight, grad_bias


def activation_backward(grad_output, output, activation):
    """grad_output * act'(x), from output = act(x)."""
    check_tensors("activation_backward", grad_output, output)
    check(0 <= activation <= 3, f"activation_backward: no activation {activation}")
    check(grad_output.shape == output.shape, "activation_backward: grad_output and output differ in shape")
    grad_output, output = grad_output.contiguous(), output.contiguous()
    grad = torch.empty_like(output)
    if grad.numel():
        config = configs.elementwise(grad)
        launch(
            activation_backward_kernel, (triton.cdiv(grad.numel(), config["BLOCK"]),), grad_output, output, grad,
            grad.numel(), ACTIVATION=activation, ACC=accumulator(grad.dtype), **config,
        )
    return grad
