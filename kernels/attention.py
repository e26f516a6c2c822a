"""Attention of every score, forward, and the launchers: softmax(scores) value without a matrix of scores.

A program takes BLOCK_M queries of one head through the keys that they see, BLOCK_N at a time, and keeps the largest
score, the sum of exponentials and the weighted sum of values (online softmax: Milakov and Gimelshein 2018, in the tiles
of Dao et al. 2022, "FlashAttention"). Tiles that no query sees are skipped, and only those on a border look at single
keys. Saved are two numbers a query: what its exponents were shifted by, and the reciprocal of their sum. A depth beyond
a tile's is cut into blocks, each program computing one block of the output. The backward is _attention_backward.py's.
Floor: 2 L S (D + Dv) over the tensor cores' peak; Gaussian and additive scores are bound by L S D special functions.
"""

import torch
import triton
import triton.language as tl

from dlkern.kernels import _attention_backward, configs
from dlkern.kernels._attention_tile import (
    ADDED_MASK,
    ADDITIVE,
    BOOL_MASK,
    COSINE,
    DOT,
    NO_MASK,
    exponential,
    finish_scores,
    kept_by_dropout,
    key_bounds,
    largest_shift,
    lengths_of,
    load_rows,
    load_turned,
    operands_of_head,
    queries_of_program,
    raw_scores,
    slope_of,
    tile_of_sequence,
    unit_backward_kernel,
    unit_kernel,
)
from dlkern.kernels._launch import (
    accumulator,
    accumulator_dtype,
    allow_tf32_matmul,
    check,
    check_tensors,
    dot_precision,
    launch,
)
from dlkern.kernels._parts import sum_parts
from dlkern.kernels.positions import turned


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, slopes_ptr, weight_ptr, seed_ptr, q_unit_ptr, k_unit_ptr, cos_ptr,
    sin_ptr, out_ptr, statistics_ptr, tiles_ptr, ROWS, H, GROUP, L, S, D, DV, HALF, ANGLES, q_strides, k_strides, v_strides,
    mask_strides, lengths_strides, out_strides, scale: tl.float64, log2_scale: tl.float64, softcap: tl.float64,
    kept: tl.float64, left, right, threshold, VARLEN: tl.constexpr, ROTARY: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, D_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr, V_BLOCKS: tl.constexpr,
):
    # One program: BLOCK_M queries of one head x BLOCK_V columns of the value.
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    if VARLEN:
        head, sequence, first_q, first_k, L, S, i0 = tile_of_sequence(tiles_ptr, H)
        b, h = head * 0, head
        i = i0 + tl.arange(0, BLOCK_M)
        if LARGE:
            i = i.to(tl.int64)
        q_ptr += first_q * q_strides[2]
        k_ptr += first_k * k_strides[2]
        v_ptr += first_k * v_strides[2]
        out_ptr += first_q * out_strides[2]
        statistics_ptr += first_q * H
        left -= S - L
        right += S - L
        if HAS_DROPOUT:
            seed += sequence
    else:
        i0, i, head, b, h = queries_of_program(L, H, LARGE, BLOCK_M)
    q_ptr, k_ptr, v_ptr, mask_ptr = operands_of_head(
        q_ptr, k_ptr, v_ptr, mask_ptr, b, h, GROUP, q_strides, k_strides, v_strides, mask_strides
    )
    cos_ptr += b * ANGLES
    sin_ptr += b * ANGLES
    q_unit_ptr += head * L
    k_unit_ptr += head // GROUP * S
    length = lengths_of(lengths_ptr, b, i, L, lengths_strides, HAS_LENGTHS)
    slope = slope_of(slopes_ptr, h, HAS_SLOPES, ACC)
    d = tl.arange(0, BLOCK_D)
    dv = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    q = load_turned(q_ptr, i, L, q_strides, d, D, cos_ptr, sin_ptr, HALF, ROTARY, ACC)  # [BLOCK_M, BLOCK_D]
    most = tl.full((BLOCK_M,), -float("inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_V), ACC)
    begin, full, end = key_bounds(
        i0, L, S, left, right, length, i < L, HAS_LENGTHS, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for BORDER in tl.static_range(2):
        for j0 in range(full if BORDER else begin, end if BORDER else full, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            if LARGE:
                j = j.to(tl.int64)
            k = load_turned(k_ptr, j, S, k_strides, d, D, cos_ptr, sin_ptr, HALF, ROTARY, ACC)  # [BLOCK_N, BLOCK_D]
            s = raw_scores(
                q, k, q_ptr, k_ptr, i, j, L, S, q_strides, k_strides, q_unit_ptr, k_unit_ptr, weight_ptr, D,
                cos_ptr, sin_ptr, HALF, ROTARY, SCORE, ACC, PRECISION, BLOCK_D, D_BLOCKS, BLOCK_M, BLOCK_N,
            )
            s, _ = finish_scores(
                s, i[:, None], j[None, :], mask_ptr, mask_strides, length[:, None], slope, scale.to(ACC), softcap.to(ACC),
                L, S, left, right, MASK, HAS_LENGTHS, HAS_SLOPES, HAS_CAP, HAS_LEFT, HAS_RIGHT, FOLD, BORDER,
            )
            higher = tl.maximum(most, tl.max(s, axis=1))
            shift = largest_shift(higher, log2_scale.to(ACC), FOLD)
            shrink = exponential(most, shift, log2_scale.to(ACC), FOLD)
            p = exponential(s, shift[:, None], log2_scale.to(ACC), FOLD)  # [BLOCK_M, BLOCK_N]
            most = higher
            total = total * shrink + tl.sum(p, axis=1)
            if HAS_DROPOUT:
                stays = kept_by_dropout(head * L + i, j0, S, seed, threshold, BLOCK_M, BLOCK_N)
                p = tl.where(stays, p, 0.0)
            v = load_rows(v_ptr, j, S, v_strides[2], dv, DV, v_strides[3])  # [BLOCK_N, BLOCK_V]
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    inverse = tl.where(total == 0, 0.0, 1.0 / total)
    if tl.program_id(1) == 0:
        shift = tl.where(total == 0, 0.0, largest_shift(most, log2_scale.to(ACC), FOLD))
        tl.store(statistics_ptr + head * L + i, shift, mask=i < L)
        tl.store(statistics_ptr + ROWS + head * L + i, inverse, mask=i < L)
    if HAS_DROPOUT:
        inverse = inverse * kept.to(ACC)
    out_ptr += b * out_strides[0] + h * out_strides[1]
    tl.store(
        out_ptr + i[:, None] * out_strides[2] + dv[None, :] * out_strides[3],
        (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=(i < L)[:, None] & (dv < DV)[None, :],
    )


# --- launchers --------------------------------------------------------------------------------------------------------

_LOG2_E = 1.4426950408889634


def _far(*tensors):
    """Whether an element lies beyond 32 bits from the start of its head."""
    return any(
        t is not None and t.numel() and sum((n - 1) * abs(s) for n, s in zip(t.shape[2:], t.stride()[2:])) >= 2**31 - 2**20
        for t in tensors
    )


def _broadcast_strides(x, dims):
    """Strides of x, 0 where it broadcasts; of nothing, zeros."""
    return (0,) * dims if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride()))


class Call:
    """The operands of a call, checked, as kernels want them."""

    varlen = False  # whether sequences lie one after another, see attention_varlen.py

    def __init__(
        self, op, query, key, value, mask, lengths, slopes, weight, seed, p, scale, softcap, left, right, score, rotary=None
    ):
        check_tensors(op, query, key, value)
        for name, x in (("query", query), ("key", key), ("value", value)):
            check(x.dim() == 4, f"{op}: {name} has {x.dim()} dimensions, expected 4")
        batch, heads, queries, depth = query.shape
        key_heads, keys = key.shape[1:3]
        check(key.shape[0] == batch and value.shape[0] == batch, f"{op}: batches differ")
        check(value.shape[1:3] == key.shape[1:3], f"{op}: key and value differ in heads or length")
        check(key.shape[3] == depth, f"{op}: query has depth {depth}, key {key.shape[3]}")
        divides = heads == 0 or (key_heads > 0 and heads % key_heads == 0)
        check(divides, f"{op}: {key_heads} heads of keys do not divide {heads} of queries")
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        if not 0 <= score <= 3:
            raise ValueError(f"{op}: no score {score}")
        if softcap < 0:
            raise ValueError(f"{op}: softcap must not be negative, got {softcap}")
        if left < -1 or right < -1:
            raise ValueError(f"{op}: a window's sides are at least 0, or -1 for none")
        if p > 0:
            fits = seed is not None and seed.device == query.device and seed.numel() == 1 and seed.dtype == torch.int64
            check(fits, f"{op}: dropout wants a seed of one int64")
        if mask is not None:
            known = mask.dtype in (torch.bool, torch.float32, query.dtype)
            check(known, f"{op}: mask must be bool, float32 or of query's dtype")
            full = (batch, heads, queries, keys)
            fits = mask.device == query.device and mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, full))
            check(fits, f"{op}: mask does not broadcast to [batch, heads, queries, keys]")
        if lengths is not None:
            fits = lengths.device == query.device and lengths.dtype == torch.int64 and lengths.dim() == 2
            fits = fits and lengths.shape[0] == batch and lengths.shape[1] in (1, queries)
            check(fits, f"{op}: lengths must be int64 [batch, 1] or [batch, queries]")
        for name, x, size in (("slopes", slopes, heads), ("weight", weight, depth)):
            if x is not None:
                check(x.device == query.device and tuple(x.shape) == (size,), f"{op}: {name} is not [{size}]")
                known = x.dtype in (query.dtype, accumulator_dtype(query.dtype))
                check(known, f"{op}: {name} differs in dtype")
        check((weight is not None) == (score == ADDITIVE), f"{op}: weight is for the additive score")
        self.rotary, half = rotary, 0
        cos = sin = None
        if rotary is not None:
            cos, sin, interleaved = rotary
            fits = cos.dim() == 4 and cos.shape == sin.shape and cos.shape[0] in (1, batch) and cos.shape[1] == 1
            check(fits and cos.shape[2] >= max(queries, keys), f"{op}: cos and sin must be [1 or batch, 1, positions, half]")
            half = cos.shape[3]
            check(2 * half <= depth, f"{op}: cos has {half} angles, too many for depth {depth}")
            known = cos.dtype == sin.dtype and cos.dtype in (query.dtype, accumulator_dtype(query.dtype))
            check(known, f"{op}: cos and sin must be in the dtype of query or of its sums")
            check(cos.device == sin.device == query.device, f"{op}: cos or sin is on another device")
            cos, sin = cos.contiguous(), sin.contiguous()
        self.query, self.key, self.value, self.mask = query, key, value, mask
        self.weight = weight.contiguous() if weight is not None else None
        self.batch, self.heads, self.key_heads, self.queries, self.keys = batch, heads, key_heads, queries, keys
        self.depth, self.value_depth, self.score, self.p, self.most_keys = depth, value.shape[3], score, p, keys
        self.units = (query, key)
        if score == COSINE:
            self.units = (self._unit(query), self._unit(key))
        # As bytes, whose loads compare with 0; a pointer that is not used may be any.
        shown = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
        slopes = slopes.contiguous() if slopes is not None else None
        self.operands = tuple(
            x if x is not None else query
            for x in (query, key, value, shown, lengths, slopes, self.weight, seed if p > 0 else None, *self.units, cos, sin)
        )
        self.sizes = (
            batch * heads * queries, heads, max(heads // max(key_heads, 1), 1), queries, keys, depth, self.value_depth, half,
            0 if cos is None or cos.shape[0] == 1 else cos.stride(0),
        )  # fmt: skip
        self.strides = (
            query.stride(), key.stride(), value.stride(), _broadcast_strides(mask, 4), _broadcast_strides(lengths, 2),
        )  # fmt: skip
        kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
        fold = scale > 0 and not softcap and slopes is None and kind != ADDED_MASK and score == DOT
        self.constants = (
            float(scale), float(scale) * _LOG2_E, float(softcap), 1.0 / (1.0 - p) if p < 1 else 0.0, max(left, 0),
            max(right, 0), int(p * 2**32) - 2**31,
        )  # fmt: skip
        self.flags = dict(
            ROTARY=0 if rotary is None else 2 if interleaved else 1,
            SCORE=score, MASK=kind, HAS_LENGTHS=lengths is not None, HAS_SLOPES=slopes is not None, HAS_CAP=softcap > 0,
            HAS_LEFT=0 <= left < queries, HAS_RIGHT=0 <= right < keys, HAS_DROPOUT=p > 0, FOLD=fold,
            ACC=accumulator(query.dtype), PRECISION=dot_precision(query.dtype, allow_tf32_matmul()),
            LARGE=_far(query, key, value, mask, cos),
        )

    def tiles(self, of_keys, block):
        """A table of tiles of `block` rows (only where sequences lie one after another), and how many programs take them."""
        heads, rows = (self.key_heads, self.keys) if of_keys else (self.heads, self.queries)
        return self.query, triton.cdiv(rows, block) * self.batch * heads

    def output(self):
        """In query's order of heads and queries, so that [B, L, H, D] seen as [B, H, L, D] stays that."""
        if self.query.stride(1) < self.query.stride(2):
            return self.query.new_empty((self.batch, self.queries, self.heads, self.value_depth)).transpose(1, 2)
        return self.query.new_empty((self.batch, self.heads, self.queries, self.value_depth))

    def gradient(self, x, dtype):
        """Uninitialised, of an operand."""
        return torch.empty(x.shape, dtype=dtype, device=x.device)

    def blocks(self, kind):
        """Tile of a kernel ("forward", "query", "key" or "mask")."""
        busy = (self.varlen and kind != "forward") or self.flags["MASK"] != NO_MASK
        busy = busy or any(self.flags[flag] for flag in ("HAS_CAP", "HAS_SLOPES", "ROTARY"))
        return configs.attention(
            self.query, kind, self.depth, self.value_depth, self.p > 0, busy, self.score in (DOT, COSINE),
            self.heads > self.key_heads, self.rotary is not None,
        )  # fmt: skip

    def _unit(self, x):
        """Reciprocal lengths of vectors [B, H, L, D], as [B, H, L]."""
        unit = torch.empty(x.shape[:3], dtype=accumulator_dtype(x.dtype), device=x.device)
        if unit.numel():
            config = configs.attention_rows(x)
            programs = x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], config["BLOCK"])
            launch(unit_kernel, (programs,), x, unit, *x.shape[1:], x.stride(), ACC=accumulator(x.dtype), **config)
        return unit

    def from_unit(self, x, unit, of_unit):
        """The gradient of x from that of its vectors divided by their lengths."""
        gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if gradient.numel():
            config = configs.attention_rows(x)
            programs = x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], config["BLOCK"])
            launch(
                unit_backward_kernel, (programs,), x, unit, of_unit, gradient, *x.shape[1:], x.stride(),
                ACC=accumulator(x.dtype), **config,
            )
        return gradient


