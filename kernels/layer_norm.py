"""layer_norm: (x - mean) * rstd * weight + bias over the last dimensions, rows of numbers side by side.

A row that one block holds is read once and stays in registers while mean and squared deviations are summed and the
result is written; a longer one is read block after block, twice, and the blocks' moments are merged by Chan's formula.
Backward: a program takes some rows one after another, writes the input's gradient and keeps the sums for weight and
bias in registers; one more kernel adds the programs' sums in a fixed order. Where rows are longer than a block those
sums are a kernel of their own over tiles. Floor: one read and one write forward, two reads and one write backward.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import accumulator, accumulator_dtype, check, check_tensors, launch


@triton.jit
def _load(row_ptr, row, column, ROWS, COLUMNS, ACC: tl.constexpr):
    # [BLOCK_M, BLOCK_N] of rows that begin at row_ptr.
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(row_ptr[:, None] + column[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _moments(x, inside, count):
    # Mean and sum of squared deviations of each row; the mean is corrected by the mean of the deviations.
    rough = tl.sum(x, axis=1) / count
    deviation = tl.where(inside, x - rough[:, None], 0.0)
    mean = rough + tl.sum(deviation, axis=1) / count
    deviation = tl.where(inside, x - mean[:, None], 0.0)
    return mean, tl.sum(deviation * deviation, axis=1)


@triton.jit
def _normalize(
    y_ptr, x, weight_ptr, bias_ptr, mean, rstd, row, column, ROWS, COLUMNS,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
):
    y = (x - mean[:, None]) * rstd[:, None]
    if WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(ACC)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < COLUMNS, other=0.0).to(ACC)[None, :]
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(y_ptr[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, ROWS, COLUMNS, eps: tl.float64,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, FITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # One program: BLOCK_M rows. FITS: a block holds a row.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptr += row.to(tl.int64) * COLUMNS
    y_ptr += row.to(tl.int64) * COLUMNS
    column = tl.arange(0, BLOCK_N)
    count = tl.cast(COLUMNS, ACC)
    if FITS:
        x = _load(x_ptr, row, column, ROWS, COLUMNS, ACC)
        mean, m2 = _moments(x, (column < COLUMNS)[None, :], count)
    else:
        mean = tl.zeros((BLOCK_M,), ACC)
        m2 = tl.zeros((BLOCK_M,), ACC)
        seen = tl.full((), 0, ACC)
        for start in range(0, COLUMNS, BLOCK_N):
            x = _load(x_ptr, row, start + column, ROWS, COLUMNS, ACC)
            here = tl.minimum(COLUMNS - start, BLOCK_N).to(ACC)
            block_mean, block_m2 = _moments(x, (start + column < COLUMNS)[None, :], here)
            total = seen + here
            delta = block_mean - mean
            mean += delta * (here / total)
            m2 += block_m2 + delta * (delta * (seen * here / total))
            seen = total
    # One number a row: in float64, so that it is rounded once.
    rstd = (1.0 / tl.sqrt((m2 / count).to(tl.float64) + eps)).to(ACC)
    tl.store(mean_ptr + row, mean, mask=row < ROWS)
    tl.store(rstd_ptr + row, rstd, mask=row < ROWS)
    if FITS:
        _normalize(y_ptr, x, weight_ptr, bias_ptr, mean, rstd, row, column, ROWS, COLUMNS, WEIGHT, BIAS, ACC)
    else:
        for start in range(0, COLUMNS, BLOCK_N):
            x = _load(x_ptr, row, start + column, ROWS, COLUMNS, ACC)
            _normalize(y_ptr, x, weight_ptr, bias_ptr, mean, rstd, row, start + column, ROWS, COLUMNS, WEIGHT, BIAS, ACC)


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _gradients(
    dy_ptr, x_ptr, weight_ptr, mean, rstd, row, column, ROWS, COLUMNS, WEIGHT: tl.constexpr, ACC: tl.constexpr
):
    # g, g * weight and xhat of a tile; g is zero outside.
    g = _load(dy_ptr, row, column, ROWS, COLUMNS, ACC)
    xhat = (_load(x_ptr, row, column, ROWS, COLUMNS, ACC) - mean[:, None]) * rstd[:, None]
    weighted = g
    if WEIGHT:
        weighted = g * tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(ACC)[None, :]
    return g, weighted, xhat


@triton.jit
def _store_gradient(dx_ptr, weighted, xhat, first, second, rstd, row, column, ROWS, COLUMNS):
    dx = ((weighted - first[:, None]) - xhat * second[:, None]) * rstd[:, None]
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(dx_ptr[:, None] + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_parts_ptr, dbias_parts_ptr,
    ROWS, COLUMNS, ROWS_PER_PROGRAM,
    WEIGHT: tl.constexpr, SUMS: tl.constexpr, ACC: tl.constexpr, FITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # One program: ROWS_PER_PROGRAM rows, BLOCK_M at a time. SUMS (where FITS): their part of the other two gradients too.
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    count = tl.cast(COLUMNS, ACC)
    dweight = tl.zeros((BLOCK_N,), ACC)
    dbias = tl.zeros((BLOCK_N,), ACC)
    end = tl.minimum(ROWS, (program + 1) * ROWS_PER_PROGRAM)
    for row_start in range(program * ROWS_PER_PROGRAM, end, BLOCK_M):
        row = row_start + tl.arange(0, BLOCK_M)
        offset = row.to(tl.int64) * COLUMNS
        dy, x, dx = dy_ptr + offset, x_ptr + offset, dx_ptr + offset
        mean = tl.load(mean_ptr + row, mask=row < ROWS, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < ROWS, other=0.0)
        if FITS:
            g, weighted, xhat = _gradients(dy, x, weight_ptr, mean, rstd, row, column, ROWS, COLUMNS, WEIGHT, ACC)
            first = tl.sum(weighted, axis=1) / count
            second = tl.sum(weighted * xhat, axis=1) / count
            _store_gradient(dx, weighted, xhat, first, second, rstd, row, column, ROWS, COLUMNS)
            if SUMS:
                dweight += tl.sum(g * xhat, axis=0)
                dbias += tl.sum(g, axis=0)
        else:
            first = tl.zeros((BLOCK_M,), ACC)
            second = tl.zeros((BLOCK_M,), ACC)
            for start in range(0, COLUMNS, BLOCK_N):
                at = start + column
                g, weighted, xhat = _gradients(dy, x, weight_ptr, mean, rstd, row, at, ROWS, COLUMNS, WEIGHT, ACC)
                first += tl.sum(weighted, axis=1) / count
                second += tl.sum(weighted * xhat, axis=1) / count
            for start in range(0, COLUMNS, BLOCK_N):
                at = start + column
                g, weighted, xhat = _gradients(dy, x, weight_ptr, mean, rstd, row, at, ROWS, COLUMNS, WEIGHT, ACC)
                _store_gradient(dx, weighted, xhat, first, second, rstd, row, at, ROWS, COLUMNS)
    if SUMS:
        part = program.to(tl.int64) * COLUMNS + column
        tl.store(dweight_parts_ptr + part, dweight, mask=column < COLUMNS)
        tl.store(dbias_parts_ptr + part, dbias, mask=column < COLUMNS)


@triton.jit
def layer_norm_backward_weight_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dweight_parts_ptr, dbias_parts_ptr, ROWS, COLUMNS, ROWS_PER_PROGRAM,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program: sums of g * xhat and of g over ROWS_PER_PROGRAM rows of BLOCK_C columns.
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_C,), ACC)
    dbias = tl.zeros((BLOCK_C,), ACC)
    end = tl.minimum(ROWS, (program + 1) * ROWS_PER_PROGRAM)
    for row_start in range(program * ROWS_PER_PROGRAM, end, BLOCK_M):
        row = row_start + tl.arange(0, BLOCK_M)
        offset = row.to(tl.int64) * COLUMNS
        mean = tl.load(mean_ptr + row, mask=row < end, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < end, other=0.0)
        g, _, xhat = _gradients(dy_ptr + offset, x_ptr + offset, dy_ptr, mean, rstd, row, column, end, COLUMNS, False, ACC)
        dweight += tl.sum(g * xhat, axis=0)
        dbias += tl.sum(g, axis=0)
    part = program.to(tl.int64) * COLUMNS + column
    tl.store(dweight_parts_ptr + part, dweight, mask=column < COLUMNS)
    tl.store(dbias_parts_ptr + part, dbias, mask=column < COLUMNS)


@triton.jit
def layer_norm_backward_finalize_kernel(
    dweight_parts_ptr, dbias_parts_ptr, dweight_ptr, dbias_ptr, COLUMNS, PARTS,
    OF_WEIGHT: tl.constexpr, OF_BIAS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):
    # One program adds the parts of BLOCK_C columns, in float64 (they are few).
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_C,), tl.float64)
    dbias = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, PARTS, BLOCK_B):
        part = start + tl.arange(0, BLOCK_B)
        inside = (part < PARTS)[:, None] & (column < COLUMNS)[None, :]
        offset = part.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        if OF_WEIGHT:
            dweight += tl.sum(tl.load(dweight_parts_ptr + offset, mask=inside, other=0.0).to(tl.float64), axis=0)
        if OF_BIAS:
            dbias += tl.sum(tl.load(dbias_parts_ptr + offset, mask=inside, other=0.0).to(tl.float64), axis=0)
    if OF_WEIGHT:
        tl.store(dweight_ptr + column, dweight.to(dweight_ptr.dtype.element_ty), mask=column < COLUMNS)
    if OF_BIAS:
        tl.store(dbias_ptr + column, dbias.to(dbias_ptr.dtype.element_ty), mask=column < COLUMNS)


# --- launchers --------------------------------------------------------------------------------------------------------


def _check(op, input, dims, **parameters):
    """Rows and columns of the input, checked with the parameters, which may be float32 beside 16-bit input."""
    check_tensors(op, input)
    check(1 <= dims <= input.dim(), f"{op}: cannot normalize {dims} of {input.dim()} dimensions")
    shape = input.shape[input.dim() - dims :]
    for name, x in parameters.items():
        if x is not None:
            check(x.device == input.device, f"{op}: {name} on {x.device}, input on {input.device}")
            check(x.shape == shape, f"{op}: {name} {tuple(x.shape)} is not of the normalized shape {tuple(shape)}")
            wide = input.element_size() == 2 and x.dtype == torch.float32
            check(wide or x.dtype == input.dtype, f"{op}: input of {input.dtype} and {name} of {x.dtype}")
    columns = shape.numel()
    return input.shape[: input.dim() - dims].numel(), columns


def _or(tensor, other):
    """A pointer for an argument the kernel will not read."""
    return other if tensor is None else tensor.contiguous()


def layer_norm_forward(input, dims, weight, bias, eps):
    """(input - mean) * rstd * weight + bias over the last dims dimensions, and mean and rstd of each row."""
    rows, columns = _check("layer_norm", input, dims, weight=weight, bias=bias)
    x, dtype = input.contiguous(), accumulator_dtype(input.dtype)
    output = torch.empty_like(x)
    mean, rstd = (torch.empty(rows, dtype=dtype, device=x.device) for _ in range(2))
    if columns == 0:
        return output, mean.zero_(), rstd.zero_()
    if rows:
        tile = configs.layer_norm(x, columns)
        launch(
            layer_norm_forward_kernel, (triton.cdiv(rows, tile["BLOCK_M"]),), x, _or(weight, x), _or(bias, x), output, mean,
            rstd, rows, columns, float(eps), WEIGHT=weight is not None, BIAS=bias is not None, ACC=accumulator(x.dtype),
            FITS=columns <= tile["BLOCK_N"], **tile,
        )
    return output, mean, rstd


def layer_norm_backward(grad_output, input, dims, weight, mean, rstd, of_input, of_weight, of_bias):
    """Gradients of input, weight and bias; what is not wanted is of size [0]."""
    op = "layer_norm_backward"
    rows, columns = _check(op, input, dims, weight=weight)
    check_tensors(op, input, grad_output)
    check(grad_output.shape == input.shape, f"{op}: grad_output and input differ in shape")
    dtype = accumulator_dtype(input.dtype)
    for x in (mean, rstd):
        fits = x.shape == (rows,) and x.dtype == dtype and x.device == input.device
        check(fits, f"{op}: mean or rstd is not what layer_norm_forward gave")
    dy, x, mean, rstd = (t.contiguous() for t in (grad_output, input, mean, rstd))
    shape, parameter = input.shape[input.dim() - dims :], input.dtype if weight is None else weight.dtype
    dx = torch.empty_like(x) if of_input else x.new_empty(0)
    dweight = torch.empty(shape if of_weight else 0, dtype=parameter, device=x.device)
    dbias = torch.empty(shape if of_bias else 0, dtype=parameter, device=x.device)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    sums = of_weight or of_bias
    tile = configs.layer_norm(x, columns)
    fits = columns <= tile["BLOCK_N"]
    together = sums and of_input and fits
    column_tile = configs.batch_norm(x, rows, columns, True)
    if together:
        parts, part_rows = configs.layer_norm_parts(x, rows, tile)
    else:
        parts, part_rows = configs.row_blocks(x, rows, columns, column_tile)
    dweight_parts, dbias_parts = (torch.empty((parts if sums else 0, columns), dtype=dtype, device=x.device) for _ in range(2))
    if of_input:
        programs, program_rows = (parts, part_rows) if together else (triton.cdiv(rows, tile["BLOCK_M"]), tile["BLOCK_M"])
        launch(
            layer_norm_backward_kernel, (programs,), dy, x, _or(weight, x), mean, rstd, dx, dweight_parts, dbias_parts, rows,
            columns, program_rows, WEIGHT=weight is not None, SUMS=together, ACC=accumulator(x.dtype), FITS=fits, **tile,
        )
    if sums and not together:
        launch(
            layer_norm_backward_weight_kernel, (parts, triton.cdiv(columns, column_tile["BLOCK_C"])), dy, x, mean, rstd,
            dweight_parts, dbias_parts, rows, columns, part_rows, ACC=accumulator(x.dtype), **column_tile,
        )
    if sums:
        small = configs.finalize(x)
        launch(
            layer_norm_backward_finalize_kernel, (triton.cdiv(columns, small["BLOCK_C"]),), dweight_parts, dbias_parts,
            dweight, dbias, columns, parts, OF_WEIGHT=of_weight, OF_BIAS=of_bias, **small,
        )
    return dx, dweight, dbias
