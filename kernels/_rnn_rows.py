"""What forward and backward of recurrent layers with options share: a step's rows, its products by tiles, zoneout, and the
statistics of a normalisation."""

import triton
import triton.language as tl

from dlkern.kernels.layer_norm import _moments
from dlkern.kernels.rnn import _rows

RUNTIME = ["B", "T", "n"]  # never compiled anew for
_EPS = tl.constexpr(1e-5)  # of normalisations, as csrc/cpu/rnn_options.h
_SHARE, _FRESH = tl.constexpr(1), tl.constexpr(2)  # kinds of zoneout, beside none: its expectation, and chosen units


@triton.jit
def _step(n, b, B, T, offsets_ptr, lengths_ptr, REVERSE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr):
    # The n-th step of the recurrence: its rows, which of the sequences b have it, and the same of the step before.
    t = n
    before = n - 1
    if REVERSE:
        t = T - 1 - n
        before = T - n
    length = b * 0 + T
    if RAGGED:
        length = tl.load(lengths_ptr + b, mask=b < B, other=0)
    row, row_before = _rows(t, b, B, T, offsets_ptr, PACKED), _rows(before, b, B, T, offsets_ptr, PACKED)
    return row, (b < B) & (t < length), row_before, (before >= 0) & (before < length)


@triton.jit
def _zoned(new, old, fresh_ptr, at, here, share, ZONEOUT: tl.constexpr, ACC: tl.constexpr):
    # What a unit becomes: the new value, or what it was, or the expectation of the two.
    if ZONEOUT == _FRESH:
        new = tl.where(tl.load(fresh_ptr + at, mask=here, other=0.0) != 0, new, old)
    if ZONEOUT == _SHARE:
        new = tl.cast(share, ACC) * old + tl.cast(1.0 - share, ACC) * new
    return new


@triton.jit
def _product(
    a_ptr, weight_ptr, b, j, B, N, K, stride_n, stride_k,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # Rows b of a [B, K] times columns j of the weight: [BLOCK_B, BLOCK_J].
    sums = tl.zeros((BLOCK_B, BLOCK_J), ACC)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + b[:, None] * K + k[None, :], mask=(b < B)[:, None] & (k < K)[None, :], other=0.0)
        at = k[:, None] * stride_k + j[None, :] * stride_n
        w = tl.load(weight_ptr + at, mask=(k < K)[:, None] & (j < N)[None, :], other=0.0)
        sums = tl.dot(a.to(OPERAND), w.to(OPERAND), sums, input_precision=PRECISION, out_dtype=ACC)
    return sums


@triton.jit
def _tile(BLOCK_B: tl.constexpr, BLOCK_J: tl.constexpr):
    return tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B), tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)


@triton.jit
def _statistics(x, inside, count, ACC: tl.constexpr):
    # Mean and reciprocal deviation of one row.
    mean, m2 = _moments(tl.where(inside, x, 0.0)[None, :], inside[None, :], tl.cast(count, ACC))
    variance = (tl.sum(m2, axis=0) / tl.cast(count, ACC)).to(tl.float64)
    return tl.sum(mean, axis=0), (1.0 / tl.sqrt(variance + _EPS)).to(ACC)