def attention_forward(
    query, key, value, mask, lengths, slopes, weight, seed, p, scale, softcap, left, right, score
):
    """(output, statistics [2, B, H, L]) of query [B, H, L, D], key [B, Hk, S, D] and value [B, Hk, S, Dv]."""
    return forward(
        Call("attention", query, key, value, mask, lengths, slopes, weight, seed, p, scale, softcap, left, right, score)
    )


def attention_rotary_forward(
    query, key, value, mask, lengths, slopes, seed, cos, sin, p, scale, softcap, left, right, interleaved
):
    """attention_forward of dot products, of queries and keys turned by cos and sin [B or 1, 1, positions, half]."""
    return forward(
        Call(
            "attention_rotary", query, key, value, mask, lengths, slopes, None, seed, p, scale, softcap, left, right, DOT,
            (cos, sin, interleaved),
        )
    )


def forward(call):
    """(output, statistics [2, B, H, L]) of a Call."""
    query, output = call.query, call.output()
    statistics = query.new_empty((2, *query.shape[:3]), dtype=accumulator_dtype(query.dtype))
    if statistics.numel() == 0:
        return output, statistics
    if call.p == 1:  # nothing is kept
        return output.zero_(), statistics.zero_()
    config = call.blocks("forward")
    tiles, programs = call.tiles(False, config["BLOCK_M"])
    launch(
        attention_forward_kernel, (programs, config["V_BLOCKS"]), *call.operands, output, statistics, tiles, *call.sizes,
        *call.strides, output.stride(), *call.constants, VARLEN=call.varlen, **call.flags, **config,
    )
    return output, statistics


