"""One tile of attention scores: what the kernels of attention.py and _attention_backward.py share.

Scores are a product of matrices (dot, cosine: tl.dot) or a sum over the depth of a function of q[i, d] and k[j, d]
(Gaussian, additive: a loop over d inside the tile, so that nothing of the size [queries, keys, depth] exists). A tile
has queries down its rows, or keys: i and j come as [rows, 1] and [1, columns], either way round.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

DOT, GAUSSIAN, ADDITIVE, COSINE = 0, 1, 2, 3
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
_GAUSSIAN, _ADDITIVE, _COSINE = tl.constexpr(GAUSSIAN), tl.constexpr(ADDITIVE), tl.constexpr(COSINE)
_BOOL_MASK, _ADDED_MASK = tl.constexpr(BOOL_MASK), tl.constexpr(ADDED_MASK)
_LOG2_E = tl.constexpr(1.4426950408889634)
_SHORTEST = tl.constexpr(1e-8)  # what a vector's length counts as at least


@triton.jit
def queries_of_program(L, H, LARGE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first query, queries, b H + h, b, h) of a program that owns BLOCK_M queries of one head. The last queries, which
    see most where attention is causal, come first."""
    tiles = tl.cdiv(L, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    i0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    if LARGE:
        i = i.to(tl.int64)
    return i0, i, head, head // H, head % H


@triton.jit
def tile_of_sequence(tiles_ptr, heads):
    """(head, sequence, its first query and first key, L, S, first row of the tile) of a program, where sequences lie one after
    another and a table has six numbers for each tile."""
    tiles = tl.num_programs(0) // heads
    at = tiles_ptr + tl.program_id(0) % tiles * 6
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first_q, first_k = tl.load(at + 1).to(tl.int64), tl.load(at + 2).to(tl.int64)
    return head, tl.load(at), first_q, first_k, tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def operands_of_head(q_ptr, k_ptr, v_ptr, mask_ptr, b, h, GROUP, q_strides, k_strides, v_strides, mask_strides):
    """Where query, key, value and mask of batch b and head h begin."""
    q_ptr += b * q_strides[0] + h * q_strides[1]
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[1]
    v_ptr += b * v_strides[0] + h // GROUP * v_strides[1]
    mask_ptr += b * mask_strides[0] + h * mask_strides[1]
    return q_ptr, k_ptr, v_ptr, mask_ptr


@triton.jit
def lengths_of(lengths_ptr, b, i, queries, strides, HAS_LENGTHS: tl.constexpr):
    """How many keys queries i see; anything without lengths."""
    if HAS_LENGTHS:
        i = tl.load(lengths_ptr + b * strides[0] + i * strides[1], mask=i < queries, other=0)
    return i


@triton.jit
def slope_of(slopes_ptr, h, HAS_SLOPES: tl.constexpr, ACC: tl.constexpr):
    """What a key's score loses for each place between it and the query."""
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + h).to(ACC)
    return slope


@triton.jit
def load_rows(ptr, row, rows, stride_row, column, columns, stride_column):
    """[rows, columns] at ptr, zeros outside."""
    return tl.load(
        ptr + row[:, None] * stride_row + column[None, :] * stride_column,
        mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0,
    )


@triton.jit
def load_turned(ptr, row, rows, strides, column, columns, cos_ptr, sin_ptr, HALF, ROTARY: tl.constexpr, ACC: tl.constexpr):
    """load_rows, of queries or keys that have rotary positions turned: a pair is (d, d + HALF), or (2d, 2d + 1) where ROTARY
    is 2. An element's partner is read again, out of a cache."""
    x = load_rows(ptr, row, rows, strides[2], column, columns, strides[3])
    if ROTARY != 0:
        if ROTARY == 2:
            first = column % 2 == 0
            partner = tl.where(first, column + 1, column - 1)
            pair = column // 2
        else:
            first = column < HALF
            partner = tl.where(first, column + HALF, column - HALF)
            pair = tl.where(first, column, partner)
        turns = (row < rows)[:, None] & (column < 2 * HALF)[None, :]
        y = tl.load(ptr + row[:, None] * strides[2] + partner[None, :] * strides[3], mask=turns, other=0.0).to(ACC)
        angle = row[:, None] * HALF + pair[None, :]
        cos = tl.load(cos_ptr + angle, mask=turns, other=1.0).to(ACC)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0).to(ACC)
        x = (x.to(ACC) * cos + y * tl.where(first[None, :], -sin, sin)).to(x.dtype)
    return x


