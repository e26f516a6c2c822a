"""embedding: rows of a table, and the gradient of the table.

Forward: one program copies a block of columns of a few rows. Backward: the positions are sorted by row, stably, and the
program of a row's first position sums all of its rows of grad_output, a few at a time in their order, so that there are no
atomics and the bits are the same every time; rows that do not occur stay zero. An index outside the table gives NaN and
takes no gradient (the launcher raises where the indices are on the host: looking at them on a GPU would wait for it).
Floor: the rows read and written once; backward grad_output read once and the table's gradient written once.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import accumulator, check, check_tensors, is_large, launch


@triton.jit
def embedding_forward_kernel(
    weight_ptr, index_ptr, output_ptr, COUNT, ROWS, WIDTH, stride_row, stride_column,
    LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # One program: BLOCK_M positions x BLOCK_D columns.
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if LARGE:
        position = position.to(tl.int64)
    row = tl.load(index_ptr + position, mask=position < COUNT, other=0).to(tl.int64)
    exists = (row >= 0) & (row < ROWS)
    inside = (position < COUNT)[:, None] & (column < WIDTH)[None, :]
    at = weight_ptr + row[:, None] * stride_row + (column * stride_column)[None, :]
    x = tl.load(at, mask=inside & exists[:, None], other=float("nan"))  # [BLOCK_M, BLOCK_D]
    tl.store(output_ptr + position[:, None] * WIDTH + column[None, :], x, mask=inside)


@triton.jit
def embedding_backward_kernel(
    grad_ptr, sorted_ptr, order_ptr, grad_weight_ptr, COUNT, ROWS, WIDTH, padding_idx,
    SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # One program: a place among the sorted positions x BLOCK_D columns; it works where a row's positions begin.
    place = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(sorted_ptr + place)
    before = tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1)
    going = (row != before) & (row >= 0) & (row < ROWS)
    if going:
        total = tl.zeros((BLOCK_D,), ACC)
        count = tl.zeros((), tl.int32)
        start = place
        while going:
            p = start + tl.arange(0, BLOCK_P)
            ours = tl.load(sorted_ptr + p, mask=p < COUNT, other=-1) == row
            position = tl.load(order_ptr + p, mask=ours, other=0)  # int64
            inside = ours[:, None] & (column < WIDTH)[None, :]
            g = tl.load(grad_ptr + position[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
            total += tl.sum(g.to(ACC), axis=0)  # of [BLOCK_P, BLOCK_D]
            count += tl.sum(ours.to(tl.int32), axis=0)
            start += BLOCK_P
            going = tl.load(sorted_ptr + start, mask=start < COUNT, other=-1) == row
        if SCALE:
            total = total / count.to(ACC)
        total = tl.where(row == padding_idx, 0.0, total)
        tl.store(
            grad_weight_ptr + row * WIDTH + column, total.to(grad_weight_ptr.dtype.element_ty), mask=column < WIDTH
        )


# --- launchers --------------------------------------------------------------------------------------------------------


def _check_indices(op, indices, rows, other):
    check(indices.dtype in (torch.int64, torch.int32), f"{op}: indices are not int64 or int32")
    check(indices.device == other.device, f"{op}: tensors on {other.device} and {indices.device}")
    if indices.device.type == "cpu" and ((indices < 0) | (indices >= rows)).any():
        raise IndexError("index out of range in self")


def embedding_forward(weight, indices):
    """Rows `indices` of weight [V, D]: [*, D]."""
    op = "embedding"
    check_tensors(op, weight)
    check(weight.dim() == 2, "'weight' must be 2-D")
    rows, width = weight.shape
    _check_indices(op, indices, rows, weight)
    output = torch.empty((*indices.shape, width), dtype=weight.dtype, device=weight.device)
    if output.numel():
        count, config = indices.numel(), configs.embedding(weight, width)
        launch(
            embedding_forward_kernel, (triton.cdiv(count, config["BLOCK_M"]), triton.cdiv(width, config["BLOCK_D"])),
            weight, indices.contiguous(), output, count, rows, width, *weight.stride(), LARGE=is_large(output), **config,
        )
    return output


def embedding_backward(grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq):
    """Gradient of embedding by its weight, [num_embeddings, D]."""
    op = "embedding_backward"
    check_tensors(op, grad_output)
    check(num_embeddings >= 0, f"{op}: num_embeddings is {num_embeddings}")
    check(
        grad_output.dim() == indices.dim() + 1 and grad_output.shape[:-1] == indices.shape,
        f"{op}: indices {tuple(indices.shape)}, grad_output {tuple(grad_output.shape)}",
    )
    _check_indices(op, indices, num_embeddings, grad_output)
    width = grad_output.shape[-1]
    grad_weight = torch.zeros((num_embeddings, width), dtype=grad_output.dtype, device=grad_output.device)
    if grad_output.numel():
        count, config = indices.numel(), configs.embedding_backward(grad_output, width)
        ordered, order = torch.sort(indices.reshape(-1).long(), stable=True)
        launch(
            embedding_backward_kernel, (count, triton.cdiv(width, config["BLOCK_D"])),
            grad_output.contiguous(), ordered, order, grad_weight, count, num_embeddings, width, padding_idx,
            SCALE=scale_grad_by_freq, ACC=accumulator(grad_output.dtype), **config,
        )
    return grad_weight