def attention_backward(
    grad_output, query, key, value, mask, lengths, slopes, weight, seed, output, statistics, p, scale, softcap, left, right,
    score, of_mask, from_scores=False,
):
    """Gradients of query, key, value, mask (of size [0] unless of_mask) and weight (of size [0] where there is none)."""
    op = "attention_backward"
    call = Call(op, query, key, value, mask, lengths, slopes, weight, seed, p, scale, softcap, left, right, score)
    return backward(op, call, grad_output, output, statistics, of_mask, from_scores)


def attention_rotary_backward(
    grad_output, query, key, value, mask, lengths, slopes, seed, cos, sin, output, statistics, p, scale, softcap, left, right,
    interleaved, of_mask,
):
    """attention_backward of what attention_rotary_forward gave, without a weight."""
    op = "attention_rotary_backward"
    call = Call(
        op, query, key, value, mask, lengths, slopes, None, seed, p, scale, softcap, left, right, DOT, (cos, sin, interleaved)
    )
    return backward(op, call, grad_output, output, statistics, of_mask)[:4]


def backward(op, call, grad_output, output, statistics, of_mask, from_scores=False):
    """Gradients of query, key, value, mask and weight."""
    query, key, value, mask, weight, score = call.query, call.key, call.value, call.mask, call.weight, call.score
    check_tensors(op, query, grad_output, output)
    size = (*query.shape[:3], call.value_depth)
    fits = tuple(grad_output.shape) == tuple(output.shape) == size
    check(fits, f"{op}: grad_output or output is not of the output's size")
    wide = accumulator_dtype(query.dtype)
    fits = tuple(statistics.shape) == (2, *query.shape[:3]) and statistics.dtype == wide and statistics.is_contiguous()
    check(fits and statistics.device == query.device, f"{op}: statistics is not what attention_forward gave")
    check(not of_mask or call.flags["MASK"] == ADDED_MASK, f"{op}: no gradient of this mask")

    # Of units, or of what was turned: another kernel goes on from there.
    between = wide if score == COSINE or call.rotary else query.dtype
    grad_query, grad_key = call.gradient(query, between), call.gradient(key, between)
    grad_value = call.gradient(value, value.dtype)
    grad_mask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device) if of_mask else query.new_empty((0,))
    grad_weight = query.new_empty((0,)) if weight is None else weight.new_empty(weight.shape)
    if call.p == 1 or call.batch * call.heads == 0 or call.keys == 0:
        return tuple(
            x.zero_() for x in (grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value, grad_mask, grad_weight)
        )
    # With the matrix of scores in memory, delta cancels exactly where one key has all the weight; torch has it there for
    # these scores and masks, and does not round probabilities to 16 bits. Where keys are few it costs nothing.
    by_tiles = score != DOT or of_mask or from_scores or call.most_keys <= 128
    split = by_tiles and score == DOT and query.element_size() == 2
    delta = torch.empty(query.shape[:3], dtype=wide, device=query.device)
    common = (*call.operands, grad_output, statistics, delta)
    strides = (*call.strides, grad_output.stride())

    config = call.blocks("query")
    tiles, programs = call.tiles(False, config["BLOCK_M"])
    parts = torch.empty((programs, call.depth if weight is not None else 0), dtype=wide, device=query.device)
    if programs:
        launch(
            _attention_backward.attention_backward_query_kernel, (programs, config["D_BLOCKS"]), *common, output,
            grad_query, parts, tiles, *call.sizes, *strides, output.stride(), grad_query.stride(), *call.constants,
            BY_TILES=by_tiles, SPLIT=split, VARLEN=call.varlen, **call.flags, **config,
        )
    if grad_weight.numel():
        sum_parts(parts, grad_weight)
    config = call.blocks("key")
    tiles, programs = call.tiles(True, config["BLOCK_N"])
    launch(
        _attention_backward.attention_backward_key_kernel, (programs, max(config["D_BLOCKS"], config["V_BLOCKS"])), *common,
        grad_key, grad_value, tiles, *call.sizes, *strides, grad_key.stride(), grad_value.stride(), *call.constants,
        SPLIT=split, VARLEN=call.varlen, **call.flags, **config,
    )
    if of_mask and grad_mask.numel():
        config = call.blocks("mask")
        m_batch, m_heads, m_queries, m_keys = mask.shape
        programs = m_batch * m_heads * triton.cdiv(m_queries, config["BLOCK_M"]) * triton.cdiv(m_keys, config["BLOCK_N"])
        launch(
            _attention_backward.attention_backward_mask_kernel, (programs,), *common, grad_mask, *call.sizes, *strides,
            call.batch, *mask.shape, *call.constants, **call.flags, **config,
        )
    if score == COSINE:
        grad_query = call.from_unit(query, call.units[0], grad_query)
        grad_key = call.from_unit(key, call.units[1], grad_key)
    if call.rotary:
        cos, sin, interleaved = call.rotary
        grad_query, grad_key = (turned(x, cos, sin, interleaved, True, query.dtype) for x in (grad_query, grad_key))
    return grad_query, grad_key, grad_value, grad_mask, grad_weight