@triton.jit
def rows_product(
    a, b, a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, depth, cos_ptr, sin_ptr, HALF,
    ROTARY: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    """a bᵀ over the whole depth; a and b hold a block of it, all of it where there is one. Several are added in their
    order, whichever is held, so that a backward's scores are the forward's: where a probability is near 1, its rounding
    would be the gradient. (The held one is read again: adding it from registers takes more of them than there are.)"""
    if BLOCKS == 1:
        s = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=ACC)
    else:
        s = tl.zeros((a.shape[0], b.shape[0]), ACC)
        for block in range(0, BLOCKS):
            d = block * BLOCK + tl.arange(0, BLOCK)
            x = load_turned(a_ptr, a_row, a_rows, a_strides, d, depth, cos_ptr, sin_ptr, HALF, ROTARY, ACC)
            y = load_turned(b_ptr, b_row, b_rows, b_strides, d, depth, cos_ptr, sin_ptr, HALF, ROTARY, ACC)
            s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION, out_dtype=ACC)
    return s


@triton.jit
def add_product(acc, p, b, ACC: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """acc + p b, p in the type of b; with SPLIT as the sum of two such numbers, so that p is hardly rounded."""
    rounded = p.to(b.dtype)
    acc = tl.dot(rounded, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if SPLIT:
        acc = tl.dot((p - rounded.to(ACC)).to(b.dtype), b, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _tanh(x):
    """tanh(x) and its derivative, by two special functions; of small x in float32 by Cephes' polynomial, since 1 - 2q
    cancels there."""
    e = tl.exp(-2.0 * tl.abs(x))
    q = e / (1.0 + e)
    t = 1.0 - 2.0 * q
    t = tl.where(x < 0, -t, t)
    if x.dtype == tl.float32:
        z = x * x
        p = -5.70498872745e-3 * z + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        t = tl.where(z < 0.39, p * (z * x) + x, t)
    return t, 4.0 * q * (1.0 - q)


@triton.jit
def _pairwise(
    a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, weight_ptr, d, depth,
    SCORE: tl.constexpr, ACC: tl.constexpr,
):
    """What column d adds to the scores of rows a against rows b; 0 beyond the depth."""
    x = tl.load(a_ptr + a_row * a_strides[2] + d * a_strides[3], mask=(a_row < a_rows) & (d < depth), other=0.0).to(ACC)
    y = tl.load(b_ptr + b_row * b_strides[2] + d * b_strides[3], mask=(b_row < b_rows) & (d < depth), other=0.0).to(ACC)
    if SCORE == _ADDITIVE:
        t, _ = _tanh(x[:, None] + y[None, :])
        return tl.load(weight_ptr + d, mask=d < depth, other=0.0).to(ACC) * t
    difference = x[:, None] - y[None, :]
    return -difference * difference


@triton.jit
def raw_scores(
    a, b, a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, a_unit_ptr, b_unit_ptr, weight_ptr, depth,
    cos_ptr, sin_ptr, HALF, ROTARY: tl.constexpr, SCORE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):
    """score(a, b) of rows a against rows b, [BLOCK_A, BLOCK_B], without scale; every score is symmetric in a and b."""
    if SCORE == _GAUSSIAN or SCORE == _ADDITIVE:
        s = tl.zeros((BLOCK_A, BLOCK_B), ACC)
        for first in range(0, depth, 64):  # short sums: scores are exponents
            part = tl.zeros((BLOCK_A, BLOCK_B), ACC)
            for d in range(first, tl.minimum(first + 64, depth), 4):
                part += _pairwise(
                    a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, weight_ptr, d, depth, SCORE, ACC
                ) + _pairwise(
                    a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, weight_ptr, d + 1, depth, SCORE, ACC
                ) + (_pairwise(
                    a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, weight_ptr, d + 2, depth, SCORE, ACC
                ) + _pairwise(
                    a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, weight_ptr, d + 3, depth, SCORE, ACC
                ))
            s += part
        if SCORE == _GAUSSIAN:
            s = s * 0.5
        return s
    s = rows_product(
        a, b, a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, depth, cos_ptr, sin_ptr, HALF, ROTARY, ACC,
        PRECISION, BLOCK, BLOCKS,
    )
    if SCORE == _COSINE:
        a_unit = tl.load(a_unit_ptr + a_row, mask=a_row < a_rows, other=0.0)
        b_unit = tl.load(b_unit_ptr + b_row, mask=b_row < b_rows, other=0.0)
        s = s * a_unit[:, None] * b_unit[None, :]
    return s


@triton.jit
def finish_scores(
    s, i, j, mask_ptr, mask_strides, length, slope, scale, softcap, queries, keys, left, right,
    MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, FOLD: tl.constexpr, BORDER: tl.constexpr,
):
    """Scale, cap, slopes and masks; with BORDER also what position hides. And the derivative of the cap.

    With FOLD the scale is left to the exponential: nothing else is done to the scores but hiding.
    """
    cap = s
    if not FOLD:
        s = s * scale
    if HAS_CAP:
        t = libdevice.tanh(s / softcap)
        s = t * softcap
        cap = 1.0 - t * t
    if HAS_SLOPES:
        s -= slope * tl.abs(i - j).to(s.dtype)
    if MASK != 0:
        at = mask_ptr + i * mask_strides[2] + j * mask_strides[3]
        inside = (i < queries) & (j < keys)
        if MASK == _BOOL_MASK:
            s = tl.where(tl.load(at, mask=inside, other=0) != 0, s, -float("inf"))
        else:
            s += tl.load(at, mask=inside, other=0.0).to(s.dtype)
    if BORDER:
        seen = j < keys
        if HAS_RIGHT:
            seen = seen & (j <= i + right)
        if HAS_LEFT:
            seen = seen & (j >= i - left)
        if HAS_LENGTHS:
            seen = seen & (j < length)
        s = tl.where(seen, s, -float("inf"))
    return s, cap


@triton.jit
def exponential(s, shift, factor, FOLD: tl.constexpr):
    """exp(scale s - shift), where `shift` is what largest_shift gave."""
    return tl.exp2(s * factor - shift) if FOLD else tl.exp(s - shift)


@triton.jit
def largest_shift(largest, factor, FOLD: tl.constexpr):
    """What is subtracted from exponents: with FOLD in units of log 2. 0 where no key is seen."""
    shift = largest * factor if FOLD else largest
    return tl.where(largest == -float("inf"), 0.0, shift)


@triton.jit
def key_bounds(
    i0, queries, keys, left, right, length, inside,
    HAS_LENGTHS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(begin, full, end): queries i0 ... i0 + BLOCK_M - 1 see keys begin ... end - 1, all of them up to full - 1."""
    begin = i0 * 0
    full = begin + keys
    end = begin + keys
    if HAS_RIGHT:
        full = tl.minimum(full, i0 + right + 1)
        end = tl.minimum(end, tl.minimum(i0 + BLOCK_M, queries) + right)
    if HAS_LENGTHS:
        full = tl.minimum(full, tl.min(tl.where(inside, length, keys), axis=0)).to(tl.int32)
        end = tl.minimum(end, tl.max(tl.where(inside, length, 0), axis=0)).to(tl.int32)
    if HAS_LEFT:
        begin = tl.maximum(i0 - left, 0) // BLOCK_N * BLOCK_N
        full = begin
    return begin, tl.maximum(full // BLOCK_N * BLOCK_N, begin), end


@triton.jit
def kept_by_dropout(row, j0, keys, seed, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of [rows, keys j0 ... j0 + BLOCK_N - 1] stay: key j of row r has word j % 64 // 16 of the block of counter
    (r * ceil(keys / 64) + j // 64) * 16 + j % 16. j0 and BLOCK_N are multiples of 64."""
    group = j0 // 64 + tl.arange(0, BLOCK_N // 64)
    block = row.to(tl.int64)[:, None] * ((keys + 63) // 64) + group[None, :]
    counter = block[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]  # [BLOCK_M, BLOCK_N / 64, 16]
    low = counter.to(tl.uint32)
    zero = low ^ low
    word0, word1, word2, word3 = tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero)
    word = tl.join(tl.join(word0, word1), tl.join(word2, word3))  # [..., 16, 2, 2]: of word 2 a + b, b before a
    word = tl.reshape(tl.permute(word, (0, 1, 4, 3, 2)), (BLOCK_M, BLOCK_N))
    return (word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold  # unsigned words, see dropout.py


@triton.jit
def pairwise_gradient(
    acc, of_weight, change, a_ptr, b_ptr, a_row, b_row, a_rows, b_rows, a_strides, b_strides, weight_ptr, depth, first,
    SCORE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, OF_WEIGHT: tl.constexpr,
):
    """Adds to acc [rows of a, BLOCK] the gradient of columns first, ... of a, from `change`, that of the raw scores
    [rows of a, rows of b]; and to of_weight [BLOCK] that of the additive score's weight."""
    column = first + tl.arange(0, BLOCK)
    for d in range(first, tl.minimum(first + BLOCK, depth)):
        x = tl.load(a_ptr + a_row * a_strides[2] + d * a_strides[3], mask=a_row < a_rows, other=0.0).to(ACC)
        y = tl.load(b_ptr + b_row * b_strides[2] + d * b_strides[3], mask=b_row < b_rows, other=0.0).to(ACC)
        if SCORE == _ADDITIVE:
            t, slope = _tanh(x[:, None] + y[None, :])
            of_row = tl.sum(change * slope, axis=1) * tl.load(weight_ptr + d).to(ACC)
            if OF_WEIGHT:
                total = tl.sum(tl.sum(change * t, axis=1), axis=0)
                of_weight += tl.where(column == d, total, 0.0)
        else:
            of_row = tl.sum(change * (y[None, :] - x[:, None]), axis=1)
        acc += tl.where((column == d)[None, :], of_row[:, None], 0.0)
    return acc, of_weight


@triton.jit
def unit_kernel(
    x_ptr, unit_ptr, heads, length, depth, strides, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    # One program: the reciprocal lengths of BLOCK vectors of one head.
    tiles = tl.cdiv(length, BLOCK)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    x_ptr += head // heads * strides[0] + head % heads * strides[1]
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, depth, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = load_rows(x_ptr, row, length, strides[2], d, depth, strides[3]).to(ACC)
        squares += tl.sum(x * x, axis=1).to(tl.float64)
    unit = 1.0 / tl.maximum(tl.sqrt(squares), _SHORTEST)
    tl.store(unit_ptr + head * length + row, unit.to(ACC), mask=row < length)


@triton.jit
def unit_backward_kernel(
    x_ptr, unit_ptr, of_unit_ptr, dx_ptr, heads, length, depth, strides,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    # One program: BLOCK vectors of one head. With u = x / |x| and g its gradient: dx = (g - u (u g)) / |x|.
    tiles = tl.cdiv(length, BLOCK)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    x_ptr += head // heads * strides[0] + head % heads * strides[1]
    of_unit_ptr += head * length * depth
    dx_ptr += head * length * depth
    unit = tl.load(unit_ptr + head * length + row, mask=row < length, other=0.0)
    along = tl.zeros((BLOCK,), ACC)
    for first in range(0, depth, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = load_rows(x_ptr, row, length, strides[2], d, depth, strides[3]).to(ACC)
        g = load_rows(of_unit_ptr, row, length, depth, d, depth, 1)
        along += tl.sum(x * unit[:, None] * g, axis=1)
    along = tl.where(unit.to(tl.float64) * _SHORTEST < 1.0, along, 0.0)  # shorter ones are not divided by their length
    for first in range(0, depth, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = load_rows(x_ptr, row, length, strides[2], d, depth, strides[3]).to(ACC)
        g = load_rows(of_unit_ptr, row, length, depth, d, depth, 1)
        dx = (g - x * unit[:, None] * along[:, None]) * unit[:, None]
        tl.store(
            dx_ptr + row[:, None] * depth + d[None, :], dx.to(dx_ptr.dtype.element_ty),
            mask=(row < length)[:, None] & (d < depth)[None, :],
        )
