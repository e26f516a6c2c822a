"""Attention, backward: probabilities are made again, tile by tile, from the two saved numbers of each query.

With P the probabilities, g the output's gradient and delta = sum(g output) of a query, the gradient of its scores is
dS = P (g Vᵀ - delta). One kernel goes through the keys of some queries (delta, the query's gradient, the additive
weight's), one through the queries of some keys and all heads that share them (gradients of key and value), and where a
mask wants its gradient, one takes a tile of the mask through all that it was broadcast to. Nothing is added by two
programs: the same bits every run. Floor: 2.5 times the forward's operations; recomputing them twice makes it 3.5.
"""

import triton
import triton.language as tl

from dlkern.kernels._attention_tile import (
    ADDITIVE,
    COSINE,
    GAUSSIAN,
    add_product,
    exponential,
    finish_scores,
    kept_by_dropout,
    key_bounds,
    lengths_of,
    load_rows,
    load_turned,
    operands_of_head,
    pairwise_gradient,
    queries_of_program,
    raw_scores,
    rows_product,
    slope_of,
    tile_of_sequence,
)

_GAUSSIAN, _ADDITIVE, _COSINE = tl.constexpr(GAUSSIAN), tl.constexpr(ADDITIVE), tl.constexpr(COSINE)


@triton.jit
def attention_backward_query_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, slopes_ptr, weight_ptr, seed_ptr, q_unit_ptr, k_unit_ptr, cos_ptr,
    sin_ptr, g_ptr, statistics_ptr, delta_ptr, out_ptr, dq_ptr, dweight_ptr, tiles_ptr, ROWS, H, GROUP, L, S, D, DV, HALF,
    ANGLES, q_strides, k_strides, v_strides, mask_strides, lengths_strides, g_strides, out_strides, dq_strides,
    scale: tl.float64, log2_scale: tl.float64, softcap: tl.float64, kept: tl.float64, left, right, threshold,
    BY_TILES: tl.constexpr, SPLIT: tl.constexpr, VARLEN: tl.constexpr, ROTARY: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, D_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr, V_BLOCKS: tl.constexpr,
):
    # One program: BLOCK_M queries of one head x BLOCK_D columns of their gradient.
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
        g_ptr += first_q * g_strides[2]
        dq_ptr += first_q * dq_strides[2]
        statistics_ptr += first_q * H
        delta_ptr += first_q * H
        left -= S - L
        right += S - L
        if HAS_DROPOUT:
            seed += sequence
    else:
        i0, i, head, b, h = queries_of_program(L, H, LARGE, BLOCK_M)
    q_ptr, k_ptr, v_ptr, mask_ptr = operands_of_head(
        q_ptr, k_ptr, v_ptr, mask_ptr, b, h, GROUP, q_strides, k_strides, v_strides, mask_strides
    )
    g_ptr += b * g_strides[0] + h * g_strides[1]
    cos_ptr += b * ANGLES
    sin_ptr += b * ANGLES
    q_unit_ptr += head * L
    k_unit_ptr += head // GROUP * S
    length = lengths_of(lengths_ptr, b, i, L, lengths_strides, HAS_LENGTHS)
    slope = slope_of(slopes_ptr, h, HAS_SLOPES, ACC)
    own = tl.program_id(1)
    d = own * BLOCK_D + tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    q = load_turned(q_ptr, i, L, q_strides, d, D, cos_ptr, sin_ptr, HALF, ROTARY, ACC)  # [BLOCK_M, BLOCK_D]
    g = load_rows(g_ptr, i, L, g_strides[2], dv, DV, g_strides[3])  # [BLOCK_M, BLOCK_V]
    shift = tl.load(statistics_ptr + head * L + i, mask=i < L, other=float("inf"))  # exponentials of no query are 0
    inverse = tl.load(statistics_ptr + ROWS + head * L + i, mask=i < L, other=0.0)
    delta = tl.zeros((BLOCK_M,), ACC)
    if not BY_TILES:
        out_ptr += b * out_strides[0] + h * out_strides[1]
        # In float64 for float32 operands: it is subtracted from numbers that may be nearly the same.
        WIDE: tl.constexpr = tl.float64 if g_ptr.dtype.element_ty == tl.float32 else ACC
        sums = tl.zeros((BLOCK_M,), WIDE)
        for block in range(0, V_BLOCKS):
            column = block * BLOCK_V + dv
            x = load_rows(g_ptr, i, L, g_strides[2], column, DV, g_strides[3]).to(WIDE)
            y = load_rows(out_ptr, i, L, out_strides[2], column, DV, out_strides[3]).to(WIDE)
            sums += tl.sum(x * y, axis=1)
        delta = sums.to(ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    of_weight = tl.zeros((BLOCK_D,), ACC)
    begin, full, end = key_bounds(
        i0, L, S, left, right, length, i < L, HAS_LENGTHS, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    for STEP in tl.static_range(0 if BY_TILES else 1, 2):  # delta, then the gradient
        for BORDER in tl.static_range(2):
            for j0 in range(full if BORDER else begin, end if BORDER else full, BLOCK_N):
                j = j0 + tl.arange(0, BLOCK_N)
                if LARGE:
                    j = j.to(tl.int64)
                k = load_turned(k_ptr, j, S, k_strides, d, D, cos_ptr, sin_ptr, HALF, ROTARY, ACC)  # [BLOCK_N, BLOCK_D]
                v = load_rows(v_ptr, j, S, v_strides[2], dv, DV, v_strides[3])  # [BLOCK_N, BLOCK_V]
                s = raw_scores(
                    q, k, q_ptr, k_ptr, i, j, L, S, q_strides, k_strides, q_unit_ptr, k_unit_ptr, weight_ptr, D,
                    cos_ptr, sin_ptr, HALF, ROTARY, SCORE, ACC, PRECISION, BLOCK_D, D_BLOCKS, BLOCK_M, BLOCK_N,
                )
                s, cap = finish_scores(
                    s, i[:, None], j[None, :], mask_ptr, mask_strides, length[:, None], slope, scale.to(ACC),
                    softcap.to(ACC), L, S, left, right, MASK, HAS_LENGTHS, HAS_SLOPES, HAS_CAP, HAS_LEFT, HAS_RIGHT, FOLD,
                    BORDER,
                )
                p = exponential(s, shift[:, None], log2_scale.to(ACC), FOLD) * inverse[:, None]
                dp = rows_product(
                    g, v, g_ptr, v_ptr, i, j, L, S, g_strides, v_strides, DV, cos_ptr, sin_ptr, HALF, 0, ACC, PRECISION,
                    BLOCK_V, V_BLOCKS,
                )
                if HAS_DROPOUT:
                    stays = kept_by_dropout(head * L + i, j0, S, seed, threshold, BLOCK_M, BLOCK_N)
                    dp = tl.where(stays, dp * kept.to(ACC), 0.0)
                if STEP == 0:
                    delta += tl.sum(p * dp, axis=1)
                else:
                    ds = p * (dp - delta[:, None])  # [BLOCK_M, BLOCK_N]
                    if HAS_CAP:
                        ds = ds * cap
                    if SCORE == _COSINE:
                        ds = ds * tl.load(k_unit_ptr + j, mask=j < S, other=0.0)[None, :]
                    if SCORE == _GAUSSIAN or SCORE == _ADDITIVE:
                        acc, of_weight = pairwise_gradient(
                            acc, of_weight, ds, q_ptr, k_ptr, i, j, L, S, q_strides, k_strides, weight_ptr, D,
                            own * BLOCK_D, SCORE, ACC, BLOCK_D, True,
                        )
                    else:
                        acc = add_product(acc, ds, k, ACC, PRECISION, SPLIT)
    if own == 0:
        tl.store(delta_ptr + head * L + i, delta, mask=i < L)
    dq_ptr += b * dq_strides[0] + h * dq_strides[1]
    tl.store(
        dq_ptr + i[:, None] * dq_strides[2] + d[None, :], (acc * scale.to(ACC)).to(dq_ptr.dtype.element_ty),
        mask=(i < L)[:, None] & (d < D)[None, :],
    )
    if SCORE == _ADDITIVE:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + d, of_weight * scale.to(ACC), mask=d < D)


@triton.jit
def attention_backward_key_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, slopes_ptr, weight_ptr, seed_ptr, q_unit_ptr, k_unit_ptr, cos_ptr,
    sin_ptr, g_ptr, statistics_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr, ROWS, H, GROUP, L, S, D, DV, HALF, ANGLES,
    q_strides, k_strides, v_strides, mask_strides, lengths_strides, g_strides, dk_strides, dv_strides,
    scale: tl.float64, log2_scale: tl.float64, softcap: tl.float64, kept: tl.float64, left, right, threshold,
    SPLIT: tl.constexpr, VARLEN: tl.constexpr, ROTARY: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, D_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr, V_BLOCKS: tl.constexpr,
):
    # One program: BLOCK_N keys of one head, down the rows of its tiles, through all queries of the heads that share it;
    # BLOCK_D columns of the key's gradient and BLOCK_V of the value's.
    seed = tl.load(seed_ptr) if HAS_DROPOUT else 0
    if VARLEN:
        key_head, sequence, first_q, first_k, L, S, j0 = tile_of_sequence(tiles_ptr, H // GROUP)
        b, kh = key_head * 0, key_head
        q_ptr += first_q * q_strides[2]
        g_ptr += first_q * g_strides[2]
        k_ptr += first_k * k_strides[2]
        v_ptr += first_k * v_strides[2]
        dk_ptr += first_k * dk_strides[2]
        dv_ptr += first_k * dv_strides[2]
        statistics_ptr += first_q * H
        delta_ptr += first_q * H
        left -= S - L
        right += S - L
        if HAS_DROPOUT:
            seed += sequence
    else:
        tiles = tl.cdiv(S, BLOCK_N)
        key_head = (tl.program_id(0) // tiles).to(tl.int64)
        j0 = tl.program_id(0) % tiles * BLOCK_N
        b = key_head * GROUP // H
        kh = key_head % (H // GROUP)
    j = j0 + tl.arange(0, BLOCK_N)
    if LARGE:
        j = j.to(tl.int64)
    k_ptr += b * k_strides[0] + kh * k_strides[1]
    v_ptr += b * v_strides[0] + kh * v_strides[1]
    cos_ptr += b * ANGLES
    sin_ptr += b * ANGLES
    k_unit_ptr += key_head * S
    own_d = 0 if D_BLOCKS == 1 else tl.minimum(tl.program_id(1), D_BLOCKS - 1)
    own_v = 0 if V_BLOCKS == 1 else tl.minimum(tl.program_id(1), V_BLOCKS - 1)
    d = own_d * BLOCK_D + tl.arange(0, BLOCK_D)
    dv = own_v * BLOCK_V + tl.arange(0, BLOCK_V)
    k = load_turned(k_ptr, j, S, k_strides, d, D, cos_ptr, sin_ptr, HALF, ROTARY, ACC)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, j, S, v_strides[2], dv, DV, v_strides[3])  # [BLOCK_N, BLOCK_V]
    of_key = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    of_value = tl.zeros((BLOCK_N, BLOCK_V), ACC)
    of_weight = tl.zeros((BLOCK_D,), ACC)

    # Queries begin ... end - 1 see some of these keys; from `full` on, all of them (keys beyond S are not stored).
    begin = j0 * 0
    end = begin + L
    full = begin
    if HAS_RIGHT:
        begin = tl.maximum(j0 - right, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(j0 + BLOCK_N - 1 - right, 0), BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        end = tl.minimum(end, j0 + BLOCK_N + left)
    if HAS_LENGTHS:
        if lengths_strides[1] == 0:
            end = tl.where(j0 < tl.load(lengths_ptr + b * lengths_strides[0]), end, begin)
    if HAS_LEFT or HAS_LENGTHS:
        full = end
    full = tl.minimum(full, tl.maximum(end, begin))

    for member in range(0, GROUP):
        h = kh * GROUP + member
        head = b * H + h
        q_at = q_ptr + (b * q_strides[0] + h * q_strides[1])
        g_at = g_ptr + (b * g_strides[0] + h * g_strides[1])
        mask_at = mask_ptr + (b * mask_strides[0] + h * mask_strides[1])
        slope = slope_of(slopes_ptr, h, HAS_SLOPES, ACC)
        for WHOLE in tl.static_range(2):
            for i0 in range(full if WHOLE else begin, end if WHOLE else full, BLOCK_M):
                i = i0 + tl.arange(0, BLOCK_M)
                if LARGE:
                    i = i.to(tl.int64)
                length = lengths_of(lengths_ptr, b, i, L, lengths_strides, HAS_LENGTHS)
                q = load_turned(q_at, i, L, q_strides, d, D, cos_ptr, sin_ptr, HALF, ROTARY, ACC)  # [BLOCK_M, BLOCK_D]
                g = load_rows(g_at, i, L, g_strides[2], dv, DV, g_strides[3])  # [BLOCK_M, BLOCK_V]
                shift = tl.load(statistics_ptr + head * L + i, mask=i < L, other=float("inf"))
                inverse = tl.load(statistics_ptr + ROWS + head * L + i, mask=i < L, other=0.0)
                delta = tl.load(delta_ptr + head * L + i, mask=i < L, other=0.0)
                s = raw_scores(
                    k, q, k_ptr, q_at, j, i, S, L, k_strides, q_strides, k_unit_ptr, q_unit_ptr + head * L, weight_ptr, D,
                    cos_ptr, sin_ptr, HALF, ROTARY, SCORE, ACC, PRECISION, BLOCK_D, D_BLOCKS, BLOCK_N, BLOCK_M,
                )
                s, cap = finish_scores(
                    s, i[None, :], j[:, None], mask_at, mask_strides, length[None, :], slope, scale.to(ACC),
                    softcap.to(ACC), L, S, left, right, MASK, HAS_LENGTHS, HAS_SLOPES, HAS_CAP, HAS_LEFT, HAS_RIGHT, FOLD,
                    not WHOLE,
                )
                p = exponential(s, shift[None, :], log2_scale.to(ACC), FOLD) * inverse[None, :]  # [BLOCK_N, BLOCK_M]
                dp = rows_product(
                    v, g, v_ptr, g_at, j, i, S, L, v_strides, g_strides, DV, cos_ptr, sin_ptr, HALF, 0, ACC, PRECISION,
                    BLOCK_V, V_BLOCKS,
                )
                ds = p
                if HAS_DROPOUT:
                    stays = kept_by_dropout(head * L + i, j0, S, seed, threshold, BLOCK_M, BLOCK_N)
                    dp = tl.where(tl.trans(stays), dp * kept.to(ACC), 0.0)
                    p = tl.where(tl.trans(stays), p, 0.0)
                ds = ds * (dp - delta[None, :])
                if HAS_CAP:
                    ds = ds * cap
                if SCORE == _COSINE:
                    ds = ds * tl.load(q_unit_ptr + head * L + i, mask=i < L, other=0.0)[None, :]
                of_value = add_product(of_value, p, g, ACC, PRECISION, SPLIT)
                if SCORE == _GAUSSIAN or SCORE == _ADDITIVE:
                    of_key, of_weight = pairwise_gradient(
                        of_key, of_weight, ds, k_ptr, q_at, j, i, S, L, k_strides, q_strides, weight_ptr, D,
                        own_d * BLOCK_D, SCORE, ACC, BLOCK_D, False,
                    )
                else:
                    of_key = add_product(of_key, ds, q, ACC, PRECISION, SPLIT)
    of_key = of_key * scale.to(ACC)
    if HAS_DROPOUT:
        of_value = of_value * kept.to(ACC)
    block = tl.program_id(1)
    dk_ptr += b * dk_strides[0] + kh * dk_strides[1]
    dv_ptr += b * dv_strides[0] + kh * dv_strides[1]
    tl.store(
        dk_ptr + j[:, None] * dk_strides[2] + d[None, :], of_key.to(dk_ptr.dtype.element_ty),
        mask=(j < S)[:, None] & (d < D)[None, :] & (block < D_BLOCKS),
    )
    tl.store(
        dv_ptr + j[:, None] * dv_strides[2] + dv[None, :], of_value.to(dv_ptr.dtype.element_ty),
        mask=(j < S)[:, None] & (dv < DV)[None, :] & (block < V_BLOCKS),
    )


@triton.jit
def attention_backward_mask_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, slopes_ptr, weight_ptr, seed_ptr, q_unit_ptr, k_unit_ptr, cos_ptr,
    sin_ptr, g_ptr, statistics_ptr, delta_ptr, dmask_ptr, ROWS, H, GROUP, L, S, D, DV, HALF, ANGLES,
    q_strides, k_strides, v_strides, mask_strides, lengths_strides, g_strides, B, MASK_B, MASK_H, MASK_L, MASK_S,
    scale: tl.float64, log2_scale: tl.float64, softcap: tl.float64, kept: tl.float64, left, right, threshold,
    ROTARY: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, D_BLOCKS: tl.constexpr, BLOCK_V: tl.constexpr, V_BLOCKS: tl.constexpr,
):
    # One program: a tile of the mask; adds, in order, the dS of all batches, heads, queries and keys that it is for.
    tiles_l = tl.cdiv(MASK_L, BLOCK_M)
    tiles_s = tl.cdiv(MASK_S, BLOCK_N)
    tile_s = tl.program_id(0) % tiles_s
    tile_l = tl.program_id(0) // tiles_s % tiles_l
    mask_head = (tl.program_id(0) // tiles_s // tiles_l).to(tl.int64)  # b MASK_H + h
    # A size of 1 is for all (and where the attention's is 1 too, all are one).
    every_query = MASK_L == 1
    every_key = MASK_S == 1
    b_first = tl.where(MASK_B == 1, 0, mask_head // MASK_H)
    b_end = tl.where(MASK_B == 1, B, mask_head // MASK_H + 1)
    h_first = tl.where(MASK_H == 1, 0, mask_head % MASK_H)
    h_end = tl.where(MASK_H == 1, H, mask_head % MASK_H + 1)
    i_first = tl.where(every_query, 0, tile_l * BLOCK_M)
    i_end = tl.where(every_query, L, tl.minimum(tile_l * BLOCK_M + BLOCK_M, L))
    j_first = tl.where(every_key, 0, tile_s * BLOCK_N)
    j_end = tl.where(every_key, S, tl.minimum(tile_s * BLOCK_N + BLOCK_N, S))
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for b in range(b_first, b_end):
        for h in range(h_first, h_end):
            head = b * H + h
            q_at, k_at, v_at, mask_at = operands_of_head(
                q_ptr, k_ptr, v_ptr, mask_ptr, b, h, GROUP, q_strides, k_strides, v_strides, mask_strides
            )
            g_at = g_ptr + (b * g_strides[0] + h * g_strides[1])
            cos_at = cos_ptr + b * ANGLES
            sin_at = sin_ptr + b * ANGLES
            slope = slope_of(slopes_ptr, h, HAS_SLOPES, ACC)
            for i0 in range(i_first, i_end, BLOCK_M):
                i = i0 + tl.arange(0, BLOCK_M)
                if LARGE:
                    i = i.to(tl.int64)
                length = lengths_of(lengths_ptr, b, i, L, lengths_strides, HAS_LENGTHS)
                q = load_turned(q_at, i, L, q_strides, d, D, cos_at, sin_at, HALF, ROTARY, ACC)
                g = load_rows(g_at, i, L, g_strides[2], dv, DV, g_strides[3])
                shift = tl.load(statistics_ptr + head * L + i, mask=i < L, other=float("inf"))
                inverse = tl.load(statistics_ptr + ROWS + head * L + i, mask=i < L, other=0.0)
                delta = tl.load(delta_ptr + head * L + i, mask=i < L, other=0.0)
                begin, _full, end = key_bounds(
                    i0, L, S, left, right, length, i < L, HAS_LENGTHS, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
                )
                for j0 in range(tl.maximum(begin, j_first), tl.minimum(end, j_end), BLOCK_N):
                    j = j0 + tl.arange(0, BLOCK_N)
                    if LARGE:
                        j = j.to(tl.int64)
                    k = load_turned(k_at, j, S, k_strides, d, D, cos_at, sin_at, HALF, ROTARY, ACC)
                    v = load_rows(v_at, j, S, v_strides[2], dv, DV, v_strides[3])
                    s = raw_scores(
                        q, k, q_at, k_at, i, j, L, S, q_strides, k_strides, q_unit_ptr + head * L,
                        k_unit_ptr + head // GROUP * S, weight_ptr, D, cos_at, sin_at, HALF,
                        ROTARY, SCORE, ACC, PRECISION, BLOCK_D, D_BLOCKS, BLOCK_M, BLOCK_N,
                    )
                    s, _cap = finish_scores(
                        s, i[:, None], j[None, :], mask_at, mask_strides, length[:, None], slope, scale.to(ACC),
                        softcap.to(ACC), L, S, left, right, MASK, HAS_LENGTHS, HAS_SLOPES, HAS_CAP, HAS_LEFT, HAS_RIGHT,
                        FOLD, True,
                    )
                    p = exponential(s, shift[:, None], log2_scale.to(ACC), FOLD) * inverse[:, None]
                    dp = rows_product(
                        g, v, g_at, v_at, i, j, L, S, g_strides, v_strides, DV, cos_at, sin_at, HALF, 0, ACC, PRECISION,
                        BLOCK_V, V_BLOCKS,
                    )
                    if HAS_DROPOUT:
                        stays = kept_by_dropout(head * L + i, j0, S, tl.load(seed_ptr), threshold, BLOCK_M, BLOCK_N)
                        dp = tl.where(stays, dp * kept.to(ACC), 0.0)
                    acc += p * (dp - delta[:, None])  # the mask is added behind the cap
    # Where all queries or keys share one number, its place is that of the first row or column.
    row = tl.where(every_query, 0, tile_l * BLOCK_M + tl.arange(0, BLOCK_M))
    column = tl.where(every_key, 0, tile_s * BLOCK_N + tl.arange(0, BLOCK_N))
    if every_query:
        acc = tl.where((tl.arange(0, BLOCK_M) == 0)[:, None], tl.sum(acc, axis=0)[None, :], 0.0)
    if every_key:
        acc = tl.where((tl.arange(0, BLOCK_N) == 0)[None, :], tl.sum(acc, axis=1)[:, None], 0.0)
    first_row = (tl.arange(0, BLOCK_M) == 0) | (every_query == 0)
    first_column = (tl.arange(0, BLOCK_N) == 0) | (every_key == 0)
    tl.store(
        dmask_ptr + (mask_head * MASK_L + row[:, None].to(tl.int64)) * MASK_S + column[None, :],
        acc.to(dmask_ptr.dtype.element_ty),
        mask=(first_row & (row < MASK_L))[:, None] & (first_column & (column < MASK_S))[None, :],
    )
