"""Adding up the parts of a contraction that was split over programs, in a fixed order: the same bits every run."""

import triton
import triton.language as tl

from dlkern.kernels import configs
from dlkern.kernels._launch import accumulator, launch


@triton.jit
def sum_parts_kernel(parts_ptr, out_ptr, count, PARTS, ACC: tl.constexpr, BLOCK: tl.constexpr):
    # out[i] = parts[0, i] + parts[1, i] + ..., in that order; one program adds BLOCK elements.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for part in range(PARTS):
        total += tl.load(parts_ptr + part * tl.cast(count, tl.int64) + i, mask=i < count, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < count)


def sum_parts(parts, out):
    """out = parts.sum(0) in the order of the parts."""
    config = configs.elementwise(out)
    launch(
        sum_parts_kernel, (triton.cdiv(out.numel(), config["BLOCK"]),), parts, out, out.numel(), parts.shape[0],
        ACC=accumulator(out.dtype), **config,
    )
