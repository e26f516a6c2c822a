"""Rotary positions (Su et al. 2021): each pair of a row's elements turned by an angle of its position.

A program turns some pairs of some rows, a row being a head at a position; the gradient is the same with the angle turned
round. Rows lie in the order of x, heads inside positions or the other way round, and share angles that broadcast. Floor:
one read and one write of the tensor, and one read of the angles.
"""

import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import accumulator, accumulator_dtype, check, check_tensors, is_large, launch


@triton.jit
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, output_ptr, ROWS, HEADS, LENGTH, DEPTH, HALF, x_strides, angle_strides, output_strides,
    SWAPPED: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr, LARGE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # One program: BLOCK rows x BLOCK_D pairs, or of elements behind all pairs, which are copied.
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if LARGE:
        row = row.to(tl.int64)
    if SWAPPED:  # [A, L, B, D]
        j = row % HEADS
        position = row // HEADS % LENGTH
    else:  # [A, B, L, D]
        position = row % LENGTH
        j = row // LENGTH % HEADS
    i = row // LENGTH // HEADS
    x_at = x_ptr + (i * x_strides[0] + j * x_strides[1] + position * x_strides[2])[:, None]
    y_at = output_ptr + (i * output_strides[0] + j * output_strides[1] + position * output_strides[2])[:, None]
    blocks = tl.cdiv(HALF, BLOCK_D)
    block = tl.program_id(1)
    if block < blocks:
        d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (row < ROWS)[:, None] & (d < HALF)[None, :]
        angle = (i * angle_strides[0] + j * angle_strides[1] + position * angle_strides[2])[:, None] + d[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(ACC)  # [BLOCK, BLOCK_D]
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(ACC)
        if INVERSE:
            sin = -sin
        if INTERLEAVED:  # pairs are loaded whole
            both = 2 * block * BLOCK_D + tl.arange(0, 2 * BLOCK_D)
            within = (row < ROWS)[:, None] & (both < 2 * HALF)[None, :]
            pairs = tl.load(x_at + (both * x_strides[3])[None, :], mask=within, other=0.0).to(ACC)
            a, b = tl.split(tl.reshape(pairs, (BLOCK, BLOCK_D, 2)))
            y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK, 2 * BLOCK_D))
            tl.store(y_at + both[None, :], y.to(output_ptr.dtype.element_ty), mask=within)
        else:
            a = tl.load(x_at + (d * x_strides[3])[None, :], mask=inside, other=0.0).to(ACC)
            b = tl.load(x_at + ((HALF + d) * x_strides[3])[None, :], mask=inside, other=0.0).to(ACC)
            tl.store(y_at + d[None, :], (a * cos - b * sin).to(output_ptr.dtype.element_ty), mask=inside)
            tl.store(y_at + (HALF + d)[None, :], (b * cos + a * sin).to(output_ptr.dtype.element_ty), mask=inside)
    else:
        d = 2 * HALF + (block - blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (row < ROWS)[:, None] & (d < DEPTH)[None, :]
        x = tl.load(x_at + (d * x_strides[3])[None, :], mask=inside, other=0.0)
        tl.store(y_at + d[None, :], x.to(output_ptr.dtype.element_ty), mask=inside)


def turned(x, cos, sin, interleaved, inverse, dtype):
    """rotary of x, whose arguments are valid, as `dtype`; of cos and sin the first L positions."""
    a, b, length, depth = x.shape
    half, swapped = cos.shape[3], x.stride(1) < x.stride(2)
    if swapped:  # in x's order of heads and positions
        output = x.new_empty((a, length, b, depth), dtype=dtype).transpose(1, 2)
    else:
        output = x.new_empty(x.shape, dtype=dtype)
    if output.numel() == 0:
        return output
    cos, sin = cos.contiguous(), sin.contiguous()
    angle_strides = tuple(0 if n == 1 else s for n, s in zip(cos.shape, cos.stride()))
    config = configs.rotary(x, max(half, depth - 2 * half))
    blocks = triton.cdiv(half, config["BLOCK_D"]) + triton.cdiv(depth - 2 * half, config["BLOCK_D"])
    launch(
        rotary_kernel, (triton.cdiv(a * b * length, config["BLOCK"]), blocks), x, cos, sin, output, a * b * length, b,
        length, depth, half, x.stride(), angle_strides[:3], output.stride()[:3], SWAPPED=swapped, INTERLEAVED=interleaved,
        INVERSE=inverse, ACC=accumulator(x.dtype), LARGE=is_large(x, output, cos), **config,
    )
    return output


def rotary(x, cos, sin, interleaved, inverse):
    """Turns x [A, B, L, D] by cos and sin [A or 1, B or 1, L, half]; the result is in x's order of B and L."""
    op = "rotary"
    check_tensors(op, x)
    check(x.dim() == 4 and cos.dim() == 4, f"{op}: x and cos must have 4 dimensions")
    check(cos.shape == sin.shape, f"{op}: cos and sin differ in shape")
    fits = all(n in (1, size) for n, size in zip(cos.shape[:2], x.shape))
    check(fits, f"{op}: cos does not broadcast to x")
    check(cos.shape[2] == x.shape[2] and 2 * cos.shape[3] <= x.shape[3], f"{op}: cos does not fit x")
    known = cos.dtype == sin.dtype and cos.dtype in (x.dtype, accumulator_dtype(x.dtype))
    check(known, f"{op}: cos and sin must be in the dtype of x or of its sums")
    check(x.device == cos.device == sin.device, f"{op}: tensors are not all on one device")
    return turned(x, cos, sin, interleaved, inverse, x.dtype)
